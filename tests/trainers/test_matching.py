import itertools

import pytest
import torch

from segcompass.trainers.matching import match_slots, soft_iou, valid_region


def logits_of(probabilities):
    return torch.logit(torch.as_tensor(probabilities, dtype=torch.float32))


def test_valid_region_is_the_top_left_extent():
    region = valid_region([(1, 2), (2, 3)], (2, 3), torch.device("cpu"))
    assert region.tolist() == [
        [[True, True, False], [False, False, False]],
        [[True, True, True], [True, True, True]],
    ]


def test_soft_iou_by_hand():
    probabilities = torch.tensor([[[[0.5, 1.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2)
    targets = torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]]]])  # (1, 3, 1, 2)
    # slot 0: 0.5 / (1.5 + 1 - 0.5), 1.5 / (1.5 + 2 - 1.5), 0 / 1.5; slot 1 is empty: 0, also against the empty target
    expected = torch.tensor([[[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(soft_iou(probabilities, targets, [(1, 2)]), expected)


def test_soft_iou_is_float32_under_autocast():
    probabilities, targets = torch.rand(1, 2, 16, 16), torch.rand(1, 3, 16, 16)
    plain = soft_iou(probabilities, targets, [(16, 16)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = soft_iou(probabilities, targets, [(16, 16)])
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("num_targets", [1, 3, 4, 6])
def test_matching_is_the_best_of_all_permutations(num_targets):
    generator = torch.Generator().manual_seed(num_targets)
    heatmaps = torch.randn(5, 4, 6, 6, generator=generator)
    targets = [torch.rand(num_targets, 6, 6, generator=generator).round() for _ in range(5)]
    pairs = match_slots(heatmaps, targets, torch.ones(5, 4, dtype=torch.bool), [(6, 6)] * 5)
    for heatmap, target, (slots, chosen) in zip(heatmaps, targets, pairs, strict=True):
        iou = soft_iou(heatmap.sigmoid()[None], target[None], [(6, 6)])[0]
        size = min(4, num_targets)
        best = max(
            sum(iou[s, t].item() for s, t in zip(some_slots, some_targets, strict=True))
            for some_slots in itertools.permutations(range(4), size)
            for some_targets in itertools.combinations(range(num_targets), size)
        )
        assert len(slots) == len(set(slots.tolist())) == len(set(chosen.tolist())) == size
        assert iou[slots, chosen].sum().item() == pytest.approx(best, abs=1e-5)


def test_each_sample_has_its_own_number_of_targets():
    eye = torch.eye(2)[:, None, :]  # (2, 1, 2): left cell, right cell
    heatmaps = logits_of([[[[0.9, 0.1]], [[0.1, 0.9]]]] * 3)
    pairs = match_slots(heatmaps, [eye.flip(0), eye[1:], eye[:0]], torch.ones(3, 2, dtype=torch.bool), [(1, 2)] * 3)
    assert [(s.tolist(), t.tolist()) for s, t in pairs] == [([0, 1], [1, 0]), ([1], [0]), ([], [])]
    assert all(index.dtype == torch.int64 for pair in pairs for index in pair)


def test_a_slot_without_its_token_is_never_matched():
    heatmaps = logits_of([[[[0.99, 0.01]], [[0.5, 0.5]]]])
    target = torch.tensor([[[1.0, 0.0]]])
    heatmaps[0, 0, 0, 0] = torch.nan  # and whatever it says does not matter
    ((slots, chosen),) = match_slots(heatmaps, [target], torch.tensor([[False, True]]), [(1, 2)])
    assert (slots.tolist(), chosen.tolist()) == ([1], [0])
    ((slots, _),) = match_slots(heatmaps, [target], torch.tensor([[False, False]]), [(1, 2)])
    assert slots.tolist() == []


def test_padding_does_not_change_the_matching():
    heatmaps = logits_of([[[[0.6, 0.5, 0.5]], [[0.4, 0.5, 0.5]]]])
    target = torch.tensor([[[1.0, 0.0, 0.0]]])
    expected = match_slots(heatmaps, [target], torch.ones(1, 2, dtype=torch.bool), [(1, 2)])
    heatmaps[0, 0, 0, 2], heatmaps[0, 1, 0, 2], target[0, 0, 2] = -torch.inf, torch.nan, 1.0
    actual = match_slots(heatmaps, [target], torch.ones(1, 2, dtype=torch.bool), [(1, 2)])
    assert expected[0][0].tolist() == actual[0][0].tolist() == [0]


def test_errors_name_what_is_wrong():
    heatmaps, mask = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"targets\[0\] must be \(G, 4, 4\)"):
        match_slots(heatmaps, [torch.zeros(1, 8, 8)], mask, [(4, 4)])
    with pytest.raises(ValueError, match="2 targets"):
        match_slots(heatmaps, [torch.zeros(1, 4, 4)] * 2, mask, [(4, 4)])
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        match_slots(heatmaps, [torch.zeros(1, 4, 4)], mask, [4])
    with pytest.raises(ValueError, match=r"slots \[1\] is not finite"):
        heatmaps[0, 1] = torch.nan
        match_slots(heatmaps, [torch.zeros(1, 4, 4)], mask, [(4, 4)])
