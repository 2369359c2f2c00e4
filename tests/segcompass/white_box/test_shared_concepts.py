"""Concepts that words and patches share, against worlds in which the answer is known."""

import numpy as np
import pytest
import torch

from segcompass.white_box.scene_attributes import ATTRIBUTES as LOOKS
from segcompass.white_box.shared_concepts import (
    KINDS,
    Sample,
    decoder_cosines,
    exchanged,
    identity,
    shared_detectors,
)

DIRECTIONS = torch.eye(len(LOOKS))


def world(shared=True, count=40, seed=0):
    """Scenes of two objects of two patches each; a look's code is one-hot, the words' shifted unless shared."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        has = np.zeros((2, len(LOOKS)), bool)
        for kind in KINDS:
            for thing, look in enumerate(rng.permutation(kind)[:2]):
                has[thing, LOOKS.index(look)] = True
        cover = np.zeros((2, 6))
        cover[0, :2], cover[1, 2:4] = 1, 1
        codes = torch.from_numpy(cover.T @ has).float()  # (6, A)
        words = [LOOKS[row] for row in np.flatnonzero(has[0])] + ["answer"]
        said = torch.stack([DIRECTIONS[LOOKS.index(word)] if word in LOOKS else codes[-1] for word in words])
        if not shared:
            said = said.roll(3, 1)
        samples.append(Sample(codes, codes, said, said, words, cover, has))
    return samples


def test_one_code_for_word_and_patch_is_found():
    samples = world()
    assert identity(samples) == 1
    assert identity(samples, exchanged()) < 0.6
    best = {name: row for row, name in enumerate(LOOKS)}
    patches, words = decoder_cosines(samples, best, DIRECTIONS)
    assert patches > 0.6 and words > 0.8


def test_words_with_concepts_of_their_own_find_nothing():
    assert abs(identity(world(shared=False)) - 0.5) < 0.15
    assert np.isnan(decoder_cosines(world(), {}, DIRECTIONS)).all()


def test_only_detectors_on_both_sides_count():
    patch, text = torch.zeros(len(LOOKS), 20), torch.zeros(len(LOOKS), 20)
    patch[0, 3], text[0, 3] = 0.9, 0.6  # shared
    patch[1, 4], text[2, 4] = 0.9, 0.9  # of two looks
    patch[5, 6] = 1
    found = shared_detectors(patch, text)
    assert (found["concepts"], found["looks"], found["best"]) == (1, 1, {LOOKS[0]: 3})
    assert (found["control concepts"], found["control looks"]) == (1, 1), "the second look's patches, the third's words"


def test_the_control_exchanges_within_a_kind():
    pairs = exchanged()
    assert sorted(pairs) == sorted(LOOKS) == sorted(pairs.values())
    assert all(name != pairs[name] for name in LOOKS)
    assert all({pairs[name] for name in kind} == set(kind) for kind in KINDS)


def test_identity_of_scenes_without_names_is_unknown():
    assert np.isnan(identity([sample._replace(words=["answer"] * len(sample.words)) for sample in world(count=3)]))
    assert identity(world(count=5)) == pytest.approx(1)
