"""The two rewards of the joint objective (paper appendix B.3): the form of the response, and the quality of its masks.

A response's reward is 0.3 format + 0.7 mask; the weights are the trainer's (`reward_weights`). The functions TRL calls,
`make_format_reward(num_slots)` and `mask_reward`, return one float in [0, 1] a completion.
"""

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .matching import hungarian, pad_targets, soft_iou

MAX_THINK_CHARACTERS = 2048
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def format_score(text: str, num_slots: int, ref_token: str = "<REF_POS>") -> float:
    """Format score of appendix B.3.

    A response is valid if it holds exactly one `<think>...</think>` block with non-space content and, after it, the
    concentration token exactly `num_slots` times in one run (white space may stand between): the paper's "exactly one
    special token", read for num_slots slots. Text between `</think>` and the run is an answer in words: the
    paper names only text before `<think>` and after the token, so it costs nothing.

    Args:
        text: the decoded response, its end-of-sequence token removed.
        num_slots: K_s, at least 1.
        ref_token: the concentration token's text.

    Returns:
        0.0: invalid. 1.0: valid and clean. 0.9: valid, but the think content is longer than 2048 characters, or
        non-space text stands before `<think>`, or non-space text stands after the run.
    """
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1 or text.count(ref_token) != num_slots:
        return 0.0
    before, _, rest = text.partition(THINK_OPEN)
    thought, closed, rest = rest.partition(THINK_CLOSE)
    run = re.search(rf"{re.escape(ref_token)}(?:\s*{re.escape(ref_token)}){{{num_slots - 1}}}", rest)
    if not closed or not thought.strip() or run is None:
        return 0.0
    clean = len(thought) <= MAX_THINK_CHARACTERS and not before.strip() and not rest[run.end() :].strip()
    return 1.0 if clean else 0.9


@torch.no_grad()
def mask_scores(
    outputs, targets: Sequence[Tensor], valid: Tensor | Sequence[Sequence[int]], threshold: float = 0.5
) -> list[float]:
    """Mask score of each sample of a batch (appendix B.3).

    Slots whose confidence is at least `threshold` are kept and matched one-to-one with the targets, and the soft IoU
    of the pairs is summed and divided by max(kept slots, targets), so that missing and spurious slots both cost. (The
    paper's mean over matched pairs rewards keeping one sure slot and dropping the rest.) One kept slot and one target
    give their soft IoU, the paper's single-object score.

    Args:
        outputs: has pred_masks (B, K, H4, W4) logits, pred_logits (B, K) confidence logits and slot_mask (B, K) bool,
            as `SegCompassOutput` does. A slot with slot_mask False is never kept.
        targets: B tensors (G_i, H4, W4) in [0, 1]; G_i may be 0.
        valid: (B, 2) integer extents (height, width) of the unpadded region in cells of the mask frame.
        threshold: the confidence, a probability, from which a slot is kept.

    Returns:
        B floats in [0, 1]: 1 where nothing is kept and there is no target, 0 where only one of the two is empty. A
        response without any concentration token scores 0 even without a target: it did not say "nothing".

    Raises:
        ValueError: batch sizes or frames differ, or a kept slot's mask is not finite.
    """
    pred_masks = outputs.pred_masks
    if not len(pred_masks) == len(targets) == len(valid):
        raise ValueError(
            f"one list of targets and one extent a sample: got {len(pred_masks)} samples, {len(targets)} targets and "
            f"{len(valid)} extents."
        )
    padded = pad_targets(targets, pred_masks.shape[-2:], pred_masks.device)
    iou = soft_iou(pred_masks.float().sigmoid(), padded, valid)
    kept = outputs.slot_mask & (outputs.pred_logits.float().sigmoid() >= threshold)
    table = torch.cat([iou, kept.unsqueeze(-1).to(iou)], dim=-1).cpu().numpy()
    answered = outputs.slot_mask.any(-1).tolist()
    scores = []
    for row, target, found in zip(table, targets, answered, strict=True):
        overlap, keep = row[:, : len(target)], row[:, -1] > 0
        larger = max(int(keep.sum()), len(target))
        total = float(overlap[hungarian(overlap, keep)].sum(dtype="float64"))
        scores.append(min(total / larger, 1.0) if larger else float(found))
    return scores


def mask_score(
    pred_masks: Tensor,
    pred_logits: Tensor,
    slot_mask: Tensor,
    targets: Tensor,
    valid: Tensor | Sequence[int],
    threshold: float = 0.5,
) -> float:
    """`mask_scores` of one sample: the same arguments without their batch dimension.

    Args:
        pred_masks: (K, H4, W4) logits.
        pred_logits: (K,) confidence logits.
        slot_mask: (K,) bool.
        targets: (G, H4, W4) in [0, 1]; G may be 0.
        valid: (height, width) of the unpadded region.
        threshold: the confidence from which a slot is kept.

    Returns:
        A float in [0, 1].
    """
    batch = SimpleNamespace(pred_masks=pred_masks[None], pred_logits=pred_logits[None], slot_mask=slot_mask[None])
    return mask_scores(batch, [targets], torch.as_tensor(valid)[None], threshold)[0]


def make_format_reward(num_slots: int, ref_token: str = "<REF_POS>") -> Callable[..., list[float]]:
    """A TRL reward function, named `format_reward`, that gives each completion its `format_score`.

    Args:
        num_slots: K_s, at least 1.
        ref_token: the concentration token's text; it must survive decoding with `skip_special_tokens=True`.

    Returns:
        f(completions, **kwargs) -> list of floats. A completion is a str or a list of messages.
    """

    def format_reward(completions: list[str] | list[list[dict]], **kwargs) -> list[float]:
        return [format_score(_text(completion), num_slots, ref_token) for completion in completions]

    return format_reward


def mask_reward(completions: list, mask_score: Sequence[float], **kwargs) -> list[float]:
    """A TRL reward function that hands on the column `mask_score`.

    TRL's reward functions see no model output, so the trainer computes the scores with `mask_scores` and passes them.

    Args:
        completions: one a response; only their number is used.
        mask_score: as many floats in [0, 1].

    Returns:
        The scores, as floats.

    Raises:
        ValueError: there are more or fewer scores than completions.
    """
    if len(mask_score) != len(completions):
        raise ValueError(f"got {len(mask_score)} mask scores for {len(completions)} completions; give one each.")
    return [float(score) for score in mask_score]


def _text(completion: str | list[dict]) -> str:
    """A completion's text: itself, or the contents of its messages joined."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
