"""A weights file whose header does not fit it, and numbers that are not finite, are errors that name file or tensor."""

import json
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from segcompass.modeling_segcompass.weights import check_finite, check_safetensors, tensor_names

TENSORS = {"a": torch.randn(3, 5), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(7), "d": torch.ones(0)}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def with_header(path, change):
    """The file with its header changed by a function of the parsed one."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    text = change(header)
    text = json.dumps(header) if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + whole[8 + length :])


def test_a_whole_file_names_its_tensors(path):
    assert sorted(tensor_names(path)) == sorted(TENSORS)
    check_safetensors(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(data_offsets=[0, 56]),
        lambda header: header["a"].update(shape=[3, 6]),
        lambda header: header["a"].update(shape=[3, -5]),
        lambda header: header["a"].update(dtype="F99"),
        lambda header: header["a"].update(dtype="F16"),
        lambda header: header["a"].pop("dtype") and None,
        lambda header: header.pop("a") and None,
        lambda header: header.update(e=header["a"]),
        lambda header: json.dumps(header)[:-1] + ', "a": ' + json.dumps(header["a"]) + "}",
        lambda header: "[1, 2]",
        lambda header: json.dumps(header)[:-3],
    ],
)
def test_a_header_that_does_not_fit_is_an_error_that_names_the_file(path, change):
    with_header(path, change)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        check_safetensors(path.parent)


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_cut_file_is_an_error_that_names_it(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        check_safetensors(path.parent)


def test_whatever_the_safetensors_library_refuses_is_refused(path):
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    numbers = random.Random(0)
    refused = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[numbers.randrange(8 + length)] ^= 1 << numbers.randrange(8)
        path.write_bytes(flipped)
        try:
            with safe_open(path, "pt") as file:
                theirs = sorted(file.keys())
        except SafetensorError:
            refused += 1
            with pytest.raises(ValueError, match="model.safetensors"):
                tensor_names(path)
        else:
            try:
                assert sorted(tensor_names(path)) == theirs
            except ValueError as error:
                assert "model.safetensors" in str(error)  # we may refuse more, such as an unknown metadata type
    assert refused > 100


def test_shards_must_hold_what_the_index_says(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    check_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": places["b"], "b": places["a"]}}))
    with pytest.raises(ValueError, match="index.json names 2 tensors that are not where it says"):
        check_safetensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_an_error_that_names_the_tensor(dtype, value):
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)
    check_finite(module, "here")
    with torch.no_grad():
        module[1].weight[2, 4] = value
    with pytest.raises(ValueError, match="here holds NaN or infinity in 1 tensors.*1.weight"):
        check_finite(module, "here")


def test_weights_without_numbers_are_left_out():
    check_finite(nn.Linear(3, 4, device="meta"), "here")
    module = nn.Module()
    module.register_buffer("ids", torch.arange(3))
    module.register_buffer("nothing", torch.ones(0))
    check_finite(module, "here")
