"""The key-value cache with room is transformers' own in what it keeps, whatever is done to it between two tokens."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from segcompass.modeling_segcompass.roomy_cache import ROOM, RoomyLayer
from tests.support.operators import OperatorsCalled

CHANGES = {
    "nothing": lambda layer: None,
    "cut": lambda layer: layer.crop(-3),
    "rows chosen": lambda layer: layer.batch_select_indices(torch.tensor([1, 1, 0])),
    "rows repeated": lambda layer: layer.batch_repeat_interleave(2),
    "rows reordered": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_what_transformers_keeps(change):
    ours, theirs = RoomyLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    rows = 2
    for step, count in enumerate((7, 1, 1, ROOM + 3, 1, 1)):
        new = [torch.randn(rows, 3, count, 4, generator=generator) for _ in range(2)]
        for got, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, wanted)
        if step in (1, 3):
            for layer in (ours, theirs):
                CHANGES[change](layer)
            rows = len(theirs.keys)
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_one_more_token_is_written_where_the_others_lie():
    layer = RoomyLayer()
    layer.update(*torch.zeros(2, 1, 2, 7, 8).unbind())
    place = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(*torch.ones(2, 1, 2, 1, 8).unbind())
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 7 + ROOM


def test_one_more_token_takes_one_copy_each_of_keys_and_values():
    """Views of what is kept are made with the room: later a GPU waits for each of Python's operations."""
    layer, more = RoomyLayer(), torch.ones(2, 1, 2, 1, 8).unbind()
    layer.update(*torch.zeros(2, 1, 2, 7, 8).unbind())
    with torch.no_grad(), OperatorsCalled() as called:
        for _ in range(ROOM):
            layer.update(*more)
    assert called.times == {"copy_": 2 * ROOM}
    assert layer.keys[0, 0, :, 0].tolist() == [0] * 7 + [1] * ROOM


def test_what_was_handed_out_is_not_overwritten_after_a_cut():
    layer = RoomyLayer()
    layer.update(*torch.zeros(2, 1, 2, 7, 8).unbind())
    handed, _ = layer.update(*torch.ones(2, 1, 2, 1, 8).unbind())
    layer.crop(-1)
    layer.update(*torch.full((2, 1, 2, 1, 8), 2.0).unbind())
    assert handed[0, 0, -1, 0] == 1 and layer.keys[0, 0, -1, 0] == 2
