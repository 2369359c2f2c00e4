"""What a response is rewarded for: its form and its masks (paper appendix B.3), and whatever a recipe names besides.

A reward is a function; a recipe names it by its dotted path in `reward_funcs`, with one weight each in
`reward_weights`, and the trainer calls it as TRL does, with one list entry per response:

    def short_answer(completions, **kwargs):            # a text reward reads the responses
        return [1.0 / (1.0 + len(completion[0]["content"])) for completion in completions]

    def few_slots(predictions, **kwargs):               # a mask reward reads what was segmented (MaskPrediction)
        return [1.0 - p.slot_mask.float().mean().item() for p in predictions]

Both kinds are found and called alike, and one function may read both. Besides `completions` and `predictions` there
are `prompts`, `completion_ids`, `num_slots`, `trainer_state`, and every column of the rows (`image`, `instruction`,
`masks`, ...). A reward returns one float per response, or None for a response it does not judge.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from segcompass.modeling_segcompass.processing_segcompass import REF_TOKEN, THINK, THINK_END

from .losses import SlotPredictions
from .matching import hungarian, pad_targets, soft_iou

MAX_THINK_CHARACTERS = 2048
RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class MaskPrediction:
    """What one response segmented, beside what it should have. K = K_s slots, G targets.

    Example:
        >>> def few_slots(predictions, **kwargs):
        ...     return [1.0 - p.slot_mask.float().mean().item() for p in predictions]
        >>> args = SegCompassGRPOConfig("runs/grpo", reward_funcs=["my_rewards.few_slots"], reward_weights=[1.0])
    """

    pred_masks: Tensor
    """float (K, H4, W4), mask logits on the image encoder's padded square frame."""
    pred_logits: Tensor
    """float (K,), confidence logits."""
    slot_mask: Tensor
    """bool (K,), True where the slot's concentration token was found; the other slots say nothing."""
    targets: Tensor
    """float (G, H4, W4) in [0, 1], the row's masks on the same frame; G may be 0."""
    valid_extent: Tensor
    """long (2,), (height, width) of the part of the frame that is image, in cells; the rest is padding."""
    score: float
    """the mask score of appendix B.3 in [0, 1], as `mask_scores` computes it."""


# -- the two built-in rewards -----------------------------------------------------------------------------------------


def format_reward(completions: Sequence[str | list[dict]], num_slots: Sequence[int], **kwargs) -> list[float]:
    """A text reward: each response's `format_score`.

    Args:
        completions: B responses, each a str or a list of messages.
        num_slots: B numbers of slots K_s, at least 1.
        **kwargs: what other rewards read.

    Returns:
        B floats: 0.0, 0.9 or 1.0.

    Example:
        >>> format_reward(completions=["<think>the cup</think><REF_POS>"], num_slots=[1])
        [1.0]
    """
    return [format_score(_text(text), slots) for text, slots in zip(completions, num_slots, strict=True)]


def mask_reward(predictions: Sequence[MaskPrediction], **kwargs) -> list[float]:
    """A mask reward: each response's mask score, as `mask_scores` computes it.

    Args:
        predictions: B predictions, one per response.
        **kwargs: what other rewards read.

    Returns:
        B floats in [0, 1].
    """
    return [prediction.score for prediction in predictions]


def format_score(text: str, num_slots: int, ref_token: str = REF_TOKEN) -> float:
    """Format score of appendix B.3.

    A response is valid if it holds exactly one `<think>...</think>` block with non-space content and, after it, the
    concentration token exactly `num_slots` times in one run (white space may stand between): the paper's "exactly one
    special token", read for num_slots slots. Text between `</think>` and the run is an answer in words: the
    paper names only text before `<think>` and after the token, so it costs nothing.

    Args:
        text: the decoded response, its end-of-sequence token removed.
        num_slots: K_s, at least 1.
        ref_token: the concentration token's text; it must survive decoding with `skip_special_tokens=True`.

    Returns:
        0.0: invalid. 1.0: valid and clean. 0.9: valid, but the think content is longer than 2048 characters, or
        non-space text stands before `<think>`, or non-space text stands after the run.
    """
    if text.count(THINK) != 1 or text.count(THINK_END) != 1 or text.count(ref_token) != num_slots:
        return 0.0
    before, _, rest = text.partition(THINK)
    thought, closed, rest = rest.partition(THINK_END)
    run = re.search(rf"{re.escape(ref_token)}(?:\s*{re.escape(ref_token)}){{{num_slots - 1}}}", rest)
    if not closed or not thought.strip() or run is None:
        return 0.0
    clean = len(thought) <= MAX_THINK_CHARACTERS and not before.strip() and not rest[run.end() :].strip()
    return 1.0 if clean else 0.9


