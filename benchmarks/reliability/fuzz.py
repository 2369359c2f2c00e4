"""Odd inputs to everything that reads them, by grammar and by mutation, each with limits of time and memory.

    python benchmarks/reliability/fuzz.py [--quick]

Targets: the image reader, masks, polygons, the metric, JSON and pickles, JSONL data sets, the processor,
post-processing, the pipeline, the Space's functions, requests to `segcompass serve` and the boxes that MLLMs write. An
input is answered right or refused with ValueError,
TypeError or OSError. Silent is an answer that differs from an independent one: pixels from Pillow or numpy alone, areas
counted in arrays. An "obscure" refusal is another kind of exception. Keys of RESULT: fuzz_cases, fuzz_hangs,
fuzz_crashes, fuzz_memory, fuzz_silent, fuzz_obscure, and by_target.
"""

import base64
import contextlib
import io
import json
import math
import os
import pickle
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from benchmarks.reliability import served, writers  # noqa: E402
from benchmarks.reliability.children import each_in_child, options, say  # noqa: E402
from segcompass.box_formats import FORMATS, possible_boxes  # noqa: E402
from segcompass.journal import Journal  # noqa: E402
from segcompass.loaders import load_rows  # noqa: E402
from segcompass.loaders.files import read_json, read_pickle  # noqa: E402
from segcompass.loaders.masks import decode_mask, read_mask, read_polygons  # noqa: E402
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts  # noqa: E402
from segcompass.modeling_segcompass.answering import Limits  # noqa: E402
from segcompass.modeling_segcompass.images import read_image  # noqa: E402
from tests.support.scripted import Script, lively_segcompass, noise_image  # noqa: E402

SECONDS, MEGABYTES = 15.0, 1500.0
REFUSALS = ("ValueError", "TypeError", "OSError", "FileNotFoundError", "UnidentifiedImageError", "TimeoutError")
REFUSALS += ("IsADirectoryError", "NotADirectoryError", "PermissionError", "UnicodeDecodeError", "JSONDecodeError")

ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    " ",
    "a",
)
ODD += (
    "\0",
    "1",
    "nan",
    "../x",
    "x" * 5000,
    b"",
    b"\xff",
    [],
    {},
    (),
    [[]],
    [None],
    {"a": None},
    "é\u202e\ud83d",
    object,
)
TEXTS = (
    "the mug",
    "",
    " ",
    "\n",
    "\0",
    "<image>",
    "<REF_POS>",
    "{instruction}",
    "%s",
    "ä" * 50,
    "x" * 2000,
    "🐟",
    "\u202e",
    "\ud800",
)
SIZES = ((1, 1), (1, 7), (7, 1), (2, 3), (8, 8), (31, 17), (64, 64), (1, 400), (400, 1), (0, 5), (5, 0))


class Silent(Exception):
    """An answer that is not the independent one."""


def expect(fine: Any, what: str) -> None:
    """Raises Silent unless an answer is the independent one."""
    if not fine:
        raise Silent(what)


# -- inputs ------------------------------------------------------------------------------------------------------------


def odd(draw: random.Random, depth: int = 2) -> Any:
    """Any plain value, nested a little."""
    if depth and draw.random() < 0.3:
        size = draw.randrange(4)
        if draw.random() < 0.5:
            return [odd(draw, depth - 1) for _ in range(size)]
        return {draw.choice(("size", "counts", "bytes", "path", "a", 1)): odd(draw, depth - 1) for _ in range(size)}
    return draw.choice(ODD)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some turned over, taken away, put in or repeated."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        if not content:
            break
        place = draw.randrange(len(content))
        way = draw.randrange(5)
        if way == 0:
            content[place] ^= 1 << draw.randrange(8)
        elif way == 1:
            content[place] = draw.choice((0, 255, 127, 128, draw.randrange(256)))
        elif way == 2:
            del content[place : place + draw.choice((1, 4, 50))]
        elif way == 3:
            content[place:place] = draw.randbytes(draw.choice((1, 4, 50)))
        else:
            content[place:place] = content[place : place + draw.choice((4, 30))]
    return bytes(content)


def array(draw: random.Random) -> np.ndarray:
    """An array of any kind and shape."""
    shape = draw.choice(SIZES)
    if draw.random() < 0.6:
        shape = (*shape, draw.choice((1, 2, 3, 4, 5)))
    if draw.random() < 0.15:
        shape = draw.choice(((), (3,), (1, *shape), (3, *shape[:2]), (2, 2, 2, 2, 2)))
    kind = draw.choice(
        ("uint8", "bool", "int32", "int64", "uint16", "float32", "float64", "float16", "complex64", "U3", "O")
    )
    generator = np.random.default_rng(draw.randrange(2**32))
    values = generator.integers(0, draw.choice((2, 256, 70_000)), shape)
    if "float" in kind:
        values = generator.random(shape) * draw.choice((1, 1, 255, -1))
        if draw.random() < 0.2 and values.size:
            values.flat[draw.randrange(values.size)] = draw.choice((math.nan, math.inf))
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(kind)


