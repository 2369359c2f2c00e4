"""The one image reader: whatever an image comes as becomes RGB pixels, or an error that names it.

| an image comes as | read as |
|---|---|
| path, bytes, open file, base64 text, data: URL, http(s) address | the file's first frame, upright |
| `{"bytes", "path"}`, as `datasets.Image(decode=False)` gives it | the bytes; the path where there are none |
| PIL image | its current frame, upright |
| array or tensor (H, W), (H, W, 1 to 4) or (1, 3 or 4, H, W) of bool, integers, floats in [0, 1] | as it is |

Upright: turned as the EXIF orientation says, whatever the way in. Transparency is dropped: the colours stored under it
are taken, as transformers takes them. 16 bits lose their lower 8, as in Pillow. docs/data.md has the whole table with
what is refused; a test reads it row by row.

Knows nothing about models. PIL is imported in functions, because the served folder imports torch, transformers and
numpy alone.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

from .web_images import fetch

MAX_PIXELS = 178_956_970
"""Images of more pixels are refused before they are decoded: Pillow's own limit for files, held here for every form."""

_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


def read_image(image: Any, name: str = "the image") -> Any:
    """Read an image in any form in which people and data sets hold one; the module's docstring has the table.

    Args:
        image: a path, bytes, an open file, base64 text, an http(s) address, {"bytes", "path"}, a PIL image, an array or
            a tensor.
        name: what errors call it.

    Returns:
        PIL image of mode "RGB".

    Raises:
        OSError: a file, address or bytes that cannot be read as an image.
        ValueError: no pixels, too many, values or a layout that could mean several things, or a broken EXIF block.

    Example:
        >>> read_image(np.zeros((2, 3), np.uint8)).size
        (3, 2)
    """
    from PIL import Image

    source = image
    if isinstance(image, Mapping):
        source = image["bytes"] if image.get("bytes") is not None else image.get("path")
        if source is None:
            raise OSError(f"{name} cannot be read as an image: it has neither 'bytes' nor 'path', but {sorted(image)}.")
    if isinstance(source, Image.Image):
        return _to_rgb(source, name, "a PIL image")
    if not isinstance(source, memoryview) and (hasattr(source, "shape") or hasattr(source, "__array_interface__")):
        return _from_array(source, name)
    if hasattr(source, "convert") and hasattr(source, "mode"):
        return _to_rgb(source, name, "a PIL image")
    opened, shown = _open(source, name)
    read = _to_rgb(opened, name, shown)
    if getattr(opened, "fp", None) is not None:  # a file of several frames stays open
        read = read.copy() if read is opened else read
        opened.close()
    return read


def upright(image: Any, name: str = "the image") -> Any:
    """A PIL image turned as its EXIF orientation says.

    Args:
        image: a PIL image.
        name: what errors call it.

    Returns:
        A PIL image; the same object when it stands upright already.

    Raises:
        ValueError: a broken EXIF block, which does not say how the image stands.
    """
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) if _orientation(image, name) != 1 else image


def upright_size(file: Any, name: str = "") -> tuple[int, int]:
    """The size of an image file turned as its EXIF orientation says, read from its header alone.

    Args:
        file: a path, or the bytes of a file.
        name: what errors call it; "" calls it by its path.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: the file is no readable image, has a broken EXIF block, or more than `MAX_PIXELS` pixels.
    """
    name = name or "the image"
    try:
        image, shown = _open(file, name)
    except OSError as error:
        raise ValueError(str(error)) from error
    with image:
        _check_size(image.size, f"{name} ({shown})")
        quarter_turned = _orientation(image, f"{name} ({shown})") >= 5
        return (image.width, image.height) if quarter_turned else (image.height, image.width)


def file_content(source: Any, name: str) -> Any:
    """What `PIL.Image.open` takes: a path or an open file of the bytes.

    Args:
        source: a path, bytes, an open file, base64 text, a data: URL or an http(s) address.
        name: what errors call it.

    Returns:
        A path, or a BytesIO.

    Raises:
        OSError: no such file, or no answer.
        ValueError: nothing of these, or an address that is not followed.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source)
    if hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise ValueError(f"{name} is a file opened as text; open it in mode 'rb'.")
        return BytesIO(content)
    if isinstance(source, str):
        if re.match(r"https?://", source, re.IGNORECASE):
            try:
                return BytesIO(fetch(source))
            except OSError as error:
                raise OSError(f"{name} ({_shown(source)}) cannot be read as an image: {str(error)[:300]}") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if source.startswith("data:"):
            return BytesIO(_from_base64(source.partition(",")[2], name))
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
            raise ValueError(f"{name} is {source[:200]!r}; addresses are read from http and https alone: give a path.")
    elif not isinstance(source, os.PathLike):
        raise ValueError(
            f"{name} is a {type(source).__name__}; give a PIL image, a path, bytes, an http(s) address, an array "
            "(H, W, 3) or a tensor (3, H, W)."
        )
    try:
        is_file, is_there = os.path.isfile(source), os.path.exists(source)
    except ValueError:  # a null byte
        is_file = is_there = False
    if is_file:
        return os.fspath(source)
    if is_there:
        raise OSError(f"{name} ({_shown(source)}) cannot be read as an image: it is no regular file.")
    if isinstance(source, str) and len(source) > 60:
        try:
            return BytesIO(_from_base64(source, name))
        except OSError:
            pass
    raise FileNotFoundError(f"{name} ({_shown(source)}) cannot be read as an image: there is no such file.")


def _open(source, name):
    """(an opened PIL image, how errors show its source). Raises OSError or ValueError."""
    from PIL import Image

    content, shown = file_content(source, name), _shown(source)
    try:
        return Image.open(content), shown
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} ({shown}) has too many pixels: {error!s:.200} The limit is {MAX_PIXELS:,}; make it smaller."
        ) from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise OSError(f"{name} ({shown}) cannot be read as an image: {_why(content, error)}") from error


def _why(content, error) -> str:
    """Why a file is no image that Pillow reads, in a user's words where its first bytes say it."""
    if hasattr(content, "getvalue"):
        head = content.getvalue()[:12]
    else:
        with open(content, "rb") as file:
            head = file.read(12)
    if not head:
        return "it is empty."
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "it is HEIC, a phone's format that Pillow does not read; save it as JPEG or PNG."
    return str(error)[:300]


