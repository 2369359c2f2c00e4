"""NaN and infinity are errors that say where: which tensor, which sample, which token, and which weight is to blame.

Knows nothing about what the tensors mean.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def refuse_non_finite(
    named: Mapping[str, Any], module: nn.Module | None = None, token_mask: torch.Tensor | None = None
) -> None:
    """Raise if a tensor holds NaN or infinity. Does nothing while torch compiles or exports.

    Args:
        named: tensors (B, ...) by name; None and whole numbers are passed over.
        module: whose weights may be the cause.
        token_mask: (B, T), nonzero at the tokens to look at, for tensors (B, T, d); None looks at everything.

    Raises:
        ValueError: which tensor, sample and token, and the weight that is to blame, if one is.
    """
    if torch.compiler.is_compiling():
        return
    values = {
        name: value.detach()
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() and not value.is_meta
    }
    if not values or _all_finite(list(values.values())):
        return
    for name, value in values.items():
        where = _wrong(value, token_mask)
        if where.any():  # else it is at tokens that are not to be looked at
            place = where.nonzero()[0].tolist()
            token = f", token {place[1]}" if len(place) > 1 else ""
            raise ValueError(f"{name}: sample {place[0]}{token} holds NaN or infinity; {_cause(module, named[name])}")


def _all_finite(values):
    """Whether nothing is NaN or infinite: few operations and one wait for the device, as each written token asks."""
    doubts = [(value - value).sum() for value in values]  # 0 - 0 for what is finite, else NaN
    return (sum(doubt.to(doubts[0].device) for doubt in doubts) == 0).item()


def _wrong(value, token_mask):
    """Where something is not finite: bool (B,), or (B, T) with a token mask."""
    if value.dim() == 0:
        value = value[None]
    wrong = ~value.isfinite()
    if token_mask is None:
        return wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
    return wrong.flatten(2).any(2) & (token_mask != 0)


def _cause(module, value):
    weights = () if module is None else module.state_dict(keep_vars=True).items()
    for name, weight in weights:
        if weight.is_floating_point() and not weight.is_meta and not weight.detach().isfinite().all():
            return f"the weight {name} does so too: load or train the model anew."
    if value.dtype == torch.float16:
        return "no input or weight need be wrong, float16 ends at 65504: use bfloat16 or float32."
    return "no answer can be made of it: look at what was given to the model, and at its weights."
