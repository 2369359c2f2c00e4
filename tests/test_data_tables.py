"""Each row of the tables of docs/data.md, tried: read right, or refused by name."""

import base64
import io
import json
import math
import os
import re
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from segcompass.loaders import load_jsonl
from segcompass.loaders.jsonl_checks import READ_IF_THERE, TEXTS
from segcompass.loaders.masks import decode_mask, encode_mask, has_pixels, read_mask, read_polygons
from segcompass.modeling_segcompass.images import MAX_PIXELS, read_image
from tests.support.tiny import tiny_processor

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
HEIGHT, WIDTH = 20, 30
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RGB[..., 0]
INSIDE = np.zeros((HEIGHT, WIDTH), bool)
INSIDE[5:10, 5:15] = True


def rows_of(header):
    """The first cells of the table whose header begins with this."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append(line.split("|")[1].strip())
    return rows


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture = picture if hasattr(picture, "save") else Image.fromarray(picture)
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, 2)


# -- images ------------------------------------------------------------------------------------------------------------


def feature(content):
    rows = datasets.Dataset.from_list([{"image": {"bytes": content, "path": None}}])
    return rows.cast_column("image", datasets.Image())[0]["image"]


def oriented():
    """Stored in such a way that a quarter turn clockwise (6) or back (8), or a half turn (3), gives RGB."""
    for orientation, stored in ((6, np.rot90(RGB)), (8, np.rot90(RGB, -1)), (3, np.rot90(RGB, 2))):
        content = saved(np.ascontiguousarray(stored), exif=exif(orientation))
        for image in (content, Image.open(io.BytesIO(content)), feature(content), {"bytes": content, "path": None}):
            yield image, RGB


def frames():
    second = Image.fromarray(255 - RGB)
    for kind in ("PNG", "TIFF"):
        content = saved(RGB, kind, save_all=True, append_images=[second])
        assert Image.open(io.BytesIO(content)).n_frames == 2
        yield content, RGB
    black_and_white = Image.fromarray(INSIDE)
    yield saved(black_and_white, "GIF", save_all=True, append_images=[second]), grey(INSIDE * 255)


def converted():
    for mode in ("1", "L", "CMYK", "YCbCr", "HSV"):
        picture = Image.fromarray(RGB).convert(mode)
        yield picture, np.asarray(picture.convert("RGB"))
    palette = Image.fromarray(RGB).quantize(16)
    yield saved(palette), np.asarray(palette.convert("RGB"))


def transparent():
    alpha = np.where(INSIDE, 255, 0).astype(np.uint8)
    yield saved(np.dstack([RGB, alpha])), RGB
    yield saved(Image.fromarray(np.dstack([GREY, alpha]), "LA")), grey(GREY)
    palette = Image.fromarray(RGB).quantize(16)
    yield saved(palette, transparency=bytes([0, 128, 255])), np.asarray(palette.convert("RGB"))


def sixteen():
    values = GREY.astype(np.uint16) * 256 + 77
    for given in (
        values,
        saved(values),
        Image.fromarray(values),
        torch.from_numpy(values.astype(np.int32)).to(torch.uint16),
    ):
        yield given, grey(GREY)


def floats():
    exact = torch.from_numpy(RGB.astype(np.float32) / 255)
    yield exact.numpy(), RGB
    yield exact.numpy().astype(np.float64), RGB
    yield exact.permute(2, 0, 1), RGB
    yield Image.fromarray(exact[..., 0].numpy()), grey(GREY)
    coarse = exact.to(torch.bfloat16)
    yield coarse, np.rint(coarse.float().numpy() * 255).astype(np.uint8)


def ways_in(folder):
    content, path = saved(RGB), folder / "a.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    return {
        "path, as text or PathLike": [(path, RGB), (str(path), RGB)],
        "bytes, bytearray or memoryview of a file": [(kind(content), RGB) for kind in (bytes, bytearray, memoryview)],
        'file opened in mode "rb"': [(path.open("rb"), RGB), (io.BytesIO(content), RGB)],
        "base64 text, data: URL": [(text, RGB), (f"data:image/png;base64,{text}", RGB)],
        '`{"bytes", "path"}` of an undecoded data set': [
            ({"bytes": content, "path": "gone.png"}, RGB),
            ({"bytes": None, "path": str(path)}, RGB),
        ],
        "decoded `datasets.Image` feature": [(feature(content), RGB)],
        "PIL image": [(Image.open(path), RGB), (Image.fromarray(RGB), RGB)],
        "EXIF orientation 2 to 8, in files and in PIL images": list(oriented()),
        "animated GIF, multi-page TIFF": list(frames()),
        "modes 1, L, P, CMYK, YCbCr, HSV": list(converted()),
        "modes RGBA, LA, P with transparency": list(transparent()),
        "mode I;16, uint16 array": list(sixteen()),
        "array (H, W), (H, W, 1)": [(GREY, grey(GREY)), (GREY[..., None], grey(GREY)), (GREY.T.copy().T, grey(GREY))],
        "array (H, W, 3), (H, W, 4), (H, W, 2)": [
            (RGB, RGB),
            (RGB[::-1], RGB[::-1]),
            (np.dstack([RGB, GREY]), RGB),
            (RGB[..., :2], grey(GREY)),
        ],
        "array or tensor (3, H, W), (1, H, W), (4, H, W)": [
            (RGB.transpose(2, 0, 1), RGB),
            (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
            (torch.from_numpy(GREY)[None].requires_grad_(False), grey(GREY)),
            (np.dstack([RGB, GREY]).transpose(2, 0, 1), RGB),
        ],
        "bool array, mode 1": [(INSIDE, grey(INSIDE * 255)), (torch.from_numpy(INSIDE), grey(INSIDE * 255))],
        "float array or tensor in [0, 1], mode F, bfloat16": list(floats()),
        "int64 array from 0 to 255": [(RGB.astype(np.int64), RGB), (torch.from_numpy(RGB).long(), RGB)],
    }


def test_every_accepted_image_is_read_right(tmp_path):
    ways = ways_in(tmp_path)
    assert [*ways, "four axes, given to the processor"] == rows_of("an image comes as")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for row, cases in ways.items():
            for image, pixels in cases:
                read = read_image(image)
                assert read.mode == "RGB" and np.array_equal(np.asarray(read), pixels), row
    processor = tiny_processor("llava")
    batch = np.stack([RGB, 255 - RGB])
    for given in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2)):
        inputs = processor(images=given, text=["x", "x"])
        expected = processor(images=[Image.fromarray(image) for image in batch], text=["x", "x"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["encoder_pixel_values"], expected["encoder_pixel_values"])


def refused_images(folder):
    huge = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(huge, "PNG")
    cut = saved(RGB, "JPEG", quality=95)[:900]
    broken = saved(RGB, exif=b"junkjunk")
    os.mkfifo(folder / "pipe")
    return {
        "(3, W, 3) and other arrays with a colour axis at both ends": [
            (np.zeros((3, 9, 3), np.uint8), "first or last")
        ],
        "five channels, one axis, text values": [
            (np.zeros((9, 9, 5), np.uint8), "give numbers of shape"),
            (np.zeros(9, np.uint8), "give numbers of shape"),
            (np.full((9, 9), "a"), "give numbers of shape"),
        ],
        "tensor without values, masked values of numpy": [
            (torch.empty(3, 9, 9, device="meta"), "is a Tensor that numpy cannot read"),
            (np.ma.masked_greater(RGB, 100), "some values are masked; fill them first"),
        ],
        "float values outside [0, 1], NaN": [
            (RGB.astype(np.float32), "from 0 to 255; floats must be finite and from 0 to 1"),
            (np.full((9, 9), np.nan), "must be finite"),
            (torch.randn(3, 9, 9), "must be finite"),
            (Image.fromarray(np.full((9, 9), 7, np.float32)), "must be finite"),
        ],
        "uint16 array with values up to 255": [
            (RGB.astype(np.uint16), "could also be 8-bit"),
            (saved(GREY.astype(np.uint16)), "8-bit"),
        ],
        "int64 array of 0 and 1, or below 0, or above 255": [
            (INSIDE.astype(np.int64), "bool for black and white"),
            (GREY.astype(np.int64) - 9, "from 0 to 255"),
            (GREY.astype(np.int32) * 9, "from 0 to 255"),
        ],
        "mode LAB": [(Image.new("LAB", (9, 9)), "mode 'LAB', which has no known colours")],
        "no pixels": [(np.zeros((0, 5, 3), np.uint8), "is empty"), (Image.new("RGB", (0, 5)), "is empty")],
        "more than 178,956,970 pixels, in any form": [
            (huge.getvalue(), "too many pixels"),
            (np.broadcast_to(np.uint8(0), (20_000, 10_000)), f"the limit is {MAX_PIXELS:,}"),
        ],
        "truncated or damaged file, bytes or lazily opened PIL image": [
            (cut, "cannot be read as an image"),
            (Image.open(io.BytesIO(cut)), "cannot be read as an image"),
            (os.urandom(1 << 20), "1048576 bytes. cannot be read"),
        ],
        "HEIC": [(b"\0\0\0\x18ftypheic" + bytes(99), "is HEIC, a phone's format that Pillow does not read")],
        "broken EXIF block": [(broken, "broken EXIF block"), (Image.open(io.BytesIO(broken)), "broken EXIF block")],
        "missing file, folder, device": [
            (folder / "gone.png", "no such file"),
            ("gone.png", "no such file"),
            (folder, "no regular file"),
            (folder / "pipe", "no regular file"),
            ("/dev/zero", "no regular file"),
        ],
        "file:// and other addresses than http(s)": [
            (f"file://{folder}/a.png", "from http and https alone"),
            ("ftp://example.org/a.png", "from http and https alone"),
        ],
        "address in a local network": [
            ("http://127.0.0.1:9/a.png", "lies in a local network"),
            ("http://[::1]:9/a.png", "lies in a local network"),
            ("http://169.254.169.254/latest/meta-data", "lies in a local network"),
            ("http://2130706433:9/a.png", "lies in a local network"),
        ],
        "dict without bytes and path, other objects": [
            ({"url": "x"}, "neither 'bytes' nor 'path'"),
            (None, "is a NoneType"),
            ([[1, 2]], "is a list"),
        ],
    }


def test_every_refused_image_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SEGCOMPASS_LOCAL_URLS", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refused = refused_images(tmp_path)
    assert list(refused) == rows_of("refused image")
    for row, cases in refused.items():
        for image, message in cases:
            with pytest.raises((ValueError, OSError), match=re.escape(message).replace(r"\.", ".")) as caught:
                read_image(image, "image 3 of the test")
            assert len(str(caught.value)) < 700, row
            assert "image 3 of the test" in str(caught.value), row


# -- masks -------------------------------------------------------------------------------------------------------------


def masks(folder):
    white = Image.fromarray(INSIDE.astype(np.uint8) * 255)
    values = np.where(INSIDE, 255, 0).astype(np.uint8)
    colour = np.dstack([values * 0, values // 2, values])
    palette = Image.fromarray(INSIDE.astype(np.uint8) * 3, "P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 9, 9, 9, 200, 0, 0])
    blocks = np.zeros((HEIGHT, WIDTH), bool)
    blocks[:8, 8:16] = True
    turned = saved(np.rot90(values).copy(), exif=exif(6))
    (folder / "m.png").write_bytes(saved(white))
    rle = encode_mask(INSIDE)
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(INSIDE.T.ravel().astype(int))))]
    runs = [INSIDE.T.ravel().argmax().item(), *runs]
    runs.append(HEIGHT * WIDTH - sum(runs))
    box, left, right = [5, 5, 15, 5, 15, 10, 5, 10], [5, 5, 9, 5, 9, 10, 5, 10], [9, 5, 15, 5, 15, 10, 9, 10]
    tall = np.zeros_like(INSIDE)
    tall[5:, 25:] = True
    return {
        "file of mode 1, L or I;16": [
            saved(INSIDE),
            saved(white),
            saved(values // 255),
            saved(values.astype(np.uint16) * 9),
        ],
        "file of mode RGB": [saved(colour), saved(white.convert("RGB"))],
        "file of mode RGBA or LA, opaque": [saved(white.convert("RGBA")), saved(white.convert("LA"))],
        "file of mode RGBA, white on transparent black": [saved(np.dstack([values] * 4))],
        "file of mode P whose number 0 is black": [saved(palette), saved(white.convert("P"))],
        "JPEG of exactly two values": [(saved(blocks.astype(np.uint8) * 255, "JPEG", quality=100), blocks)],
        'bytes, `{"bytes", "path"}`, PIL image': [
            {"bytes": saved(white), "path": None},
            {"bytes": None, "path": "m.png"},
            white,
            "m.png",
        ],
        "file with an EXIF orientation": [turned],
        "rows or array (H, W) of bool, 0 and 1, 0 and 255": [
            INSIDE.tolist(),
            INSIDE.astype(int).tolist(),
            values,
            INSIDE,
        ],
        "float array or tensor of 0.0 and 1.0": [INSIDE.astype(np.float32), torch.from_numpy(INSIDE).float()],
        "array (H, W, 1), (1, H, W), (H, W, 3) uint8": [INSIDE[..., None], torch.from_numpy(INSIDE)[None], colour],
        "RLE with a list of counts": [{"size": [HEIGHT, WIDTH], "counts": runs}],
        "compressed RLE, str or bytes": [rle, {**rle, "counts": rle["counts"].encode()}],
        "polygon [x0, y0, x1, y1, ...]": [("polygon", box)],
        "polygon [[x0, y0], [x1, y1], ...]": [("polygon", np.reshape(box, (4, 2)).tolist())],
        "list of polygons of one instance": [
            ("polygon", [left, right]),
            ("polygon", [np.reshape(left, (4, 2)).tolist(), np.reshape(right, (4, 2)).tolist()]),
        ],
        "polygon that reaches outside the image": [("polygon", [25, 5, 90, 5, 90, 70, 25, 70], tall)],
    }


def test_every_accepted_mask_is_read_right(tmp_path):
    ways = masks(tmp_path)
    assert list(ways) == rows_of("a mask comes as")
    for row, cases in ways.items():
        for case in cases:
            if isinstance(case, tuple) and case[0] == "polygon":
                _, polygon, expected = (*case, INSIDE)[:3]
                read = read_polygons(polygon, HEIGHT, WIDTH)
            else:
                given, expected = case if isinstance(case, tuple) else (case, INSIDE)
                read = read_mask(given, HEIGHT, WIDTH, tmp_path)
            assert np.array_equal(decode_mask([read], HEIGHT, WIDTH), expected), (row, case)


def refused_masks():
    values = np.where(INSIDE, 255, 0).astype(np.uint8)
    labels = values.copy()
    labels[0, 0] = 1
    inverted = Image.fromarray(1 - INSIDE.astype(np.uint8), "P")
    inverted.putpalette([255] * 3 + [0] * 765)
    full = np.full_like(values, 255)
    size = [HEIGHT, WIDTH]
    whole = encode_mask(INSIDE)["counts"]
    damaged = [
        whole[:-2],
        str(whole.encode()),
        "",
        "1 2 3",
        whole + "1",
        "o" * 50,
        "\x80" + whole,
        b"\xff\xfe",
        "P" * 99,
    ]
    damaged += [whole[:place] + chr(48 + place) + whole[place + 1 :] for place in range(4)]
    lists = [[], [600, 1], [-1, 601], [599.5, 0.5], ["600"], [[600]], [2**70], None, 600]
    sizes = [[0, 9], [-20, 30], [20], [20, 30, 1], [2**31, 2**31], ["a", 3], [20.5, 30], None, [MAX_PIXELS, 2]]
    spiral = [n for k in range(9000) for n in (k % 2 * 999, k)]
    return {
        "three or more values (labels, soft edges, 1 and 255)": [
            (saved(labels), "0 outside and one other value inside"),
            (labels, "0 outside and one other value inside"),
            (saved(Image.fromarray(values).resize((60, 40), 2).resize((30, 20), 2)), "one other value inside"),
        ],
        "JPEG with ringing": [(saved(values, "JPEG", quality=75), "JPEG changes values, so save masks as PNG")],
        "palette whose number 0 is white": [(saved(inverted), "read in two ways: inside are 550 pixels")],
        "white everywhere, shape in the transparency": [(saved(np.dstack([full] * 3 + [values])), "read in two ways")],
        "several frames or pages": [
            (saved(values, "TIFF", save_all=True, append_images=[Image.fromarray(values)]), "2 frames or pages")
        ],
        "mode CMYK or F file": [
            (saved(Image.fromarray(values).convert("CMYK"), "TIFF"), "mode 'CMYK'"),
            (saved(Image.fromarray(values.astype(np.float32)), "TIFF"), "mode 'F'"),
        ],
        "probabilities, NaN": [(INSIDE * 0.7, "Threshold it first"), (np.full(size, np.nan), "Threshold it first")],
        "negative values": [(-INSIDE.astype(int), "0 outside and one other value inside")],
        "masked values of numpy": [(np.ma.masked_equal(values, 0), "some values are masked; fill them first")],
        "another size than the image's": [
            (saved(values[1:]), r"a mask of size \(19, 30\)"),
            (values.T, r"size \(30, 20\)"),
        ],
        "RLE whose counts are cut off, negative or do not fill its size": [
            ({"size": size, "counts": counts}, "an RLE has counts") for counts in (*damaged, *lists)
        ],
        "RLE of size 0, negative, or above 178,956,970 pixels": [
            ({"size": each, "counts": whole}, "an RLE has size") for each in sizes
        ],
        "polygon of fewer than three points or an odd number of coordinates": [
            (("polygon", each), "at least three points")
            for each in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [[1, 2, 3]] * 3)
        ],
        "polygon with NaN, infinity, text or true": [
            (("polygon", [1, 2, 3, 4, 5, each]), "finite|list of numbers") for each in (math.nan, math.inf, "6", True)
        ],
        "polygon whose coordinates all lie from 0 to 1": [
            (("polygon", [0.1, 0.1, 0.9, 0.1, 0.9, 0.9]), "multiply x by 30")
        ],
        "polygon with a coordinate beyond 10,000,000 or an outline above 4,000,000 pixels": [
            (("polygon", [0, 0, 1e9, 0, 1e9, 9]), "the farthest is 10,000,000"),
            (("polygon", spiral), "outline has"),
        ],
    }


def test_every_refused_mask_is_named():
    refused = refused_masks()
    assert [row for row in rows_of("refused mask") if not row.startswith("mask without a pixel")] == list(refused)
    for row, cases in refused.items():
        for given, message in cases:
            with pytest.raises(ValueError, match=message) as caught:
                if isinstance(given, tuple):
                    read_polygons(given[1], HEIGHT, WIDTH)
                else:
                    read_mask(given, HEIGHT, WIDTH)
            assert len(str(caught.value)) < 400, row
    assert not has_pixels(read_mask(np.zeros((HEIGHT, WIDTH)), HEIGHT, WIDTH)), "refused where rows are made"


def refused_lines():
    """Two lines of a file, of which the second is refused."""
    box = [2, 2, 20, 2, 20, 15, 2, 15]
    return {
        "no `split` where other lines have one": [
            (
                {"split": "train"},
                {},
                "line 2 has no 'split' and line 1 has one, so that line 2 would be of every split",
            ),
            ({}, {"split": "train"}, "line 1 has no 'split' and line 2 has one"),
        ],
        "`split` that differs from another in case or blanks alone": [
            ({"split": "train"}, {"split": "Train "}, "the split 'Train ' is not 'train' of line 1: write both alike")
        ],
        "`sample_id` that an earlier line has": [
            ({"sample_id": 1}, {"sample_id": "1"}, "the sample id '1' repeats: line 1 has it too"),
            (
                {"sample_id": "mine-2"},
                {},
                "'mine-2' repeats: line 1 .*without 'sample_id' is called by the file's name",
            ),
        ],
        "`image_id` of another image": [
            ({"image_id": 1}, {"image_id": "1", "image": "b.png"}, "'1' is that of a.png in line 1, and here of b.png")
        ],
        "`height` or `width` that is not the image's": [
            ({}, {"height": 40, "width": 60}, "'height' is 40, and its image has 20 x 30 .*another size"),
            ({}, {"width": 20}, "'width' is 20"),
        ],
        "polygon most of which lies outside the image": [
            ({}, {"polygons": [[1, 1, 300, 1, 300, 200]]}, r"from \(1, 1\) to \(300, 200\) .*most of it lies outside")
        ],
        "polygon inside another of its instance": [
            ({}, {"polygons": [[box, [5, 5, 9, 5, 9, 9]]]}, "2 parts.*part 2 lies inside the others. If it is a hole"),
            ({}, {"polygons": [[[[2, 2], [20, 2], [20, 15]], box]]}, "2 parts.*part 1 lies inside"),
        ],
        "the same mask twice": [({}, {"polygons": [box, box]}, "masks 1 and 2 are the same, pixel for pixel")],
        'a key that is nearly a field ("Split", "reasonning", "polygon")': [
            ({}, {"Split": "val"}, "the key 'Split' is not read, 'split' is"),
            ({}, {"reasonning": "so"}, "the key 'reasonning' is not read, 'reasoning' is"),
            ({}, {"polygon": box}, "the key 'polygon' is not read, 'polygons' is"),
            ({}, {"Sample-ID": 3}, "the key 'Sample-ID' is not read, 'sample_id' is"),
        ],
        "`instruction` or `reasoning` with `<think>`, `</think>` or `<REF_POS>`": [
            ({}, {"instruction": "the </think> mug"}, "the instruction holds '</think>'.*remove it"),
            ({}, {"reasoning": "so <REF_POS>"}, "the reasoning holds '<REF_POS>'"),
        ],
    }


def test_every_refused_line_is_named(tmp_path):
    for name in "ab":
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{name}.png")
    cases = refused_lines()
    assert rows_of("refused line") == list(cases)
    path = tmp_path / "mine.jsonl"
    for given in cases.values():
        for first, second, message in given:
            plain = {"image": "a.png", "instruction": "it"}
            lines = [{**plain, **({} if "polygons" in line else {"masks": []}), **line} for line in (first, second)]
            path.write_text("\n".join(map(json.dumps, lines)))
            with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: .*{message}"):
                load_jsonl(path)


def test_every_field_of_a_line_is_in_the_table():
    assert set(re.findall(r"`(\w+)`", " ".join(rows_of("field")))) == {*READ_IF_THERE, *TEXTS}
