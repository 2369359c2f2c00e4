"""How do time and memory grow with slots, image side, response length and data-set size, and what becomes the limit?

    python benchmarks/growth.py                                    # Linux; prints the table and RESULT
    python benchmarks/growth.py --draw docs/figures/growth.png     # and draws the curves

On the model of `workload.py` (28 M parameters, random weights, 64 image tokens), one thread, seconds of the processor:

    slots        masks decoded and brought to 640 x 480, of states that are there; the more slots, the more masks
    side         a square photograph prepared, and 6 masks of it brought to its own size
    response     so many tokens written, and the masks decoded, of one question
    rows         `segcompass evaluate`'s work beside the model: predictions read back, put in order and counted

Memory is by how much a call raises the process's peak, which Linux lets a process forget (/proc/self/clear_refs; with
glibc). The exponent is that of the last doubling or so: 1 is proportional, 2 the square; below 0.5 something else is
still larger. A size becomes the limit where it needs a gigabyte or, in a single answer, as long as writing 64 tokens:
that point is read off the curve, or off its last exponent beyond the curve's end.
"""

import argparse
import ctypes
import json
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from workload import benchmark_model, benchmark_rows

from segcompass.loaders.masks import encode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts, summarise
from segcompass.modeling_segcompass.whole_files import append_whole, signed_json
from segcompass.predictions import merge_parts, part_path, read_parts

SIZES = {
    "slots": (1, 3, 6, 12, 24, 48),
    "side": (250, 500, 1000, 2000, 4000, 8000),
    "response": (16, 32, 64, 128, 256),
    "rows": (1000, 3000, 10_000, 30_000),
}
ANSWER = 64
"""Tokens of an answer, beside whose time the others are looked at."""
OF_AN_ANSWER = ("slots", "side")
"""Curves whose time is a part of an answer's."""
TITLES = {
    "slots": "slots",
    "side": "side of the photograph, pixels",
    "response": "tokens of the response",
    "rows": "rows evaluated",
}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--largest", type=float, default=1.0, help="share of each curve's greatest size to go up to")
    parser.add_argument("--draw", type=Path, help="where the figure goes")
    return parser.parse_args(argv)


def measured(call):
    """(seconds of the processor, the lesser of two calls; gigabytes by which the first raised the peak)."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")
    before, began = high_water(), time.process_time()
    call()
    between, gigabytes = time.process_time(), high_water() - before
    call()
    return min(between - began, time.process_time() - between), gigabytes


def high_water():
    """The most memory since the peak was last forgotten, in gigabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def by_slots(model, processor, row):
    """size -> call."""

    def prepared(count):
        model, processor = benchmark_model(layers=2, slots=count)
        inputs = processor(
            images=row["image"], text=row["instruction"], response=processor.format_response("what it is")
        )
        states = {name: inputs[name] for name in ("input_ids", "attention_mask", "response_mask")}
        hidden = torch.randn(*inputs["input_ids"].shape, model.config.sae_config.d_in)
        states |= dict(z=hidden, last_hidden=hidden, patch_boxes=inputs["patch_boxes"])
        states["image_embeddings"] = model.get_image_embeddings(inputs["encoder_pixel_values"])

        def call():
            outputs = model.decode_masks(**states)
            processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=[(480, 640)])

        return call

    return prepared


def by_side(model, processor, row):
    """size -> call."""

    def prepared(side):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
        made = dict(pred_logits=torch.ones(1, 6), slot_mask=torch.ones(1, 6, dtype=torch.bool))
        outputs = SimpleNamespace(pred_masks=torch.randn(1, 6, 256, 256), **made)

        def call():
            processor(images=image, text="it")
            processor.post_process_instance_segmentation(outputs, target_sizes=[(side, side)])

        return call

    return prepared


def by_response(model, processor, row):
    """size -> call."""

    def prepared(length):
        inputs = processor(images=row["image"], text=row["instruction"])
        model.generation_config.eos_token_id = None
        return lambda: model.segment(**inputs, max_new_tokens=length)

    return prepared


def by_rows(model, processor, row):
    """size -> call."""
    mask = np.zeros((480, 640), bool)
    mask[100:300, 200:400] = True
    encoded = encode_mask(mask)
    counts = sample_counts([encoded] * 2, [encoded], None, "rela")

    def prepared(count):
        folder = Path(tempfile.mkdtemp())
        names = [f"row-{number}" for number in range(count)]
        slots = [{"slot": slot, "score": 0.9, "segmentation": encoded} for slot in (0, 1)]
        record = {"instruction": "the cup", "text": "x" * 300, "format": 1.0, "slots": slots, **counts, "seconds": 0.1}
        append_whole(part_path(folder, 0), "".join(signed_json({"sample_id": n, **record}) + "\n" for n in names))

        def call():
            done = read_parts(folder)
            summarise([done[name] for name in names], "rela")
            merge_parts(folder, names, done)

        return call

    return prepared


