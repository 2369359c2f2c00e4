"""The one image reader: every way in gives the same pixels, and what cannot be read is named."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from segcompass.modeling_segcompass.images import read_image, upright, upright_size
from tests.support.scripted import noise_image

IMAGE = noise_image(30, 44)


def png(image=IMAGE, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


WAYS_IN = {
    "path": lambda path: path,
    "text": lambda path: str(path),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "bytes": lambda path: path.read_bytes(),
    "row with bytes": lambda path: {"bytes": path.read_bytes(), "path": None},
    "row with a path": lambda path: {"bytes": None, "path": str(path)},
    "opened": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_gives_the_same_pixels(tmp_path, way):
    (tmp_path / "a.png").write_bytes(png())
    image = read_image(WAYS_IN[way](tmp_path / "a.png"))
    assert image.mode == "RGB" and (np.asarray(image) == np.asarray(IMAGE)).all()


def test_grey_images_and_arrays_become_rgb():
    grey = IMAGE.convert("L")
    for given in (grey, np.asarray(grey)):
        assert (np.asarray(read_image(given)) == np.asarray(grey)[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_as_their_orientation_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = png(exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    upright_image = read_image(content)
    assert upright_size(content) == upright_size(tmp_path / "a.png") == upright_image.size[::-1]
    assert (np.asarray(upright(Image.open(tmp_path / "a.png"))) == np.asarray(upright_image)).all()
    assert (upright_image.size == IMAGE.size) == (orientation < 5)
    assert (np.asarray(upright_image) == np.asarray(IMAGE)).all() if orientation == 1 else True


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nowhere.png", OSError, r"image 3 \('nowhere\.png'\) cannot be read as an image"),
        (b"no image" * 100_000, OSError, r"image 3 \(800000 bytes\) cannot be read as an image"),
        ({"bytes": None, "path": None}, OSError, "cannot be read as an image"),
        (png()[:200], OSError, "cannot be read as an image"),
        (b"", OSError, "cannot be read as an image: it is empty"),
        (b"\0\0\0\x18ftypheic" + bytes(99), OSError, "it is HEIC, a phone's format .* save it as JPEG or PNG"),
        (Image.new("RGB", (0, 5)), ValueError, "image 3 is empty .*at least 1x1 pixels"),
        (np.zeros((5, 0, 3), np.uint8), ValueError, "image 3 is empty .*at least 1x1 pixels"),
        (np.zeros((6, 5, 5)), ValueError, r"image 3 has shape \(6, 5, 5\) and dtype float64; give numbers of shape"),
    ],
)
def test_what_cannot_be_read_is_named(given, error, message):
    with pytest.raises(error, match=message) as caught:
        read_image(given, "image 3")
    assert len(str(caught.value)) < 1000


def test_files_that_are_no_images_have_no_size(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.jpg'\) cannot be read"):
        upright_size(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"the image \(5 bytes\) cannot be read"):
        upright_size(b"12345")
