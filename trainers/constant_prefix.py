"""The blocks up to the SAE's layer, without gradients where their states are constant: less to keep, less to go back.

Below the SAE's layer only the embeddings' rows of `</think>` and of the concentration token learn (policy.py), and a
token attends to earlier ones alone. So no gradient comes of the columns before the first such token: prompt, image and
reasoning. They pass these blocks without gradients; the columns after them attend to the same keys and values. Values
and gradients are those of the whole pass. Knows nothing about losses.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from segcompass.modeling_segcompass.backbone import ROUTERS

from .optimization import ROWS_HOOKS

ATTENTION = ("sdpa", "eager")
"""Implementations of attention to which a mask says everything."""

TAKEN = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache"}
"""Inputs of a block that can be cut in two."""


@contextmanager
def constant_prefix(core: Any, input_ids: Tensor) -> Iterator[int]:
    """While open, a pass over these tokens has no gradients up to the SAE's layer where states are constant.

    Nothing changes where that cannot be told: without gradients, with adapters, where more than those rows learns,
    where weights are sharded, where attention weights are returned, where blocks have routers, dropout or inputs that
    are not known, and under another attention than sdpa and eager.

    Args:
        core: a SegCompassModel.
        input_ids: long (B, T), the tokens of the pass.

    Yields:
        How many first columns have no gradients, 0 to T - 1.
    """
    blocks = core.backbone.blocks(core.mllm)[: core.config.sae_config.layer]
    columns = _constant_columns(core, input_ids) if torch.is_grad_enabled() and _only_rows_learn(core, blocks) else 0
    with ExitStack() as stack:
        for block in blocks if columns else ():
            stack.enter_context(_in_two(block, columns))
        yield columns


def _only_rows_learn(core: Any, blocks: nn.ModuleList) -> bool:
    """Whether `policy.freeze` made the model so, and its blocks are of the common kind."""
    attentions = core.config.output_attentions or core.config.get_text_config().output_attentions  # recorded per call
    if not getattr(core.get_input_embeddings(), ROWS_HOOKS, None) or not core.training or attentions:
        return False
    names, vision = tuple(core.backbone.vision_names(core.mllm)), core.backbone.vision_tower(core.mllm)
    beside = [weight for name, weight in core.mllm.named_parameters() if name.startswith(names)]
    if any(weight.requires_grad for weight in [*beside, *vision.parameters(), *blocks.parameters()]):
        return False
    return all(map(_can_be_cut, blocks))


def _can_be_cut(block: Any) -> bool:
    attention = getattr(block, "self_attn", None)
    if getattr(getattr(attention, "config", None), "_attn_implementation", None) not in ATTENTION:
        return False
    sharded = isinstance(block, (FSDPModule, FullyShardedDataParallel)) or hasattr(next(block.parameters()), "ds_id")
    if sharded or "forward" in vars(block):  # weights are gathered for one call, or somebody else stands in already
        return False
    taken = inspect.signature(block.forward).parameters
    known = {"past_key_values", "position_embeddings", "attention_mask"} <= set(taken)
    drops = getattr(attention, "attention_dropout", 0.0) or any(
        isinstance(module, nn.Dropout) and module.p for module in block.modules()
    )
    routed = any(name.rpartition(".")[2] in ROUTERS for name, _ in block.named_modules())
    return known and not drops and not routed


def _constant_columns(core: Any, input_ids: Tensor) -> int:
    """The columns before the first token, in any row, whose embedding learns; 0 where images come after it.

    Never all columns: the embeddings are then still a part of the pass, with gradients of zero (DDP, AdamW).
    """
    config = core.config
    learned = (input_ids == config.think_end_id) | (input_ids == config.ref_token_id)  # (B, T)
    image = input_ids == config.image_token_id
    found = torch.stack([learned.any(0), image.any(0)]).cpu()  # (2, T), one wait for the device
    last = input_ids.shape[1] - 1
    first = min(int(found[0].int().argmax()), last) if found[0].any() else last
    return 0 if found[1, first:].any() else first


class _Keys:
    """Keys and values of the first columns, as a block hands them to its cache."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.kept is None:
            self.kept = keys, values
            return keys, values
        return torch.cat([self.kept[0], keys], -2), torch.cat([self.kept[1], values], -2)


@contextmanager
def _in_two(block: Any, columns: int) -> Iterator[None]:
    """While open, the block's forward is made in two parts. What is checkpointed is both, and keeps its input alone."""
    whole = block.forward
    plain = partial(getattr(type(block).forward, "__wrapped__", type(block).forward), block)  # without checkpointing

    def parts(first: dict[str, Any], last: dict[str, Any], hidden_states: Tensor) -> Any:
        keys = _Keys()
        with torch.no_grad():
            before = plain(hidden_states[:, :columns], **first, past_key_values=keys)
        after = plain(hidden_states[:, columns:], **last, past_key_values=keys)
        if isinstance(after, tuple):
            return torch.cat([before[0], after[0]], 1), *after[1:]
        return torch.cat([before, after], 1)

    def forward(hidden_states: Tensor, *unnamed: Any, **inputs: Any) -> Any:
        cut = None if unnamed else _cut(hidden_states, inputs, columns)
        if cut is None:
            return whole(hidden_states, *unnamed, **inputs)
        if getattr(block, "gradient_checkpointing", False) and block.training:
            return block._gradient_checkpointing_func(partial(parts, *cut), hidden_states)
        return parts(*cut, hidden_states)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _cut(hidden: Tensor, inputs: dict[str, Any], columns: int) -> tuple[dict, dict] | None:
    """A block's other inputs for the columns before and from `columns`; None where they cannot be cut."""
    length, mask = hidden.shape[1], inputs.get("attention_mask")
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        return None
    others = {name: value for name, value in inputs.items() if name not in TAKEN}
    if any(isinstance(value, Tensor) for value in others.values()):
        return None
    if mask is None:  # causal, nothing is padding
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask.shape[-2:] != (length, length):
        return None
    parts = []
    for part in (slice(None, columns), slice(columns, None)):
        cut: dict[str, Any] = {**others, "attention_mask": mask[..., part, : part.stop]}
        if inputs.get("position_ids") is not None:
            cut["position_ids"] = inputs["position_ids"][..., part]
        if inputs.get("position_embeddings") is not None:
            cut["position_embeddings"] = tuple(angle[..., part, :] for angle in inputs["position_embeddings"])
        parts.append(cut)
    return parts[0], parts[1]
