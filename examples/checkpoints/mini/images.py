"""The one image reader: whatever an image comes as becomes RGB pixels, or an error that names it.

Knows nothing about models. PIL is imported in functions, because the served folder imports torch, transformers and
numpy alone.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from transformers.image_utils import load_image


def read_image(image: Any, name: str = "the image") -> Any:
    """Read an image in any form in which people and data sets hold one.

    Args:
        image: a PIL image; a path, a URL or base64 text, as transformers' `load_image` reads them; the bytes of an
            image file; {"bytes", "path"}, as `datasets.Image(decode=False)` gives it, the path being used when there
            are no bytes; or a uint8 array (H, W, 3) or (H, W). Files are turned as their EXIF orientation says; PIL
            images are taken as they are.
        name: what errors call it.

    Returns:
        PIL image of mode "RGB".

    Raises:
        OSError: a file, URL or bytes that cannot be read as an image.
        ValueError: an image without pixels, or an array of another form.

    Example:
        >>> read_image(np.zeros((2, 3), np.uint8)).size
        (3, 2)
    """
    source = image
    if isinstance(image, Mapping):
        source = image["bytes"] if image.get("bytes") else image.get("path")
    if hasattr(source, "shape"):
        source = _from_array(source, name)
    elif not hasattr(source, "convert"):
        source = _from_file(source, name)
    if 0 in source.size:
        raise ValueError(f"{name} is empty (size {source.size}); give at least 1x1 pixels.")
    return source if source.mode == "RGB" else source.convert("RGB")


def upright(image: Any) -> Any:
    """A PIL image turned as its EXIF orientation says; the same object when it stands upright already."""
    from PIL import ExifTags, ImageOps

    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def upright_size(file: Any) -> tuple[int, int]:
    """The size of an image file turned as its EXIF orientation says, read from its header alone.

    Args:
        file: a path, or the bytes of a file.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: the file is no readable image.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            quarter_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if quarter_turned else (image.height, image.width)
    except OSError as error:
        shown = f"of {len(file)} bytes" if isinstance(file, bytes) else file
        raise ValueError(f"the image {shown} cannot be read: {error}.") from error


def _from_array(array, name):
    from PIL import Image

    if 0 in array.shape:
        raise ValueError(f"{name} is empty (shape {tuple(array.shape)}); give at least 1x1 pixels.")
    try:
        return Image.fromarray(array)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)} and dtype {array.dtype}; give a uint8 array (H, W, 3) or (H, W)."
        ) from error


def _from_file(source, name):
    """A decoded and upright PIL image from a path, URL, base64 text or bytes."""
    from PIL import Image

    try:
        if isinstance(source, bytes):
            return load_image(Image.open(BytesIO(source)))
        return load_image(source if isinstance(source, str) else str(source))
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise OSError(f"{name} ({_shown(source)}) cannot be read as an image: {str(error)[:300]}") from error


def _shown(source) -> str:
    """A source in an error: never a whole file."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))[:200]
