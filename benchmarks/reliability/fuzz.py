"""Odd inputs to everything that reads them, by grammar and by mutation, each with limits of time and memory.

    python benchmarks/reliability/fuzz.py [--quick]

Targets: the image reader, masks, polygons, the metric, JSON and pickles, JSONL data sets, the processor,
post-processing, the pipeline and the Space's functions. An input is answered right or refused with ValueError,
TypeError or OSError. Silent is an answer that differs from an independent one: pixels from Pillow or numpy alone, areas
counted in arrays. An "obscure" refusal is another kind of exception. Keys of RESULT: fuzz_cases, fuzz_hangs,
fuzz_crashes, fuzz_memory, fuzz_silent, fuzz_obscure, and by_target.
"""

import contextlib
import io
import json
import math
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from benchmarks.reliability import writers  # noqa: E402
from benchmarks.reliability.children import each_in_child, options, say  # noqa: E402
from benchmarks.reliability.space import told  # noqa: E402
from segcompass.journal import Journal  # noqa: E402
from segcompass.loaders import load_rows  # noqa: E402
from segcompass.loaders.files import read_json, read_pickle  # noqa: E402
from segcompass.loaders.masks import decode_mask, read_mask, read_polygons  # noqa: E402
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts  # noqa: E402
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
    if "demo" not in _MADE:
        from benchmarks.reliability.load import make_demo
        from benchmarks.reliability.space import space as space_parts

        _MADE["demo"] = make_demo(space_parts(), stub=True)
    demo, visitor = _MADE["demo"], SimpleNamespace(session_hash=draw.choice(("a", "b", None)))
    way = draw.randrange(5)
    try:
        if way == 0:
            image = draw.choice((noise_image(20, 30), odd(draw), None))
            last = list(demo.ask(image, draw.choice((*TEXTS, odd(draw))), draw.choice((0.5, odd(draw))), visitor))[-1]
            expect(isinstance(told(last)[1], str), "an answer without a verdict")
        else:
            question = draw.choice((None, "", "0", odd(draw)))
            if draw.random() < 0.7 and (kept := demo.answers._kept.get(visitor.session_hash or "")):
                question = kept.name
            concept = draw.choice((0, 1, 5, odd(draw)))
            threshold = draw.choice((0.5, odd(draw)))
            if way == 1:
                change = getattr(demo, "change", None) or demo.scale
                change(question, concept, draw.choice((0.0, 2.0, odd(draw))), threshold, visitor)
            elif way == 2 and hasattr(demo, "where"):
                demo.where(question, concept, visitor)
            elif way == 3:
                demo.restore(question, threshold, visitor)
            else:
                demo.rethreshold(question, threshold, visitor)
    except demo.refusals as error:  # what a visitor reads
        raise ValueError(str(error)) from error
    finally:
        expect(demo.line._tickets == [], "a question is still in the line")


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
}
"""target -> (what runs one case, how many cases in the full form)."""
QUICK = {"data sets": 3, "processor": 20, "pipeline": 4, "space": 10}
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
    args = options(__doc__, argv)
    output = args.output.resolve()
    journal = Journal(output / ("fuzz_quick" if args.quick else "fuzz"), {"quick": args.quick})
    with tempfile.TemporaryDirectory() as work:
        writers.work_in(Path(work))
        here = Path.cwd()
        os.chdir(work)
        for target, (_, cases) in TARGETS.items():
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
