"""Small files that become large: images, archives and arrays, which must be refused before memory is taken."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from benchmarks.reliability import writers
from segcompass.loaders import load_rows
from segcompass.loaders.masks import read_mask, read_polygons
from segcompass.modeling_segcompass import SegCompassModel
from segcompass.modeling_segcompass.images import read_image
from segcompass.modeling_segcompass.manifest import sign

from . import Attack


def png(width: int, height: int, extra: bytes = b"", rows: int = 0) -> bytes:
    """A PNG of zeros that says how large it is and holds so many rows."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 2) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _text_chunk(megabytes):
    content = b"Comment\0\0" + zlib.compress(bytes(megabytes << 20), 9)
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


def attacks() -> Iterator[Attack]:
    """Yields the attacks."""
    large = {
        "50,000 x 50,000 pixels": png(50_000, 50_000),
        "200,000 x 1,000 pixels": png(200_000, 1_000),
        "2,000,000,000 x 1 pixels": png(2_000_000_000, 1),
        "0 x 0 pixels": png(0, 0),
        "a negative size": png(1 << 31, 1),
        "a comment of 64 MB": png(8, 8, _text_chunk(64), 8),
        "BMP of 60,000 x 60,000": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "GIF of 65,535 x 65,535": b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
        + b"\x02\x00;",
        "PPM of 99,999 x 99,999": b"P6 99999 99999 255\n",
        "SVG with entities": b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaa">]><svg>&a;</svg>',
    }
    refused = "pixels|cannot be read|cannot identify|no pixels|width|height"
    for name, content in large.items():
        yield Attack(f"an image: {name}", lambda folder, content=content: read_image(content), refused)
        yield Attack(
            f"an image in base64: {name}",
            lambda folder, content=content: read_image(base64.b64encode(content).decode()),
            refused,
        )

        def line(folder, content=content):
            (folder / "a.png").write_bytes(content)
            (folder / "a.jsonl").write_text(json.dumps({"image": "a.png", "instruction": "it", "masks": []}) + "\n")
            load_rows(str(folder / "a.jsonl"), "train")

        yield Attack(f"a data set's image: {name}", line, f"a.jsonl, line 1: .*({refused})")
        yield Attack(
            f"a mask file: {name}", lambda folder, content=content: read_mask(content, 8, 8), refused + "|RLE|mask"
        )

    runs = {
        "an RLE of 10^18 pixels": {"size": [10**9, 10**9], "counts": [0, 10**18]},
        "an RLE whose runs are longer than its image": {"size": [8, 8], "counts": [0, 10**12]},
        "a compressed RLE of one long run": {"size": [8, 8], "counts": "~~~~~~~~~~~"},
        "negative runs": {"size": [8, 8], "counts": [-5, 69]},
    }
    for name, rle in runs.items():
        yield Attack(name, lambda folder, rle=rle: read_mask(rle, 8, 8), "RLE")
    far = [[0.0, 0.0, 9e6, 0.0, 9e6, 9e6] * 50]
    yield Attack("a polygon with a very long outline", lambda folder: read_polygons(far, 100, 100), "outline|farthest")
    yield Attack(
        "a polygon that is not finite", lambda folder: read_polygons([[0, 0, float("inf"), 0, 1, 1]], 9, 9), "finite"
    )
    yield Attack(
        "an array of 10^10 pixels",
        lambda folder: read_image(np.broadcast_to(np.uint8(0), (100_000, 100_000))),
        "pixels",
    )

    def header(folder):
        """A header that says that it has 90 MB."""
        writers.saved_model(folder / "model")
        path = folder / "model" / "model.safetensors"
        path.write_bytes(struct.pack("<Q", 90_000_000) + path.read_bytes()[8:])
        sign(folder / "model")
        SegCompassModel.from_pretrained(folder / "model")

    def tensor(folder):
        """A tensor that says that it has 10^12 numbers."""
        import torch

        writers.saved_model(folder / "model")
        path = folder / "model" / "model.safetensors"
        save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
        path.write_bytes(path.read_bytes().replace(b'"shape":[1]', b'"shape":[1000000000000]'))
        sign(folder / "model")
        SegCompassModel.from_pretrained(folder / "model")

    def many(folder):
        """A configuration that asks for a vocabulary of 10^12 words."""
        writers.saved_model(folder / "model")
        path = folder / "model" / "config.json"
        fields = json.loads(path.read_text())
        fields["num_concepts"] = 10**9
        fields["sae_config"]["d_sae"] = 10**12
        path.write_text(json.dumps(fields))
        sign(folder / "model")
        SegCompassModel.from_pretrained(folder / "model")

    yield Attack("weights with a header of 90 MB", header, "model.safetensors")
    yield Attack("weights with a tensor of 10^12 numbers", tensor, "model.safetensors")
    yield Attack("a configuration that asks for 10^12 features", many, "d_sae|memory|does not match|allocate|too large")

    def frames(folder):
        """A GIF of 20,000 frames: the first is read."""
        first, rest = Image.new("P", (4, 4)), [Image.new("P", (4, 4), number % 2) for number in range(2000)]
        content = io.BytesIO()
        first.save(content, format="GIF", save_all=True, append_images=rest)
        return read_image(content.getvalue()).size == (4, 4)

    yield Attack("a GIF of many frames", frames)
