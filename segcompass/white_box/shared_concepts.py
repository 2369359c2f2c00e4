"""Do words and patches share concepts? Four figures on labelled images, each beside a control with exchanged words.

    shared    concepts that detect a look on patches and in words or phrases, and how many looks have one
    identity  does a word's own code, without any map, find the patches of what it names among other objects' patches?
    cosine    does the concept's decoder row point along what sets the look apart, on patches and on words?

The control exchanges the words of each kind (blue's patches with the next colour's words), so that what a detector
would find anyway is seen. Knows nothing about models: it is given codes, states and what is true.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from segcompass.loaders.scene_drawing import COLOURS, SHAPES, SIZES
from segcompass.modeling_segcompass.grounded_reading import centred

SHARED_F1 = 0.5
KINDS = (tuple(COLOURS), tuple(SHAPES), tuple(SIZES))


class Sample(NamedTuple):
    """What the figures read of one image. P patches, R response words, n objects, A looks."""

    patch_codes: torch.Tensor
    """float (P, d_sae), strengths relative to each concept's mean active activation; sparse or not, as the next."""
    patch_states: torch.Tensor
    """float (P, d_π), hidden states at the SAE's layer."""
    word_codes: torch.Tensor
    """float (R, d_sae)."""
    word_states: torch.Tensor
    """float (R, d_π)."""
    words: list[str]
    """the R words' text."""
    cover: np.ndarray
    """float (n, P), how much of each patch shows each object."""
    has: np.ndarray
    """bool (n, A), which looks each object has."""


def exchanged(kinds: Sequence[Sequence[str]] = KINDS) -> dict[str, str]:
    """Each look beside the next one of its kind, the control's pairing."""
    return {name: kind[(place + 1) % len(kind)] for kind in kinds for place, name in enumerate(kind)}


def shared_detectors(
    patch_f1: torch.Tensor, text_f1: torch.Tensor, kinds: Sequence[Sequence[str]] = KINDS
) -> dict[str, Any]:
    """Which concepts detect a look on patches and in text.

    Args:
        patch_f1: float (A, d_sae), held-out F1 of each concept for each look on patches.
        text_f1: float (A, d_sae), the greater of those on words and on phrases.
        kinds: the A looks, kind by kind.

    Returns:
        "concepts" and "looks", how many; "best", look -> concept with the greatest smaller F1 of the two, of the looks
        that have one; "control concepts", "control looks", with exchanged words.
    """
    looks = [name for kind in kinds for name in kind]
    both = torch.minimum(patch_f1, text_f1)  # (A, d_sae)
    found = both >= SHARED_F1
    other = [looks.index(exchanged(kinds)[name]) for name in looks]
    control = torch.minimum(patch_f1, text_f1[other]) >= SHARED_F1
    return {
        "concepts": int(found.any(0).sum()),
        "looks": int(found.any(1).sum()),
        "best": {name: int(both[row].argmax()) for row, name in enumerate(looks) if found[row].any()},
        "control concepts": int(control.any(0).sum()),
        "control looks": int(control.any(1).sum()),
    }


def identity(
    samples: Sequence[Sample],
    exchange: Mapping[str, str] | None = None,
    kinds: Sequence[Sequence[str]] = KINDS,
) -> float:
    """Area under the ROC curve of a look's patches against other objects', scored by the word's own code.

    Args:
        samples: of scenes.
        exchange: whose patches count as right for a word's; None = the word's own.
        kinds: the looks, kind by kind.

    Returns:
        The mean over words, 0.5 is chance; nan where no word has both kinds of patches.
    """
    areas = []
    row_of = {name: row for row, name in enumerate(name for kind in kinds for name in kind)}
    for sample in samples:
        if not any(word in row_of for word in sample.words):
            continue
        codes = sample.patch_codes.to_dense()
        clear = sample.cover.max(0, initial=0) >= SHARED_F1  # (P,) patches of one object
        maps = centred(codes[None], torch.ones(1, len(codes), dtype=torch.bool))[0]
        has = np.asarray((sample.has.T[:, :, None] & (sample.cover >= SHARED_F1)[None]).any(1))  # (A, P)
        for word, code in zip(sample.words, sample.word_codes.to_dense(), strict=True):
            if word not in row_of:
                continue
            right = has[row_of[exchange[word] if exchange else word]]
            scores = (maps @ code).numpy()
            mine, theirs = scores[right], scores[clear & ~right]
            if len(mine) and len(theirs):
                above = (mine[:, None] > theirs) + 0.5 * (mine[:, None] == theirs)
                areas.append(float(above.mean()))
    return float(np.mean(areas)) if areas else float("nan")


def decoder_cosines(
    samples: Sequence[Sample],
    best: Mapping[str, int],
    decoder: torch.Tensor,
    kinds: Sequence[Sequence[str]] = KINDS,
) -> tuple[float, float]:
    """Cosine of each look's concept with what sets the look apart from the others of its kind.

    Args:
        samples: of scenes.
        best: look -> concept, see `shared_detectors`.
        decoder: float (d_sae, d_π), W_dec.
        kinds: the looks, kind by kind.

    Returns:
        The mean over looks on patches, and on words; nan without any.
    """
    looks = [name for kind in kinds for name in kind]
    patches: dict[str, list[torch.Tensor]] = {look: [] for look in looks}  # each (any number, d_π)
    words: dict[str, list[torch.Tensor]] = {look: [] for look in looks}  # each (1, d_π)
    for sample in samples:
        for thing, cover in zip(sample.has, sample.cover, strict=True):
            inside = sample.patch_states[torch.from_numpy(cover >= SHARED_F1)]
            for row in np.flatnonzero(thing):
                patches[looks[row]].append(inside)
        for word, state in zip(sample.words, sample.word_states, strict=True):
            if word in words:
                words[word].append(state[None])
    means = []
    for found in (patches, words):
        cosines = []
        for kind in kinds:
            there = {look: torch.cat(found[look]).mean(0) for look in kind if sum(map(len, found[look]))}
            for look in there.keys() & best.keys():
                others = [mean for other, mean in there.items() if other != look]
                if others:
                    contrast = there[look] - torch.stack(others).mean(0)
                    row = decoder[best[look]].to(contrast)
                    cosines.append(float(torch.nn.functional.cosine_similarity(contrast, row, dim=0)))
        means.append(float(np.mean(cosines)) if cosines else float("nan"))
    return means[0], means[1]
