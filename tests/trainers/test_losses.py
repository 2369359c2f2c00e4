import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from segcompass.trainers import losses
from segcompass.trainers.losses import LossWeights, Term, erasure_loss, segmentation_loss

OUTPUTS = ("pred_masks", "heatmaps", "pred_logits", "slot_mask")


def loss_of(batch, weights=None):
    """`segmentation_loss` of a batch held as one dict."""
    outputs = SimpleNamespace(**{name: batch[name] for name in OUTPUTS})
    return segmentation_loss(outputs, batch["targets"], batch["valid_extent"], weights)


def random_batch(seed=0, counts=(2, 1, 0), slots=3, grid=4, factor=4):
    generator = torch.Generator().manual_seed(seed)
    size, batch = grid * factor, len(counts)
    return {
        "pred_masks": torch.randn(batch, slots, size, size, generator=generator, requires_grad=True),
        "heatmaps": torch.randn(batch, slots, grid, grid, generator=generator, requires_grad=True),
        "pred_logits": torch.randn(batch, slots, generator=generator, requires_grad=True),
        "slot_mask": torch.ones(batch, slots, dtype=torch.bool),
        "targets": [torch.rand(count, size, size, generator=generator).round() for count in counts],
        "valid_extent": torch.tensor([[size, size]] * batch),
    }


def gradients(batch):
    total, parts = loss_of(batch)
    return total, parts, torch.autograd.grad(total, [batch[k] for k in ("pred_masks", "heatmaps", "pred_logits")])


def test_terms_by_hand():
    # One slot, one target, a 1x2 grid whose cells cover 2x2 mask cells; the second cell is half covered.
    target = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]])
    heatmaps = torch.tensor([[[[math.log(3.0), 0.0]]]])  # probabilities 0.75 and 0.5
    pred_masks = torch.zeros(1, 1, 2, 4)  # 0.5 everywhere
    confidence_logits, found = torch.tensor([[math.log(3.0)]]), torch.ones(1, 1, dtype=torch.bool)
    outputs = SimpleNamespace(pred_masks=pred_masks, heatmaps=heatmaps, pred_logits=confidence_logits, slot_mask=found)
    total, parts = segmentation_loss(outputs, [target], [(2, 4)])
    heat = (-math.log(0.75) - math.log(0.5)) / 2  # goals 1 and 0.5
    dice = 1 - (2 * 3.0 + 1) / (4.0 + 6.0 + 1)
    confidence = -math.log(0.75)
    assert parts["heatmap_bce"].item() == pytest.approx(heat, rel=1e-6)
    assert parts["mask_dice"].item() == pytest.approx(dice, rel=1e-6)
    assert parts["conf_bce"].item() == pytest.approx(confidence, rel=1e-6)
    assert parts["matched_iou"].item() == pytest.approx(3 / (4 + 6 - 3), rel=1e-6)
    assert parts["slots_found"].item() == 1
    assert total.item() == pytest.approx(1.0 * (heat + 0.6 * dice) + 0.2 * confidence, rel=1e-6)
    assert set(parts) == {"heatmap_bce", "mask_dice", "conf_bce", "matched_iou", "slots_found"}
    assert not any(part.requires_grad for part in parts.values())


def test_optional_terms_by_hand():
    target = torch.tensor([[[1.0, 0.0]]])
    logits = torch.tensor([[[[math.log(3.0), 0.0]]]])
    found = torch.ones(1, 1, dtype=torch.bool)
    outputs = SimpleNamespace(pred_masks=logits, heatmaps=logits, pred_logits=torch.zeros(1, 1), slot_mask=found)
    base, _ = segmentation_loss(outputs, [target], [(1, 2)])
    total, parts = segmentation_loss(
        outputs, [target], [(1, 2)], LossWeights(lambda_focal=2.0, lambda_heatmap_dice=3.0)
    )
    focal = (0.25 * 0.25**2 * -math.log(0.75) + 0.75 * 0.5**2 * -math.log(0.5)) / 2
    dice = 1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)
    assert parts["mask_focal"].item() == pytest.approx(focal, rel=1e-6)
    assert parts["heatmap_dice"].item() == pytest.approx(dice, rel=1e-6)
    assert total.item() == pytest.approx(base.item() + 2 * focal + 3 * dice, rel=1e-6)


def test_a_sample_without_target_changes_only_the_confidence_term():
    batch = random_batch(counts=(2, 1))
    more = random_batch(counts=(2, 1, 0))
    for key in ("pred_masks", "heatmaps", "pred_logits"):
        more[key].data[:2] = batch[key].data
    more["targets"][:2] = batch["targets"]
    _, parts = loss_of(batch)
    _, more_parts, grads = gradients(more)
    for name in ("heatmap_bce", "mask_dice", "matched_iou"):
        torch.testing.assert_close(parts[name], more_parts[name])
    assert grads[0][2].abs().max() == 0 and grads[1][2].abs().max() == 0
    assert (grads[2][2] > 0).all()  # descent lowers the confidence of each of its slots