CURVES = {"slots": by_slots, "side": by_side, "response": by_response, "rows": by_rows}


def exponent(points, field):
    """Of the last step in which the size at least doubled."""
    last = points[-1]
    before = [point for point in points if point["size"] * 2 <= last["size"]]
    if not before or min(last[field], before[-1][field]) <= 0:
        return None
    return round(math.log(last[field] / before[-1][field]) / math.log(last["size"] / before[-1]["size"]), 2)


def reaching(points, field, limit):
    """The size at which a curve reaches a value: between two of its points, or beyond the last one; None if it is flat.

    Two digits, for the machine's speed is no better known.
    """
    for before, after in zip(points, points[1:], strict=False):
        if before[field] < limit <= after[field]:
            break
    else:
        before, after = next(p for p in reversed(points) if p["size"] * 2 <= points[-1]["size"]), points[-1]
        if points[0][field] >= limit:
            return points[0]["size"]
    if min(before[field], after[field]) <= 0 or after[field] <= before[field]:
        return None
    power = math.log(after[field] / before[field]) / math.log(after["size"] / before["size"])
    if power < 0.5:  # something else is still larger
        return None
    return float(f"{after['size'] * (limit / after[field]) ** (1 / power):.2g}")


def limits(found):
    """{curve: {field: size at which it becomes the limit, or None}}."""
    response = found.get("response", {"points": []})["points"]
    answer = next((point["seconds"] for point in response if point["size"] == ANSWER), None)
    limits = {}
    for name, curve in found.items():
        limits[name] = {"gigabytes": reaching(curve["points"], "gigabytes", 1.0)}
        if name in OF_AN_ANSWER and answer:
            limits[name]["seconds"] = reaching(curve["points"], "seconds", answer)
    return limits


def draw(found, path):
    """One picture for each curve: seconds and gigabytes over the size, both axes logarithmic, and where limits are."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(2, len(found), figsize=(2.9 * len(found), 4.8), dpi=100, sharex="col", squeeze=False)
    response = found.get("response", {"points": []})["points"]
    lines = {"gigabytes": (1.0, "1 GB")}
    for point in response:
        if point["size"] == ANSWER:
            lines["seconds"] = (point["seconds"], f"{ANSWER} tokens written")
    for column, (name, curve) in enumerate(found.items()):
        sizes = [point["size"] for point in curve["points"]]
        for row, (field, unit, colour) in enumerate(
            (("seconds", "seconds", "#2f6db5"), ("gigabytes", "GB", "#b5532f"))
        ):
            axes = places[row][column]
            values = [max(point[field], 1e-3) for point in curve["points"]]
            axes.loglog(sizes, values, "o-", color=colour, markersize=4)
            if field in lines and (field == "gigabytes" or name in OF_AN_ANSWER):
                limit, called = lines[field]
                axes.axhline(limit, color="#666666", linestyle="--", linewidth=0.9)
                if column == 0:
                    axes.text(sizes[0], limit * 0.72, called, fontsize=8, color="#666666")
                at = reaching(curve["points"], field, limit)
                if at is not None and at > sizes[0]:
                    last = (sizes[-1], values[-1])
                    if at > last[0]:
                        axes.plot([last[0], at], [last[1], limit], ":", color=colour)
                    axes.plot(at, limit, "o", markersize=7, markerfacecolor="white", color=colour)
                    axes.annotate(
                        f"{at:,.0f}", (at, limit), (-6, 5), textcoords="offset points", ha="right", fontsize=9
                    )
            axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
            axes.minorticks_off()
            axes.set_xticks(sizes[::2], [f"{size:,}" for size in sizes[::2]])
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(unit)
        places[1][column].set_xlabel(TITLES[name])
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(path, optimize=True)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(1)
    model, processor = benchmark_model()
    row = benchmark_rows(1)[0]
    found = {}
    for name in args.curves:
        points, prepared = [], CURVES[name](model, processor, row)
        prepared(SIZES[name][0])()  # warms up
        for size in SIZES[name]:
            if size > args.largest * SIZES[name][-1]:
                break
            seconds, gigabytes = measured(prepared(size))
            points.append({"size": size, "seconds": round(seconds, 4), "gigabytes": round(gigabytes, 4)})
            print(f"{name:<9} {size:>7,}   {seconds:8.3f} s   {gigabytes:7.3f} GB", flush=True)
        found[name] = {"points": points, "time": exponent(points, "seconds"), "memory": exponent(points, "gigabytes")}
    if args.draw:
        draw(found, args.draw)
    for name, at in limits(found).items():
        shown = ", ".join(f"{field} at {'none' if size is None else f'{size:,.0f}'}" for field, size in at.items())
        print(f"{name:<9} becomes the limit in {shown}")
    print("RESULT", json.dumps({**found, "limits": limits(found)}))


if __name__ == "__main__":
    main()
