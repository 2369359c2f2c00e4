"""Whether a weights file can be what was saved: its safetensors header fits it, and its numbers are finite.

Knows nothing about models; a manifest says whether the bytes are the ones that were written (`manifest`).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

HEADER_LIMIT = 100_000_000
"""Bytes of a header at most, as the format says."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of the format's dtypes."""


def check_safetensors(folder: str | os.PathLike) -> None:
    """Check the header of every safetensors file in a folder, and that the shards hold what their index says.

    Args:
        folder: the folder; files below it are not looked at.

    Raises:
        ValueError: a file, which is named, is cut, or its header does not fit it or the index.
    """
    folder = Path(folder)
    names = {path.name: tensor_names(path) for path in sorted(folder.glob("*.safetensors"))}
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            wrong = [f"{name} in {file}" for name, file in places.items() if file in names and name not in names[file]]
            outside = [file for file in places.values() if Path(file).name != file]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is no index of weights ({error!r}); fetch or copy the folder again.") from error
        if outside:
            raise ValueError(
                f"{path} names {outside[0]!r}, which is no file of its folder; fetch or copy the folder again."
            )
        if wrong:
            raise ValueError(
                f"{path} names {len(wrong)} tensors that are not where it says ({', '.join(wrong[:3])}); fetch or copy "
                "the folder again."
            )


def tensor_names(path: str | os.PathLike) -> list[str]:
    """The names of a safetensors file's tensors, after its header was checked; the tensors themselves are not read.

    Args:
        path: the file.

    Returns:
        Names, in the header's order.

    Raises:
        ValueError: the file is cut, or its header is no JSON, names a tensor twice, or has offsets, shapes or dtypes
            that do not fit the file.
    """
    return list(_header(path))


def check_types(module: nn.Module, folder: str | os.PathLike) -> None:
    """Refuse files that hold whole numbers where the module has real ones: they would be taken for weights.

    Args:
        module: the module that was loaded.
        folder: the folder that it was loaded from; names that the module does not have are not looked at.

    Raises:
        ValueError: with the file and the first tensor.
    """
    state = module.state_dict()
    for path in sorted(Path(folder).glob("*.safetensors")):
        wrong = [
            name
            for name, field in _header(path).items()
            if field["dtype"][0] in "IUB" and field["dtype"] != "BF16" and name in state
            if state[name].is_floating_point()
        ]
        if wrong:
            raise ValueError(
                f"{path} holds whole numbers in {len(wrong)} tensors of real ones ({', '.join(wrong[:3])}); fetch or "
                "copy the folder again."
            )


def _header(path):
    """The fields of a safetensors file's header by tensor, checked. Raises ValueError as `tensor_names`."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise _broken(path, f"it has {size} bytes, and its header is said to have {length}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)
        header.pop("__metadata__", None)
        spans = sorted((*map(int, field["data_offsets"]), name) for name, field in header.items())
        end = 0
        for start, stop, name in spans:
            dtype, shape = header[name]["dtype"], header[name]["shape"]
            if dtype not in BITS or not all(isinstance(side, int) and side >= 0 for side in shape):
                raise _broken(path, f"{name!r} has dtype {dtype!r} and shape {shape}")
            if start != end or (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
                raise _broken(path, f"{name!r}, {dtype} {shape}, cannot lie at bytes {start} to {stop}")
            end = stop
    except (
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        RecursionError,
        json.JSONDecodeError,
        _TwiceError,
    ) as error:
        raise _broken(path, f"its header cannot be read: {error!r}") from error
    if end != size - 8 - length:
        raise _broken(path, f"its tensors take {end} bytes, but {size - 8 - length} are there")
    return header


@torch.no_grad()
def check_finite(module: nn.Module, source: Any) -> None:
    """Refuse NaN and infinity in a module's weights; what has no numbers yet (the meta device) is left out.

    Args:
        module: the module.
        source: where its weights came from, for the error.

    Raises:
        ValueError: a weight is not finite; the first is named, with how many there are.
    """
    # Least and greatest are NaN where any element is; one pass without memory, 20 times as fast as `isfinite`.
    wrong = [
        name
        for name, weight in module.state_dict().items()
        if torch.is_tensor(weight)
        and weight.is_floating_point()
        and weight.element_size() > 1
        and not weight.is_meta
        and weight.numel()
        and not torch.stack(weight.aminmax()).isfinite().all()
    ]
    if wrong:
        raise ValueError(
            f"{with_files(source)} holds NaN or infinity in {len(wrong)} tensors ({', '.join(wrong[:3])}); fetch or "
            "copy the weights again, or take a checkpoint from before training diverged."
        )


def with_files(source: Any) -> Any:
    """A folder with the names of its weights files, one of which is at fault; anything else as it is."""
    names = sorted(path.name for path in Path(str(source)).glob("*.safetensors"))
    return f"{source} ({', '.join(names[:3])})" if names else source


class _TwiceError(ValueError):
    """A key that stands twice in a JSON object."""


def _each_once(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError("a key stands twice")
    return found


def _broken(path, why):
    return ValueError(f"{path} is damaged or no safetensors file: {why}. Nothing was loaded; fetch or copy it again.")