def test_samples_weigh_the_same_whatever_their_number_of_targets():
    batch = random_batch(counts=(3, 1))
    alone = [loss_of({k: v[i : i + 1] for k, v in batch.items()})[1]["mask_dice"].item() for i in range(2)]
    assert loss_of(batch)[1]["mask_dice"].item() == pytest.approx(sum(alone) / 2, rel=1e-6)


@pytest.mark.parametrize("found", [True, False])
def test_no_pair_at_all_leaves_finite_gradients_on_every_input(found):
    batch = random_batch(counts=(0, 0) if found else (2, 1))
    batch["slot_mask"] &= found
    total, parts, grads = gradients(batch)
    assert torch.isfinite(total)
    assert parts["heatmap_bce"] == parts["mask_dice"] == 0
    assert parts["matched_iou"].isnan()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert grads[0].abs().max() == grads[1].abs().max() == 0
    assert bool(grads[2].abs().max() > 0) == found
    if not found:
        assert total == 0


def test_slots_without_their_token_enter_no_term():
    batch = random_batch(counts=(3, 1))
    batch["slot_mask"][:, 1] = False
    total, parts, grads = gradients(batch)
    for key in ("pred_masks", "heatmaps", "pred_logits"):
        batch[key].data[:, 1] = torch.nan
    nan_total, _, nan_grads = gradients(batch)
    assert torch.equal(total, nan_total)
    assert parts["slots_found"] == 2
    for grad, nan_grad in zip(grads, nan_grads, strict=True):
        assert grad[:, 1].abs().max() == 0
        assert torch.equal(grad, nan_grad)


