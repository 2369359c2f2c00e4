"""A key-value cache with room for tokens to come: one more token does not copy all that came before it.

transformers' own grows by concatenation, once for each token and layer, which for many rows and long prompts costs as
much as computing the token. What is kept, and what attention reads, is the same.
"""

import inspect
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens for which room is made at once."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, as views of larger tensors.

    Example:
        layer = RoomyLayer()
        keys, values = layer.update(torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7, 8))  # 7 tokens
        keys, values = layer.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))  # 8, and only one is copied
    """

    def __init__(self):
        super().__init__()
        self._rooms: dict[str, tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens.

        Args:
            key_states: float (B, heads, t, width).
            value_states: likewise.
            *args: transformers', unused.
            **kwargs: likewise.

        Returns:
            tuple: keys and values of all tokens, (B, heads, T, width).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._added("keys", self.keys, key_states)
        self.values = self._added("values", self.values, value_states)
        return self.keys, self.values

    def _added(self, name, kept, new):
        free, given = self._rooms.get(name, ([], None))
        # whoever cuts, chooses or reorders rows leaves tensors of their own
        if free and kept is given and new.shape[-2] == 1:
            place, kept = free.pop()
            place.copy_(new)
        else:
            free, kept = _room(kept, new)
        self._rooms[name] = free, kept
        return kept


def _room(kept, new):
    """Room for ROOM tokens more: where each will lie and what is then kept, the next one last; and what is kept now.

    All these views are made at once, when a prompt is read: a GPU is then busy for long, while later it waits for
    Python at each token and layer.
    """
    start = kept.shape[-2] if kept.numel() else 0
    end = start + new.shape[-2]
    room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
    if start:
        room[..., :start, :] = kept
    room[..., start:end, :] = new
    kept = [
        room.as_strided((*room.shape[:-2], tokens, room.shape[-1]), room.stride())  # faster than a slice
        for tokens in range(end, end + ROOM + 1)
    ]
    places = room[..., end:, :].split(1, dim=-2)
    return list(zip(places, kept[1:], strict=True))[::-1], kept[0]


def roomy_cache(mllm: Any) -> dict[str, DynamicCache]:
    """An empty cache for an MLLM's `generate`.

    Args:
        mllm: transformers' model.

    Returns:
        {name of the argument: cache}; {} where this MLLM needs a cache of another kind.
    """
    cache = DynamicCache(config=mllm.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [RoomyLayer() for _ in cache.layers]
    taken = inspect.signature(mllm.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache}  # renamed in transformers 5.24