def _to_rgb(image, name, shown):
    """A PIL image -> an upright PIL image of mode RGB. Raises OSError or ValueError."""
    _check_size(image.size, name)
    try:
        image.load()
    except Exception as error:
        raise OSError(f"{name} ({shown}) cannot be read as an image: {str(error)[:300]}") from error
    image = upright(image, f"{name} ({shown})")
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return _from_array(np.asarray(image), f"{name} (mode {image.mode})")
    if image.mode not in _COLOUR_MODES:
        raise ValueError(f"{name} has mode {image.mode!r}, which has no known colours; convert it to 'RGB'.")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def _from_array(given, name):
    """An array or a tensor -> a PIL image of mode RGB. Raises ValueError."""
    from PIL import Image

    try:
        if hasattr(given, "detach"):  # a tensor of torch, wherever it lies
            given = given.detach().cpu()
            given = given.float() if str(given.dtype) == "torch.bfloat16" else given
        array = np.asarray(given)
    except Exception as error:
        raise ValueError(f"{name} is a {type(given).__name__} that numpy cannot read: {str(error)[:300]}") from error
    if np.ma.is_masked(given):
        raise ValueError(f"{name} is an array of which some values are masked; fill them first (array.filled(0)).")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty (shape {array.shape}); give at least 1x1 pixels.")
    if array.ndim == 3:
        last, first = array.shape[2] in (1, 2, 3, 4), array.shape[0] in (1, 3, 4)
        if last and first:
            raise ValueError(
                f"{name} has shape {array.shape}, in which the colours could come first or last; give a PIL image."
            )
        array = array if last or not first else np.moveaxis(array, 0, 2)  # (H, W, channels)
    if array.dtype.kind not in "buif" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] <= 4)):
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; give numbers of shape (H, W), (H, W, 1 to 4) or "
            "(1, 3 or 4, H, W), such as a uint8 array (H, W, 3)."
        )
    _check_size(array.shape[1::-1], name)
    if array.ndim == 3:  # without transparency
        array = array[..., : 1 if array.shape[2] <= 2 else 3]
        array = array[..., 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, name))).convert("RGB")


def _eight_bits(array, name):
    """Values as uint8. Raises ValueError where they could mean several things."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    low, high = array.min().item(), array.max().item()  # NaN if there is one
    if array.dtype.kind == "f":
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"{name} has {array.dtype} values from {low:g} to {high:g}; floats must be finite and from 0 to 1. "
                "Divide by the largest possible value, or give uint8."
            )
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        if 0 < high <= 255:
            raise ValueError(
                f"{name} has 16-bit values up to {high} only, which could also be 8-bit ones; give uint8 if they are."
            )
        return (array >> 8).astype(np.uint8)
    if low < 0 or high > 255 or high == 1:
        raise ValueError(
            f"{name} has {array.dtype} values from {low} to {high}; give uint8 from 0 to 255, or bool for black and "
            "white."
        )
    return array.astype(np.uint8)


def _orientation(image, name):
    """The EXIF orientation, 1 to 8. Raises ValueError when the block cannot be read."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception as error:  # Pillow's reader raises many kinds
        raise ValueError(
            f"{name} has a broken EXIF block, which does not say how the image stands ({str(error)[:200]}); save it "
            "again without EXIF."
        ) from error
    return orientation if orientation in (2, 3, 4, 5, 6, 7, 8) else 1


def _check_size(size, name):
    """Raises ValueError for an image without pixels or with too many."""
    width, height = size
    if 0 in size:
        raise ValueError(f"{name} is empty (size {tuple(size)}); give at least 1x1 pixels.")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels; the limit is {MAX_PIXELS:,}: make it smaller.")


def _from_base64(text, name):
    """The bytes that base64 text stands for. Raises OSError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise OSError(f"{name} ({_shown(text)}) cannot be read as an image: no base64 text ({error}).") from error


def _shown(source) -> str:
    """A source in an error: never a whole file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        return type(source).__name__
    text = str(source)
    return repr(text) if len(text) <= 200 else f"{text[:80]!r}... of {len(text)} characters"