def test_padding_never_matters():
    batch = random_batch(counts=(2, 2))
    batch["valid_extent"] = torch.tensor([[16, 7], [9, 16]])  # extents that cut grid cells
    total, _, grads = gradients(batch)
    for sample, (height, width) in enumerate(batch["valid_extent"].tolist()):
        for key, value in (("pred_masks", torch.nan), ("targets", 1.0)):
            outside = torch.ones(16, 16, dtype=torch.bool)
            outside[:height, :width] = False
            batch[key][sample].data[:, outside] = value
        outside = torch.ones(4, 4, dtype=torch.bool)
        outside[: math.ceil(height / 4), : math.ceil(width / 4)] = False
        batch["heatmaps"].data[sample][:, outside] = torch.inf
    other_total, _, other_grads = gradients(batch)
    assert torch.equal(total, other_total)
    for grad, other in zip(grads, other_grads, strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(grad, other)
    assert grads[0][0, :, :, 7:].abs().max() == 0 and grads[1][0, :, :, 2:].abs().max() == 0


def test_a_target_that_fills_the_unpadded_part_of_a_cell_is_a_full_heatmap_target():
    heatmaps = torch.full((1, 1, 1, 1), 20.0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    target = torch.zeros(1, 4, 4)
    target[:, :3, :2] = 1.0
    outputs = SimpleNamespace(
        pred_masks=torch.zeros(1, 1, 4, 4), heatmaps=heatmaps, pred_logits=torch.zeros(1, 1), slot_mask=mask
    )
    _, parts = segmentation_loss(outputs, [target], [(3, 2)])
    assert parts["heatmap_bce"].item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_agrees_with_finite_differences():
    batch = random_batch(counts=(1, 1), slots=1, grid=2)
    total, _, grads = gradients(batch)
    for key, grad in zip(("pred_masks", "heatmaps", "pred_logits"), grads, strict=True):
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-2
        ends = []
        for sign in (1, -1):
            moved = dict(batch, **{key: batch[key].detach() + sign * step * direction})
            ends.append(loss_of(moved)[0].item())
        # float32 losses of size 1 over a step of 0.02: rounding leaves about 1e-5
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((grad * direction).sum().item(), abs=1e-4)


def test_descent_separates_two_targets_into_two_slots():
    batch = random_batch(counts=(2,), slots=3)
    batch["targets"] = [torch.zeros(2, 16, 16)]
    batch["targets"][0][0, :8, :8] = 1.0
    batch["targets"][0][1, 8:, 8:] = 1.0
    leaves = [batch[key] for key in ("pred_masks", "heatmaps", "pred_logits")]
    optimizer = torch.optim.Adam(leaves, lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        total, parts = loss_of(batch)
        total.backward()
        optimizer.step()
    assert parts["matched_iou"] > 0.95
    assert (batch["pred_logits"].sigmoid() > 0.5).sum() == 2


def test_values_are_the_same_under_autocast():
    batch = random_batch()
    plain, _ = loss_of(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = loss_of(batch)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_bfloat16_predictions_and_bool_targets_are_taken():
    batch = random_batch()
    for key in ("pred_masks", "heatmaps", "pred_logits"):
        batch[key] = batch[key].detach().bfloat16().requires_grad_()
    batch["targets"] = [target.bool() for target in batch["targets"]]
    total, _, grads = gradients(batch)
    assert total.dtype == torch.float32
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_errors_name_what_is_wrong():
    batch = random_batch()
    with pytest.raises(ValueError, match=r"targets\[1\] must be \(G, 16, 16\)"):
        loss_of(dict(batch, targets=[batch["targets"][0], torch.zeros(1, 4, 4), batch["targets"][2]]))
    with pytest.raises(ValueError, match="whole multiple"):
        loss_of(dict(batch, heatmaps=torch.zeros(3, 3, 5, 5)))


def test_weights_multiply_their_terms():
    batch = random_batch()
    weights = LossWeights(lambda_s=0.3, lambda_c=0.5, lambda_d=0.8, lambda_focal=5.0, lambda_heatmap_dice=0.7)
    total, parts = loss_of(batch, weights)
    masks = parts["heatmap_bce"] + 0.8 * parts["mask_dice"] + 5.0 * parts["mask_focal"] + 0.7 * parts["heatmap_dice"]
    assert total.item() == pytest.approx((0.3 * masks + 0.5 * parts["conf_bce"]).item(), rel=1e-6)


def test_a_new_term_is_a_weight_a_function_and_a_line_in_the_table(monkeypatch):
    @dataclass
    class Weights(LossWeights):
        lambda_empty: float = 0.0

    def emptiness(slots):
        return slots.mean(slots.probabilities.mean((-2, -1)))

    term = Term("emptiness", ("lambda_s", "lambda_empty"), emptiness, optional=True)
    monkeypatch.setattr(losses, "TERMS", (*losses.TERMS, term))
    batch = random_batch()
    without, parts = loss_of(batch, Weights())
    assert "emptiness" not in parts
    total, parts = loss_of(batch, Weights(lambda_s=1.0, lambda_empty=3.0))
    assert parts["emptiness"] > 0
    assert total.item() == pytest.approx((without + 3.0 * parts["emptiness"]).item(), rel=1e-6)
    assert torch.autograd.grad(total - without, batch["pred_masks"])[0].abs().max() > 0


def erased_outputs(whole, erased, heatmaps, logits, slots):
    erased = SimpleNamespace(pred_masks=erased, heatmaps=heatmaps, pred_logits=logits)
    return SimpleNamespace(pred_masks=whole, erased=erased, erased_slots=slots)


def test_erasure_by_hand():
    # Two slots on a 1x2 grid of 2x2 mask cells, the last column is padding. The second slot was not erased.
    whole = torch.tensor([[[[5.0, 5.0, -5.0, 5.0], [5.0, -5.0, -5.0, 5.0]]] * 2]).view(1, 2, 2, 4)
    erased = torch.full((1, 2, 2, 4), math.log(3.0))
    heat = torch.tensor([[[[0.0, math.log(3.0)]], [[9.0, 9.0]]]])
    logits = torch.tensor([[0.0, 9.0]])
    slots = torch.tensor([[True, False]])
    total, parts = erasure_loss(erased_outputs(whole, erased, heat, logits, slots), [(2, 3)])
    assert parts["still_there"].item() == pytest.approx(0.75)
    heat_bce = (-math.log(0.5) - math.log(0.25)) / 2
    assert total.item() == pytest.approx(heat_bce + 0.75 - math.log(0.5), rel=1e-6)


def test_erasure_teaches_only_the_erased_pass_and_only_the_erased_slots():
    generator = torch.Generator().manual_seed(0)
    whole, erased = (torch.randn(2, 3, 8, 8, generator=generator, requires_grad=True) for _ in range(2))
    heat = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    logits = torch.randn(2, 3, generator=generator, requires_grad=True)
    slots = torch.tensor([[True, False, True], [False, False, False]])
    total, _ = erasure_loss(erased_outputs(whole, erased, heat, logits, slots), [(8, 8), (8, 8)])
    taught = torch.autograd.grad(total, [whole, erased, heat, logits], allow_unused=True)
    assert taught[0] is None
    for gradient in taught[1:]:
        assert (gradient[slots] >= 0).all() and gradient[slots].sum() > 0, "everything erased goes down"
        assert not gradient[~slots].any()


def test_erasure_without_a_slot_is_zero_and_connected():
    erased = torch.randn(1, 2, 8, 8, requires_grad=True)
    none = torch.zeros(1, 2, dtype=torch.bool)
    total, parts = erasure_loss(
        erased_outputs(erased, erased, torch.randn(1, 2, 4, 4), torch.randn(1, 2), none), [(8, 8)]
    )
    total.backward()
    assert total.item() == 0 and not erased.grad.any() and parts["still_there"].isnan()