@torch.no_grad()
def mask_scores(
    outputs: SlotPredictions,
    targets: Sequence[Tensor],
    valid_extent: Tensor | Sequence[Sequence[int]],
    threshold: float = 0.5,
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
        valid_extent: (B, 2) integer extents (height, width) of the unpadded region in cells of the mask frame.
        threshold: the confidence, a probability, from which a slot is kept.

    Returns:
        B floats in [0, 1]: 1 where nothing is kept and there is no target, 0 where only one of the two is empty. A
        response without any concentration token scores 0 even without a target: it did not say "nothing".

    Raises:
        ValueError: batch sizes or frames differ, or a kept slot's mask is not finite.
    """
    pred_masks = outputs.pred_masks
    if not len(pred_masks) == len(targets) == len(valid_extent):
        raise ValueError(
            f"got masks of {len(pred_masks)} samples, {len(targets)} targets and {len(valid_extent)} extents; give one "
            "of each per sample."
        )
    padded = pad_targets(targets, pred_masks.shape[-2:], pred_masks.device)  # (B, G, H4, W4)
    iou = soft_iou(pred_masks.float().sigmoid(), padded, valid_extent)  # (B, K, G)
    kept = outputs.slot_mask & (outputs.pred_logits.float().sigmoid() >= threshold)  # (B, K)
    table = torch.cat([iou, kept.unsqueeze(-1).to(iou)], dim=-1).cpu().numpy()  # (B, K, G + 1)
    answered = outputs.slot_mask.any(-1).tolist()
    scores = []
    for row, target, found in zip(table, targets, answered, strict=True):
        overlap, keep = row[:, : len(target)], row[:, -1] > 0  # (K, G_i), (K,)
        larger = max(int(keep.sum()), len(target))
        total = float(overlap[hungarian(overlap, keep)].sum(dtype="float64"))
        scores.append(min(total / larger, 1.0) if larger else float(found))
    return scores


def _text(completion: str | list[dict]) -> str:
    """A completion's text: itself, or the contents of its messages joined."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


# -- rewards by name --------------------------------------------------------------------------------------------------


def find_rewards(rewards: Sequence[str | RewardFunction]) -> list[RewardFunction]:
    """The functions that dotted paths name; what is callable stays as it is.

    Args:
        rewards: dotted paths (`package.module.function`; the command also finds modules of the current folder),
            functions, or loaded reward models.

    Returns:
        As many functions, in the same order.

    Raises:
        TypeError: an entry is neither a path nor callable.
        ValueError: a path leads to no function, or the function does not take TRL's keyword arguments.

    Example:
        >>> find_rewards(["segcompass.trainers.rewards.mask_reward"])[0].__name__
        'mask_reward'
    """
    functions: list[RewardFunction] = []
    for reward in rewards:
        function = _import_reward(reward) if isinstance(reward, str) else reward
        if not callable(function):
            raise TypeError(
                f"a reward is a {type(reward).__name__}, {reward!r}; give the dotted path of a function, such as "
                "'my_package.rewards.short_answer', or a function."
            )
        if not isinstance(function, nn.Module) and not _takes_any_keyword(function):
            raise ValueError(
                f"the reward {reward_name(function)}{inspect.signature(function)} takes no **kwargs, but rewards are "
                "called with every column of the rows; write it as "
                f"{reward_name(function)}(completions, **kwargs), or (predictions, **kwargs) to read masks."
            )
        functions.append(function)
    return functions


def reward_name(function: RewardFunction) -> str:
    """What errors call a reward: the function's name, or its class."""
    return getattr(function, "__name__", type(function).__name__)


def _import_reward(path: str) -> RewardFunction:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"reward_funcs names {path!r}, which is no dotted path; write package.module.function, such as "
            f"'my_package.rewards.{path or 'short_answer'}', or my_rewards.function for a file my_rewards.py in the "
            "current folder."
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward_funcs names {path!r}, but the module {module_name} cannot be imported ({error}); install it, or "
            "start the command in the folder that holds it. (A reward model is passed loaded, from Python.)"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        own = (n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__)
        there = ", ".join(sorted(n for n in own if not n.startswith("_"))) or "none"
        raise ValueError(
            f"reward_funcs names {path!r}, but {module_name} has no function {name!r}; its functions are: {there}."
        )
    return function


def _takes_any_keyword(function: RewardFunction) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no signature to read, as some built-in callables
        return True
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
