"""The grounded read-out's own terms on a small reading with known concepts."""

from types import SimpleNamespace

import pytest
import torch

from segcompass.modeling_segcompass.grounded_reading import GroundedReading
from segcompass.trainers.grounded_losses import (
    confidence_loss,
    hand_over,
    left_over,
    match_patches,
    name_loss,
    patch_loss,
    without_looks,
    word_detectors,
)

CONCEPTS, PATCHES, WIDTH = 12, 16, 8


@pytest.fixture
def reading():
    """Concepts 0 to 7 are looks, 8 to 11 places."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        grounded_rank=0, grounded_map="all", look_concepts=2, place_concepts=1, place_share=0.25, tied_place_share=0.6,
        phrase_window=2, place_spread=0.5, num_slots=2, key_channels=4, sae_config=SimpleNamespace(d_sae=CONCEPTS),
        get_text_config=lambda: SimpleNamespace(hidden_size=WIDTH),
    )  # fmt: skip
    reading = GroundedReading(config)
    reading.init_weights()
    reading.spread[8:] = 0.1
    return reading


def scene(reading):
    """Two questions on one image: a thing in patches 0 to 3 that fires concept 0, another in 8 to 11 with concept 1."""
    patches = torch.zeros(2, PATCHES, CONCEPTS)
    patches[:, 0:4, 0], patches[:, 8:12, 1] = 2.0, 2.0
    patches[:, 0:4, 8], patches[:, 8:12, 9] = 2.0, 2.0
    words = torch.zeros(2, 1, CONCEPTS)
    words[0, 0, [0, 8]], words[1, 0, [1, 9]] = 2.0, 2.0
    patch_mask, word_mask = torch.ones(2, PATCHES, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    xy = torch.stack([torch.linspace(0, 1, PATCHES), torch.full((PATCHES,), 0.5)], -1).expand(2, -1, -1)
    read = reading(words, torch.randn(2, 1, WIDTH), word_mask, patches, patch_mask, xy)
    first, second = torch.zeros(1, PATCHES), torch.zeros(1, PATCHES)
    first[0, 0:4], second[0, 8:12] = 1.0, 1.0
    return read, [first, second], patch_mask


def test_slots_are_matched_with_what_they_show(reading):
    heatmaps = torch.full((1, 3, PATCHES), -4.0)
    heatmaps[0, 2, 0:4], heatmaps[0, 0, 8:12] = 4.0, 4.0
    targets = torch.zeros(2, PATCHES)
    targets[0, 0:4], targets[1, 8:12] = 1.0, 1.0
    mask = torch.ones(1, PATCHES, dtype=torch.bool)
    pairs = match_patches(heatmaps, torch.zeros(1, 3), [targets], mask)
    assert sorted(zip(pairs.slots.tolist(), pairs.targets.tolist(), strict=True)) == [(0, 1), (2, 0)]
    assert torch.equal(pairs.coverage, targets[pairs.targets])
    sure = torch.tensor([[9.0, -9.0, 9.0]])
    assert confidence_loss(sure, pairs) < 1e-3 < 1 < confidence_loss(-sure, pairs)
    right, wrong = heatmaps[0, pairs.slots], heatmaps[0, pairs.slots.flip(0)]
    assert (
        patch_loss(right, pairs.coverage, mask.expand(2, -1))
        < 0.1
        < 1
        < patch_loss(wrong, pairs.coverage, mask.expand(2, -1))
    )


def test_handed_over_looks_show_the_other_thing_and_keep_ones_own_place(reading):
    read, targets, patch_mask = scene(reading)
    pairs = match_patches(read.heatmaps, read.confidences, targets, patch_mask)
    given = hand_over(reading, read, pairs, ["one", "one"], [0, 1], torch.Generator().manual_seed(0))
    assert sorted(given.givers.tolist()) == [0, 1]
    for weights, giver in zip(given.weights.detach(), given.givers.tolist(), strict=True):
        own = 1 - giver
        look, place = pairs.samples[giver].item(), 8 + pairs.samples[own].item()
        assert weights[:8].argmax() == look and weights[8:].argmax() + 8 == place
        assert weights[:8].sum() == pytest.approx(0.75) and weights[8:].sum() == pytest.approx(0.25)
        heat = reading.heat(weights[None, None], read.maps[pairs.samples[giver]][None])[0, 0]
        assert heat.argmax() // 4 == (0 if look == 0 else 2)  # the looks win: three quarters of the weight


@pytest.mark.parametrize(
    ("images", "things"), [(["one", "two"], [0, 1]), (["one", "one"], [0, 0])], ids=["images", "things"]
)
def test_nothing_is_handed_over_between_images_or_for_one_thing(reading, images, things):
    read, targets, patch_mask = scene(reading)
    pairs = match_patches(read.heatmaps, read.confidences, targets, patch_mask)
    assert len(hand_over(reading, read, pairs, images, things, torch.Generator()).givers) == 0


def test_equal_looks_are_not_handed_over(reading):
    read, targets, patch_mask = scene(reading)
    pairs = match_patches(read.heatmaps, read.confidences, targets, patch_mask)
    twins = read._replace(weights=read.weights[:1].expand(2, -1, -1))
    assert len(hand_over(reading, twins, pairs, ["one", "one"], [0, 1], torch.Generator()).givers) == 0


def test_without_looks_only_places_are_left(reading):
    read, _, _ = scene(reading)
    left = without_looks(reading, read.weights[:, 0])
    assert left[:, :8].abs().max() == 0 and torch.equal(left[:, 8:], read.weights[:, 0, 8:])
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    assert left_over(target, target) == 1 and left_over(1 - target, target) == 0


def test_weight_on_a_words_detectors_costs_less_and_held_out_words_ask_for_nothing():
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(200, 3, generator=generator) > 0.6
    codes = 0.2 * torch.rand(200, CONCEPTS, generator=generator)
    codes[:, 4] += 2 * shown[:, 0]
    codes[:, 5] += 2 * shown[:, 1]
    codes[:, 6] += 2 * shown[:, 2]
    detectors = word_detectors(codes, shown, held_out=[2])
    assert detectors.nonzero().tolist() == [[0, 4], [1, 5]]
    fires = torch.ones(1, CONCEPTS, dtype=torch.bool)
    names = torch.tensor([[1.0, 0.5, 1.0]])

    def cost(**weights):
        row = torch.zeros(1, CONCEPTS)
        for name, value in weights.items():
            row[0, int(name[1:])] = value
        return name_loss(row, fires, names, detectors).item()

    expected = -(torch.tensor([0.61]).log() + 0.5 * torch.tensor([0.41]).log()).item() / 1.5
    assert cost(c4=0.6, c5=0.4) == pytest.approx(expected, rel=1e-5)
    assert cost(c4=0.6, c5=0.4) < cost(c4=1.0) < cost(c6=1.0)  # one word of two is not enough; the held-out is nothing
    assert name_loss(torch.ones(1, CONCEPTS), ~fires, names, detectors) == 0