def picture(draw: random.Random) -> bytes:
    """An image file of any format and mode."""
    mode = draw.choice(("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "I", "F"))
    height, width = draw.choice(SIZES[:9])
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 255, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB")
    with contextlib.suppress(ValueError):
        image = image.convert(mode)
    for form in (draw.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")), "PNG", "TIFF"):
        content, exif = io.BytesIO(), Image.Exif()
        if draw.random() < 0.3:
            exif[0x0112] = draw.randrange(0, 10)
        try:
            image.save(content, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP") and len(exif) else {}))
            return content.getvalue()
        except Exception:
            continue
    return b""


def mask(draw: random.Random, height: int = 8, width: int = 9) -> np.ndarray:
    """Bool (H, W)."""
    return np.random.default_rng(draw.randrange(2**32)).random((height, width)) < draw.choice((0.0, 0.3, 0.9, 1.0))


def run_lengths(given: np.ndarray) -> list[int]:
    """Uncompressed run lengths, counted by hand."""
    flat = given.T.ravel()
    places = np.flatnonzero(np.diff(np.concatenate([[False], flat, [not flat[-1] if len(flat) else True]])))
    return np.diff(np.concatenate([[0], places])).tolist()


# -- targets -----------------------------------------------------------------------------------------------------------


def images_by_mutation(draw: random.Random) -> None:
    """Damaged image files: what opens shows what Pillow alone shows."""
    content = mutated(picture(draw), draw)
    read = read_image(content)
    try:
        with Image.open(io.BytesIO(content)) as alone:
            size = ImageOps.exif_transpose(alone).size
    except Exception:  # Pillow's way of reading orientations fails where ours does not
        return
    expect(read.mode == "RGB" and read.size == size, f"{read.size} read, Pillow has {size}")


def images_by_grammar(draw: random.Random) -> None:
    """Arrays, tensors, dicts and anything else."""
    kind = draw.randrange(4)
    if kind == 0:
        given = odd(draw)
    elif kind == 1:
        given = {"bytes": picture(draw), "path": draw.choice(ODD)}
    else:
        given = array(draw)
        if kind == 2 and given.dtype.kind in "uifb" and given.dtype != np.uint16:
            given = torch.from_numpy(given)
    read = read_image(given)
    expect(read.mode == "RGB" and min(read.size) > 0, f"{read}")
    plain = np.asarray(given) if hasattr(given, "shape") else None
    if plain is not None and plain.dtype == np.uint8 and plain.ndim == 3 and plain.shape[2] == 3 and plain.shape[0] > 4:
        expect((np.asarray(read) == plain).all(), "an array of bytes is not what it was")


def masks(draw: random.Random) -> None:
    """Masks in any form: what is read covers the same pixels."""
    wanted = mask(draw)
    height, width = wanted.shape
    rle = {"size": [height, width], "counts": run_lengths(wanted)}
    way = draw.randrange(6)
    given: Any = [wanted, wanted.astype(np.uint8) * 255, rle, wanted.tolist(), Image.fromarray(wanted), odd(draw)][way]
    if way == 2 and draw.random() < 0.7:
        counts = list(rle["counts"])
        place = draw.randrange(len(counts))
        counts[place] = draw.choice((counts[place] + 1, -1, 10**15, 0.5, "a", None, math.nan, counts[place]))
        rle["counts"], wanted = counts, None
        if draw.random() < 0.3:
            rle["size"] = draw.choice(([9, 8], [-1, 8], [8], "8", [8.5, 9], [10**9, 10**9], None))
    read = read_mask(given, height, width)
    if wanted is not None and way != 5:
        expect((decode_mask([read], height, width) == wanted).all(), f"another mask from way {way}")


def polygons(draw: random.Random) -> None:
    """Polygons: rectangles cover what they say; the rest is refused or finite."""
    if draw.random() < 0.4:
        left, top = draw.randrange(6), draw.randrange(5)
        right, bottom = left + draw.randrange(1, 4), top + draw.randrange(1, 3)
        read = read_polygons([[left, top, right, top, right, bottom, left, bottom]], 8, 10)
        wanted = np.zeros((8, 10), bool)
        wanted[top:bottom, left:right] = True
        expect((decode_mask([read], 8, 10) == wanted).all(), "another rectangle")
        return
    numbers = [
        draw.choice((0, 1, 5.5, -3, 1e7, 1e300, math.nan, math.inf, None, "a", 10**40))
        for _ in range(draw.randrange(12))
    ]
    read_polygons(draw.choice(([numbers], numbers, [[numbers]], odd(draw))), draw.choice((8, 0, -1)), 10)


def metric(draw: random.Random) -> None:
    """The metric against areas counted in arrays."""
    prediction, reference = mask(draw), mask(draw)
    forms: list[Callable[[np.ndarray], Any]] = [
        lambda m: m,
        lambda m: {"size": list(m.shape), "counts": run_lengths(m)},
        lambda m: [{"size": list(m.shape), "counts": run_lengths(m)}],
        lambda m: m.astype(np.int32),
        lambda m: Image.fromarray(m),
    ]
    if draw.random() < 0.5:
        counts = sample_counts(draw.choice(forms)(prediction), draw.choice(forms)(reference))
        wanted = (int((prediction & reference).sum()), int((prediction | reference).sum()))
        expect((counts["I"], counts["U"]) == wanted, f"{counts} for {wanted}")
        return
    compressed = {"size": [8, 9], "counts": mutated(b"0l43ThX42O1N2O0", draw).decode("latin-1")}
    given = draw.choice((compressed, odd(draw), array(draw), [compressed, odd(draw)]))
    sample_counts(
        given, draw.choice((reference, odd(draw))), draw.choice((None, odd(draw))), draw.choice(("rela", "lisa", "x"))
    )


def files(draw: random.Random) -> None:
    """JSON and pickles."""
    path = Path("fuzzed")
    if draw.random() < 0.5:
        path.write_bytes(mutated(json.dumps([{"a": [1.5, None, "é"], "b": {"c": True}}] * 3).encode(), draw))
        read_json(path)
    else:
        path.write_bytes(
            mutated(pickle.dumps([{"ref_id": 1, "sentences": [{"sent": "a"}]}] * 3, protocol=draw.randrange(5)), draw)
        )
        read_pickle(path)


def data_sets(draw: random.Random) -> None:
    """Lines of a JSONL: rows come out whole or the line is named."""
    good = {"image": "a.png", "instruction": "it", "polygons": [[2, 2, 9, 2, 9, 9]], "sample_id": "s"}
    for name in draw.sample(sorted(good), draw.randrange(3)):
        good[name] = odd(draw)
    if draw.random() < 0.3:
        good[draw.choice(("mask", "rle", "masks", "ignore", "split", "kind", "reasoning"))] = odd(draw)
    content = json.dumps(good, default=str).encode() + b"\n"
    if draw.random() < 0.3:
        content = mutated(content, draw)
    path = Path(f"{draw.randrange(10**9)}.jsonl")
    noise_image(16, 16).save("a.png")
    path.write_bytes(content)
    try:
        (row,) = load_rows(str(path), "train")
        expect(row["height"] == row["width"] == 16 and row["instruction"].strip(), f"{row}")
    except (ValueError, OSError) as error:
        expect("line 1" in str(error) or "no usable rows" in str(error) or path.name in str(error), f"unnamed: {error}")
        raise
    finally:
        path.unlink()


def _parts():
    """A tiny model that writes a short well-formed response, its processor and the Space's functions; made once."""
    if not _MADE:
        model, processor = lively_segcompass("llava", num_slots=3)
        generate = model.mllm.generate
        answer = "<think>it</think>" + "<REF_POS>" * 3

        def forced(input_ids, **inputs):
            script = Script(processor.tokenizer, [answer] * len(input_ids))
            return generate(input_ids=input_ids, logits_processor=[script], **inputs)

        model.mllm.generate = forced
        _MADE.update(model=model, processor=processor)
    return SimpleNamespace(**_MADE)


_MADE: dict[str, Any] = {}


def processor(draw: random.Random) -> None:
    """Images, texts and responses to the processor: one row of inputs per image, or refused."""
    made = _parts().processor
    count = draw.randrange(3)
    image = lambda: draw.choice((noise_image(*draw.choice(SIZES[:9])), array(draw), odd(draw), picture(draw)))  # noqa: E731
    given: Any = draw.choice((image(), [image() for _ in range(count)]))
    text = draw.choice((draw.choice(TEXTS), [draw.choice(TEXTS) for _ in range(count)], odd(draw)))
    options: dict[str, Any] = {}
    if draw.random() < 0.3:
        options["response"] = draw.choice((made.format_response("it"), odd(draw), ["a"] * count))
    inputs = made(images=given, text=text, **options)
    if not torch.is_tensor(inputs["input_ids"]):  # a finished prompt, as transformers' own processors return it
        return
    rows = len(given) if isinstance(given, list) else 1
    expect(len(inputs["input_ids"]) == len(inputs["attention_mask"]) == rows, f"{rows} images, other rows of inputs")
    found = (inputs["input_ids"] == made.image_token_id).sum(-1)
    expect((found == found[0]).all() and found[0] > 0, "an image has no tokens")


def post_processing(draw: random.Random) -> None:
    """Thresholds and sizes: masks have the size asked for."""
    made = _parts()
    outputs = SimpleNamespace(
        pred_masks=torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(draw.randrange(2**31))),
        pred_logits=torch.tensor([[3.0, -3.0, 0.1]]),
        slot_mask=torch.tensor([[True, True, True]]),
    )
    size = draw.choice((draw.choice(SIZES), odd(draw), (2.5, 3), ("a", 1), (-1, 5), (10**9, 10**9)))
    threshold = draw.choice((0.5, 0, 1, odd(draw)))
    (found,) = made.processor.post_process_instance_segmentation(outputs, threshold, 0.5, target_sizes=[size])
    expect(tuple(found["masks"].shape[1:]) == tuple(int(side) for side in size), f"{found['masks'].shape} for {size}")
    scores = outputs.pred_logits[0].sigmoid()
    expect(all(scores[slot] >= threshold for slot in found["slots"]), "a slot below the threshold")


def pipeline(draw: random.Random) -> None:
    """The pipeline with odd images, texts and options."""
    from segcompass.modeling_segcompass.pipeline_segcompass import ReasoningSegmentationPipeline

    made = _parts()
    pipe = ReasoningSegmentationPipeline(model=made.model, processor=made.processor)
    image = draw.choice((noise_image(*draw.choice(SIZES[:9])), odd(draw), array(draw)))
    text = draw.choice((draw.choice(TEXTS), odd(draw), [draw.choice(TEXTS)]))
    options = {}
    if draw.random() < 0.4:
        name = draw.choice(("threshold", "mask_threshold", "batch_size", "explain", "concept_scale", "query_source"))
        options[name] = odd(draw)
    answer = pipe(image, text, **options)
    expect(all(hasattr(each, "text") for each in ([answer] if hasattr(answer, "text") else answer)), f"{answer!r:.100}")


def space(draw: random.Random) -> None:
    """The Space's functions, as any client may call them."""
    if "app" not in _MADE:
        from benchmarks.reliability.load import make_demo
        from tests.support.space import space_modules

        _MADE["app"] = space_modules().asking
        _MADE["demo"] = make_demo(space_modules(), stub=True)
    demo, visitor = _MADE["demo"], SimpleNamespace(session_hash=draw.choice(("a", "b", None)))
    way = draw.randrange(5)
    try:
        if way == 0:
            image = draw.choice((noise_image(20, 30), odd(draw), None))
            last = list(demo.ask(image, draw.choice((*TEXTS, odd(draw))), draw.choice((0.5, odd(draw))), visitor))[-1]
            expect(last.why is not None and bool(last.why.verdict), "an answer without a verdict")
        else:
            question = draw.choice((None, "", "0", odd(draw)))
            if draw.random() < 0.7 and (kept := demo.answers._kept.get(visitor.session_hash or "")):
                question = kept.name
            concept = draw.choice((0, 1, 5, odd(draw)))
            threshold = draw.choice((0.5, odd(draw)))
            if way == 1:
                demo.change(question, concept, draw.choice((0.0, 2.0, "blue", odd(draw))), threshold, visitor)
            elif way == 2:
                names = (
                    draw.choice(("blue", "1", "0, 1", odd(draw))),
                    draw.choice(("", "2")),
                    draw.choice(("", "a=b", "=")),
                )
                tools = _MADE["app"].Tools(demo)
                tools.change_concepts(noise_image(20, 30), draw.choice((*TEXTS, odd(draw))), *names, threshold)
            elif way == 3:
                demo.restore(question, threshold, visitor)
            else:
                demo.rethreshold(question, threshold, visitor)
    except demo.refusals as error:  # what a visitor reads
        raise ValueError(str(error)) from error
    finally:
        expect(len(demo.line) == 0, "a question is still in the line")


SERVED = (200, 404, 405, 408, 413, 415, 422)
"""What the server may answer to a stranger who asks alone: 500 is no refusal."""


def serve(draw: random.Random) -> None:
    """Requests to the server, of odd fields or damaged bytes: an answer of its form and its question, or a refusal."""
    if "port" not in _MADE:
        made = contextlib.ExitStack()
        _MADE["port"], _MADE["worker"] = made.enter_context(
            served.serving(*served.scripted_model(stub=True), patience=2.0, limits=Limits(200_000, 100_000, 100, 20))
        )
        _MADE["until the end"] = made
    port, way = _MADE["port"], draw.randrange(6)
    fields = served.question(draw.randrange(4), threshold=draw.choice((0.0, 0.5, 1)))
    if way != 5:
        names = (*fields, "polygons", "stream", "concept_scale", "concept_add", "concept_replace", "inputs", "x")
        for name in draw.sample(names, draw.choice((0, 1, 1, 2))):
            fields[name] = draw.choice((odd(draw), {draw.choice(("red", "1", "7", "-1", "")): odd(draw)}))
        if draw.random() < 0.3:
            fields["image"] = base64.b64encode(picture(draw)).decode()
        if draw.random() < 0.2:
            fields["instruction"] = draw.choice(TEXTS)
    if way < 3:
        body, kind = json.dumps(fields, default=str).encode(), "application/json"
    else:
        body, kind = form(fields, draw), f"multipart/form-data; boundary={BOUNDARY}"
    if way in (2, 4):
        body = mutated(body, draw)
    if way == 5:
        raw(port, body, kind, draw)
    else:
        status, content = served.post(port, body, draw.choice((kind, kind, kind, kind, "text/plain", "")))
        expect(status in SERVED, f"status {status}: {content[:200]!r}")
        if status != 200:
            said = json.loads(content)["error"]
            expect(said["status"] == status and said["message"], f"a refusal without words: {content[:200]!r}")
        elif content.startswith(b"event: "):
            expect(b"event: answer" in content or b"event: error" in content, "a stream without an end")
        else:
            agrees(json.loads(content), fields if way in (0, 1) else {})
    served.wait_until(lambda: not _MADE["worker"].state()["inside"], 20)
    expect(_MADE["worker"].state()["inside"] == 0 and _MADE["worker"].is_alive, "a place is kept, or nobody answers")


BOUNDARY = "4d1e"


def form(fields: dict[str, Any], draw: random.Random) -> bytes:
    """The fields as a form, the image as a file where it is one."""
    parts = []
    for name, value in fields.items():
        head, content = f'form-data; name="{name}"', json.dumps(value, default=str).encode()
        if name == "image" and isinstance(value, str):
            with contextlib.suppress(ValueError):
                head, content = head + '; filename="a.png"', base64.b64decode(value)
        elif isinstance(value, str):
            content = value.encode("utf-8", "replace")
        parts.append(f"--{BOUNDARY}\r\nContent-Disposition: {head}\r\n\r\n".encode() + content + b"\r\n")
    if draw.random() < 0.1:
        parts.append(draw.choice(parts))
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def raw(port: int, body: bytes, kind: str, draw: random.Random) -> None:
    """A damaged or half request, after which the server must answer others."""
    length = draw.choice((len(body), len(body), 0, len(body) + 10, -1, "x", 10**12))
    head = f"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()
    if draw.random() < 0.6:
        head = mutated(head, draw)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as visitor, contextlib.suppress(OSError):
        visitor.sendall((head + body)[: draw.choice((10**9, len(head), len(head) + len(body) // 2, 7))])
        if draw.random() < 0.5:
            visitor.shutdown(socket.SHUT_WR)
            said = visitor.recv(300)
            expect(b" 500 " not in said.split(b"\r\n")[0], f"{said!r}")
    status, content = served.post(port, json.dumps(served.question(0)).encode())
    expect(status == 200 and "instances" in json.loads(content), f"the next is not served: {status}")


def agrees(answer: dict[str, Any], fields: dict[str, Any]) -> None:
    """An answer has its form, and is one to this question: masks, boxes, scores and sizes belong together."""
    from segcompass.serve import Answer

    Answer.model_validate(answer)
    if fields and "inputs" not in fields:
        with Image.open(io.BytesIO(base64.b64decode("".join(fields["image"].rpartition(",")[2].split())))) as image:
            size = ImageOps.exif_transpose(image).size[::-1]
        expect(answer["instruction"] == fields["instruction"], "the answer to another instruction")
        expect(answer["size"] == list(size), f"size {answer['size']}, Pillow has {size}")
        threshold = 0.5 if fields.get("threshold") is None else fields["threshold"]
        expect(all(each["score"] >= threshold for each in answer["instances"]), "an instance below the threshold")
    for each in answer["instances"]:
        covered = decode_mask([each["segmentation"]], *answer["size"])
        rows, columns = covered.any(1).nonzero()[0], covered.any(0).nonzero()[0]
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
        expect(list(map(int, box)) == each["box"], f"box {each['box']}, the mask lies in {box}")


# -- what MLLMs write as boxes -----------------------------------------------------------------------------------------


def boxes(draw: random.Random) -> None:
    """Answers of each family by grammar, whose regions are known; damaged ones; and long ones of a few pieces."""
    name = draw.choice(sorted(FORMATS))
    size = draw.choice(((640, 480), (300, 900), (1, 1), (7, 2000), (1999, 1501), (57, 57)))
    shown = (28 * draw.randrange(1, 60), 28 * draw.randrange(1, 60)) if name == "qwen2_5_vl" else None
    written = Written(name, size, shown, draw)
    text = written.text
    way = draw.randrange(3)
    if way == 1:
        text = mutated(text.encode(), draw).decode("utf-8", "replace")
    elif way == 2:
        piece = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 4)))
        text = (
            draw.choice(("", text, "[", "<box>"))
            + piece * (20_000 // max(1, len(piece)))
            + draw.choice(("", text, "]"))
        )
    answer = FORMATS[name].read(text, size, shown)
    possible_boxes(text, size)
    expect(
        answer.text == text and (answer.fault is None) == bool(answer.regions or answer.nothing), f"{answer.fault!r}"
    )
    expect(not (answer.nothing and (answer.regions or answer.left_out)), "nothing, and something")
    if way == 0:
        written.check(answer)
    for region in answer.regions[:50]:
        expect(region.box is not None or region.point is not None, "a region that is nowhere")
        written.was_said(region, text)


PIECES = (
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    "1",
    "12",
    ".",
    "-",
    ",",
    " ",
    "\n",
    '"',
    "'",
    "0.5",
    '"point": [',
    '"point_2d":',
)
PIECES += (
    "<points x1=",
    "<point x=",
    " y1=",
    "<loc",
    "<loc0001>",
    "<think>",
    "</think>",
    "<answer>",
    "```json",
    "none ",
)
PIECES += (
    "nothing in ",
    "there is no ",
    "not in ",
    "answer: ",
    "in the image",
    "é",
    "<box>",
    '"bbox_2d": [1, 2, 3, 4]',
)


class Written:
    """An answer in a family's form with the regions that it means, reckoned in fractions."""

    def __init__(self, name: str, size: tuple[int, int], shown: tuple[int, int] | None, draw: random.Random):
        self.name, self.size, self.shown, self.draw = name, size, shown, draw
        self.full = {"llava": (1, 1), "paligemma": (1024, 1024), "qwen2_5_vl": shown}.get(name, (1000, 1000))
        things = [self._thing() for _ in range(draw.choice((0, 1, 1, 2, 3, 9)))]
        self.meant = [self.placed(*thing) for thing in things]
        said = "".join(map(self._location, things)) if name == "paligemma" else self._listed(things)
        self.nothing = not things
        if not things:
            said = draw.choice(("[]", "```json\n[]\n```", "None", "There is no such thing.", "no match", "a mug"))
            self.nothing = said != "a mug"
        if name != "paligemma" or things:
            said = draw.choice(("{}", "Here: {}", "```json\n{}\n```", "{}.") if things else ("{}",)).format(said)
        if draw.random() < 0.3:
            said = f"{draw.choice(('', 'So: ' if things else ''))}<answer>{said}</answer>"
        self.cut = False
        if draw.random() < 0.3:
            thought = draw.choice(("hm", "the left one, [1, 2, 3, 4]", "<loc0001><loc0002><loc0003><loc0004>"))
            self.cut = draw.random() < 0.2
            said = f"<think>{thought}" if self.cut else f"<think>{thought}</think>{said}"
        self.text = said

    def _number(self, edge):
        """(what is written, what it is worth) of a coordinate, now and then beyond an edge."""
        share = self.draw.choice(
            (self.draw.random(), self.draw.random(), 0.0, 1.0, self.draw.choice((-0.03, 1.04, 1.2)))
        )
        if self.name == "paligemma":
            number = min(9999, max(0, int(share * 1024)))
            return f"{number:04d}", Fraction(number)
        text = f"{share:.{self.draw.choice((2, 3))}f}" if self.name == "llava" else str(int(share * edge))
        if self.name != "llava" and self.draw.random() < 0.1:
            text += self.draw.choice((".5", ".0", "."))
        return text, Fraction(text + "0" if text.endswith(".") else text)

    def _thing(self):
        """A box, a point or both, each as written and as worth."""
        box = [self._number(self.full[place % 2]) for place in range(4)]
        point = [self._number(self.full[place]) for place in range(2)]
        kind = "box" if self.name == "paligemma" else self.draw.choice(("box", "box", "box", "point", "both"))
        return (box if kind != "point" else None), (point if kind != "box" else None)

    def _location(self, thing):
        left, top, right, bottom = (text for text, _ in thing[0])
        return f"<loc{top}><loc{left}><loc{bottom}><loc{right}> it ;"

    def _listed(self, things):
        comma = self.draw.choice((", ", ",", " , "))
        several = self.draw.choice(("json", "plain", "corners"))
        parts = []
        for box, point in things:
            fields = []
            if box is not None:
                fields.append('"bbox_2d": [' + comma.join(text for text, _ in box) + "]")
            if point is not None:
                fields.append('"point_2d": [' + comma.join(text for text, _ in point) + "]")
            if several == "json" or point is not None:
                parts.append("{" + ", ".join([*fields, '"label": "it"']) + "}")
            elif several == "plain":
                parts.append("[" + comma.join(text for text, _ in box) + "]")
            else:
                (a, _), (b, _), (c, _), (d, _) = box
                parts.append(f"<|box_start|>({a},{b}),({c},{d})<|box_end|>")
        return "[" + ", ".join(parts) + "]"

    def placed(self, box: Any, point: Any) -> tuple[Any, Any] | None:
        """A thing in pixels, as fractions; None where it cannot be used."""
        numbers = [[value for _, value in part] if part else None for part in (box, point)]
        return self._in_pixels(*numbers)

    def _in_pixels(self, box, point):
        width, height = self.size
        side = max(self.size)
        spans = [(Fraction(0), Fraction(length)) for length in self.size]
        if self.name == "llava":
            offsets = [(side - length) // 2 for length in self.size]
            spans = [(Fraction(-offset), Fraction(side - offset)) for offset in offsets]

        def pixel(number, axis):
            low, high = spans[axis]
            return low + number * (high - low) / self.full[axis]

        def inside(number, axis):
            return min(max(pixel(number, axis), Fraction(0)), Fraction(self.size[axis]))

        for part in (box or [], point or []):
            if any(not -self.full[n % 2] <= 20 * value <= 21 * self.full[n % 2] for n, value in enumerate(part)):
                return None
        found = None
        if box is not None:
            (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
            found = (inside(left, 0), inside(top, 1), inside(right, 0), inside(bottom, 1))
            least = Fraction(1, 1000) if self.name == "llava" else 1
            if min(right - left, bottom - top) < least or found[2] <= found[0] or found[3] <= found[1]:
                return None
        at = None if point is None else (inside(point[0], 0), inside(point[1], 1))
        if box is None and at != (pixel(point[0], 0), pixel(point[1], 1)):
            return None
        return found, at

    def check(self, answer: Any) -> None:
        """The answer's regions are those that were meant, in their order, each once."""
        if self.cut:
            expect(
                not answer.regions and not answer.nothing and answer.fault, "what was thought is taken for an answer"
            )
            return
        usable = list(dict.fromkeys(thing for thing in self.meant if thing is not None))
        shown = [(region.box, region.point) for region in answer.regions]
        close = len(usable) == len(shown) and all(self._near(*pair) for pair in zip(usable, shown, strict=True))
        expect(close, f"{self.name} {self.size} {self.shown}: {self.text!r} read as {shown}, meant {usable}"[:600])
        expect(
            answer.left_out == sum(thing is None for thing in self.meant), f"{answer.left_out} left out: {self.text!r}"
        )
        if not self.meant:
            expect(answer.nothing == self.nothing, f"nothing is {answer.nothing}: {self.text!r}")

    def _near(self, meant, shown):
        numbers = [[*(part or ())] for part in (*meant, *shown)]
        return all(
            len(one) == len(other)
            and all(abs(float(a) - b) <= 1e-6 * (1 + abs(b)) for a, b in zip(one, other, strict=True))
            for one, other in ((numbers[0], numbers[2]), (numbers[1], numbers[3]))
        )

    def was_said(self, region: Any, text: str) -> None:
        """A region of any text stands there: its numbers follow one another, and it lies in the image."""
        digits = r"<loc(\d{4})>" if self.name == "paligemma" else r"(-?(?:\d+\.?\d*|\.\d+))"
        found = [
            Fraction(number.rstrip(".")) if len(number) < 400 else Fraction(0) for number in re.findall(digits, text)
        ]
        for part, count in ((region.box, 4), (region.point, 2)):
            if part is None:
                continue
            low, high = (0.0, 0.0), self.size
            expect(
                all(low[n % 2] <= edge <= high[n % 2] for n, edge in enumerate(part)), f"{part} is outside {self.size}"
            )
            if count == 4:
                expect(part[0] < part[2] and part[1] < part[3], f"{part} has no area")
            several = [found[n : n + count] for n in range(len(found) - count + 1)]
            if self.name == "paligemma":
                several = [[left, top, right, bottom] for top, left, bottom, right in several]
            ways = [
                self._in_pixels(*((numbers, None) if count == 4 else ([0, 0, *self.full], numbers)))
                for numbers in several
            ]
            said = [way[0 if count == 4 else 1] for way in ways if way is not None]
            near = any(
                all(abs(float(a) - b) <= 1e-6 * (1 + abs(b)) for a, b in zip(one, part, strict=True)) for one in said
            )
            expect(near, f"{part} was never said: {text!r:.300}")


TARGETS: dict[str, tuple[Callable[[random.Random], None], int]] = {
    "images by mutation": (images_by_mutation, 5000),
    "images by grammar": (images_by_grammar, 3000),
    "masks": (masks, 3000),
    "polygons": (polygons, 1500),
    "metric": (metric, 3000),
    "files": (files, 2000),
    "data sets": (data_sets, 600),
    "processor": (processor, 1200),
    "post-processing": (post_processing, 800),
    "pipeline": (pipeline, 300),
    "space": (space, 700),
    "boxes": (boxes, 12_000),
    **({"serve": (serve, 4000)} if served.SERVES else {}),
}
"""target -> (what runs one case, how many cases in the full form)."""
QUICK = {"serve": 15, "data sets": 3, "processor": 20, "pipeline": 4, "space": 10}
"""Cases of the quick form; 40 where none is named."""
BLOCK = 50


def block(target: str, first: int, count: int) -> dict[str, Any]:
    """Run some cases after one another: what ended other than right or refused, by number."""
    found: dict[str, Any] = {}
    for number in range(first, first + count):
        with open("now", "w") as file:
            file.write(str(number))
        began = time.process_time()
        try:
            TARGETS[target][0](random.Random(f"{target} {number}"))
        except Silent as error:
            found[str(number)] = f"silent: {error}"[:300]
        except MemoryError:
            found[str(number)] = "memory"
        except RecursionError as error:
            found[str(number)] = f"obscure: RecursionError: {error}"[:300]
        except Exception as error:
            if not any(kind.__name__ in REFUSALS for kind in type(error).__mro__) or not str(error):
                found[str(number)] = f"obscure: {type(error).__name__}: {error}"[:300]
        if time.process_time() - began > SECONDS / 2:
            found[str(number)] = f"hang: {time.process_time() - began:.1f} s"
    return found


def examine(target: str, cases: int, journal: Journal, end: float) -> None:
    """All cases of a target.

    Args:
        target: its name.
        cases: how many.
        journal: of the blocks of cases.
        end: when to stop, on the monotonic clock.
    """
    todo = [(f"{target} {first}", first, min(BLOCK, cases - first)) for first in range(0, cases, BLOCK)]
    todo = [each for each in todo if each[0] not in journal.records]
    while todo and time.monotonic() < end:
        works = [(name, lambda first=first, count=count: block(target, first, count)) for name, first, count in todo]
        again = []
        for (name, outcome), (_, first, count) in zip(each_in_child(works, 4 * SECONDS, MEGABYTES), todo, strict=True):
            if outcome.kind == "done":
                found = outcome.value
            else:  # the child ended within a case: that one is noted, the rest of its block runs again
                ended = int(Path("now").read_text())
                found, rest = {str(ended): f"{outcome.kind}: {outcome.text}"}, first + count - ended - 1
                if rest:
                    again.append((f"{target} {ended + 1}", ended + 1, rest))
                if ended > first:
                    again.append((f"{target} {first} before {ended}", first, ended - first))
                count = 1
            journal.add([{"sample_id": name, "target": target, "cases": count, "found": found}])
            for number, what in found.items():
                print(f"{target} {number}: {what}", flush=True)
            if time.monotonic() > end:
                return
        todo = again


def main(argv: list[str] | None = None) -> dict:
    """Run the harness and return what its RESULT says."""
    chosen = {"nargs": "+", "choices": list(TARGETS), "default": list(TARGETS), "help": "some of the targets"}
    args = options(__doc__, argv, {"--targets": chosen})
    output = args.output.resolve()
    journal = Journal(output / ("fuzz_quick" if args.quick else "fuzz"), {"quick": args.quick})
    with tempfile.TemporaryDirectory() as work:
        writers.work_in(Path(work))
        here = Path.cwd()
        os.chdir(work)
        for target in args.targets:
            cases = TARGETS[target][1]
            examine(target, QUICK.get(target, 40) if args.quick else cases, journal, args.end)
        os.chdir(here)
    records = list(journal.records.values())

    def number(kind, target=None):
        chosen = [record for record in records if target in (None, record["target"])]
        return sum(what.startswith(kind) for record in chosen for what in record["found"].values())

    kinds = ("hang", "crash", "memory", "silent", "obscure")
    by = {}
    for target in TARGETS:
        counts = {"cases": sum(record["cases"] for record in records if record["target"] == target)}
        by[target] = counts | {kind: number(kind, target) for kind in kinds if number(kind, target)}
    return say(
        {
            "fuzz_cases": sum(record["cases"] for record in records),
            "fuzz_hangs": number("hang"),
            "fuzz_crashes": number("crash"),
            "fuzz_memory": number("memory"),
            "fuzz_silent": number("silent"),
            "fuzz_obscure": number("obscure"),
            "by_target": by,
        }
    )


if __name__ == "__main__":
    main()
