"""How long until the first 100 rows of a RefCOCO-sized data set, against reading its files at all?

    python benchmarks/loading.py

Makes annotation files of RefCOCO's size (142,000 expressions of 50,000 objects, 197,000 annotations, 20,000 images;
polygons of about 25 points), then measures in a fresh process each: `json.load` and `pickle.load` of the two files,
and `load_refcoco`, streamed and with `num_samples=100`, 100 rows read, without a cache.

    python benchmarks/loading.py --mixed

Makes RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO of their real sizes (530,000 training rows, each set holds out other
images) and mixes 400,000 rows of them: from the annotations with an empty cache, and again in a new process. Reading
all eight files with `json` and `pickle` is the measure. Then `prepare-data` converts one of them, and its folder is
compared with its annotations. Times are CPU seconds of one process, which other work on the machine hardly moves.
Peak memory is the loader process's.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, ANNOTATIONS, REFS, EXPRESSIONS = 20_000, 197_000, 50_000, 142_000

READ = """
import json, pickle, sys, time
began = time.process_time()
with open(sys.argv[1] + "/refcoco/refs(unc).p", "rb") as file:
    refs = pickle.load(file)
with open(sys.argv[1] + "/refcoco/instances.json") as file:
    instances = json.load(file)
print(time.process_time() - began)
"""

LOAD = """
import resource, sys, time
import datasets, torch
from segcompass.loaders import load_refcoco
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
datasets.disable_progress_bars()
began = time.process_time()
rows = load_refcoco(sys.argv[1], split="train", streaming=True).take(100)
assert len([row["masks"] for row in rows]) == 100
streamed, began = time.process_time() - began, time.process_time()
rows = load_refcoco(sys.argv[1], split="train", num_samples=100)
assert len([row["masks"] for row in rows]) == 100
print(streamed, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


MIXED = {  # name: (file of the refs, refs, expressions)
    "refcoco": ("refs(unc).p", 42_400, 120_600),
    "refcoco+": ("refs(unc).p", 42_300, 120_200),
    "refcocog": ("refs(umd).p", 42_200, 80_500),
    "grefcoco": ("grefs(unc).json", 209_300, 209_300),
}

READ_ALL = """
import json, pickle, sys, time
from pathlib import Path
began = time.process_time()
for path in sorted(Path(sys.argv[1]).glob("*/*")):
    with open(path, "rb") as file:
        content = pickle.load(file) if path.suffix == ".p" else json.load(file)
    del content
print(time.process_time() - began)
"""

MIX = """
import resource, sys, time
import datasets, torch
from segcompass.loaders.mixing import mix_rows
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
datasets.disable_progress_bars()
names = ("refcoco", "refcoco+", "refcocog", "grefcoco")
began = time.process_time()
parts = [{"dataset": name, "root": sys.argv[1], "image_dir": sys.argv[3]} for name in names]
mixture = mix_rows(parts, num_samples=int(sys.argv[4]))
assert [mixture.rows[index]["masks"] for index in range(100)]
removed = sum(line["removed"] for line in mixture.table)
seconds = time.process_time() - began
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(mixture.rows), removed)
"""

PREPARE = """
import sys, time
import datasets
from pathlib import Path
from segcompass.preparation import Conversion, prepare_data
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
began = time.process_time()
sys.stdout = sys.stderr
prepare_data(Conversion("refcoco", Path(sys.argv[4]), ["train"], sys.argv[1], Path(sys.argv[3])))
print(time.process_time() - began, file=sys.__stdout__)
"""


def make_mixed(folder, images, scale):
    """The four sets in folder/NAME and their images in `images`."""
    count = round(IMAGES * scale)
    generator, names = np.random.default_rng(0), list(MIXED)
    images.mkdir()
    Image.fromarray(generator.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(images / "one.jpg", quality=80)
    for number in range(count):
        os.link(images / "one.jpg", images / f"COCO_train2014_{number:012}.jpg")
    make_files(folder, scale)
    (folder / "refcoco" / "refs(unc).p").unlink()
    held_out = {name: set(range(place, count, 20)) for place, name in enumerate(names)}
    for name, (file, refs, expressions) in MIXED.items():
        (folder / name).mkdir(exist_ok=True)
        if name != "refcoco":
            os.link(folder / "refcoco" / "instances.json", folder / name / "instances.json")
        made, sentence = [], 0
        annotations, refs, each = round(ANNOTATIONS * scale), round(refs * scale), expressions / refs
        for number in range(refs):
            texts = [f"the thing number {n} on the left" for n in range(round(each * (number + 1)) - sentence)]
            asked = [
                {"sent_id": sentence + n, "sent": text, "raw": f"{text}.", "tokens": text.split()}
                for n, text in enumerate(texts)
            ]
            sentence += len(texts)
            first = number % annotations
            image = first % count
            second = (first + count) % annotations  # of the same image, but for the last annotations
            ids = [first] if number % 10 < 5 or second % count != image else [first, second]
            ids = ([-1] if number % 10 == 9 else ids) if name == "grefcoco" else first
            split = "val" if image in held_out[name] else "train"
            made.append(
                {"ref_id": number, "ann_id": ids, "category_id": 1, "image_id": image, "split": split}
                | {"file_name": f"COCO_train2014_{image:012}_{number}.jpg", "sentences": asked}
                | {"sent_ids": [one["sent_id"] for one in asked]}
            )
        path = folder / name / file
        path.write_bytes(json.dumps(made).encode() if file.endswith(".json") else pickle.dumps(made, protocol=2))


def measure_mixed(args):
    """Print and return what mixing costs."""
    with tempfile.TemporaryDirectory() as top:
        folder, images, cache = Path(top) / "REFER", Path(top) / "train2014", Path(top) / "cache"
        folder.mkdir()
        make_mixed(folder, images, args.scale)
        megabytes = sum(path.stat().st_size for path in folder.glob("*/*")) / 1e6
        rows = round(400_000 * args.scale)
        reading, refcoco = min(run(READ_ALL, folder)[0] for _ in range(args.repeats)), folder / "refcoco"
        first, peak, taken, removed = run(MIX, folder, cache, images, rows)
        later, later_peak, *_ = run(MIX, folder, cache, images, rows)
        (preparing,) = run(PREPARE, folder, cache, images, Path(top) / "prepared")
        size = sum(path.stat().st_size for path in (Path(top) / "prepared").iterdir())
        annotations = sum(path.stat().st_size for path in refcoco.iterdir())
    result = {
        "annotations_mb": megabytes,
        "rows": taken,
        "removed": removed,
        "read_seconds": reading,
        "first_seconds": first,
        "first_ratio": first / reading,
        "later_seconds": later,
        "later_ratio": later / reading,
        "peak_gb": max(peak, later_peak) * 2**30 / 1e9,
        "prepare_seconds": preparing,
        "folder_ratio": size / annotations,
    }
    lines = {
        f"annotations of four sets, {megabytes:,.0f} MB, read by json and pickle": (f"{reading:.1f} s", ""),
        f"{taken:,.0f} mixed rows, first": (f"{first:.1f} s, {first / reading:.2f} times", "≤ 5 times"),
        "the same, later": (f"{later:.1f} s, {later / reading:.2f} times", "≤ 1 time"),
        "peak memory": (f"{result['peak_gb']:.2f} GB", "< 1.5 GB"),
        "a prepared folder to its annotations, images by path": (f"{size / annotations:.2f}", "≤ 1.3"),
    }
    print("\n| what | measured | bar |\n|---|---|---|")
    print("\n".join(f"| {what} | {measured} | {bar or '–'} |" for what, (measured, bar) in lines.items()))
    print("RESULT " + json.dumps(result))


def make_files(folder, scale):
    """refs(unc).p and instances.json in folder/refcoco, `scale` times RefCOCO's size."""
    generator = np.random.default_rng(0)
    images, annotations, refs, expressions = (round(n * scale) for n in (IMAGES, ANNOTATIONS, REFS, EXPRESSIONS))
    folder = folder / "refcoco"
    folder.mkdir()
    angles = np.linspace(0, 2 * np.pi, 25, endpoint=False)
    content = []
    for number in range(annotations):
        centre, radii = generator.uniform((50, 50), (590, 430)), generator.uniform(10, 50, 2)
        points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1) * generator.uniform(
            0.8, 1.2, (25, 1)
        )
        polygon = np.round(points, 2).ravel().tolist()
        box = [*np.round(centre - radii, 2).tolist(), *np.round(2 * radii, 2).tolist()]
        content.append(
            {
                "segmentation": [polygon],
                "area": round(float(np.pi * radii.prod()), 3),
                "iscrowd": 0,
                "image_id": number % images,
                "bbox": box,
                "category_id": 1 + number % 80,
                "id": number,
            }
        )
    files = [
        {
            "id": n,
            "file_name": f"COCO_train2014_{n:012}.jpg",
            "height": 480,
            "width": 640,
            "license": 1,
            "coco_url": "x" * 60,
        }
        for n in range(images)
    ]
    (folder / "instances.json").write_text(json.dumps({"images": files, "annotations": content, "categories": []}))
    sentences = np.diff(np.linspace(0, expressions, refs + 1).astype(int))
    made, first = [], 0
    for number, count in enumerate(sentences.tolist()):
        asked = [
            {"sent_id": n, "sent": f"the thing number {n} on the left", "raw": f"The thing number {n}, on the left"}
            | {"tokens": ["the", "thing", "number", str(n), "on", "the", "left"]}
            for n in range(first, first + count)
        ]
        ids = list(range(first, first + count))
        ref = {"ref_id": number, "ann_id": number, "category_id": 1, "image_id": number % images, "split": "train"}
        made.append(ref | {"file_name": f"COCO_train2014_{number}.jpg", "sent_ids": ids, "sentences": asked})
        first += count
    (folder / "refs(unc).p").write_bytes(pickle.dumps(made, protocol=2))


def run(code, *arguments):
    """The numbers that the code prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(number) for number in done.stdout.split()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of RefCOCO's size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixed", action="store_true", help="measure mixing four data sets")
    args = parser.parse_args(argv)
    if args.mixed:
        measure_mixed(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), args.scale)
        megabytes = (Path(folder) / "refcoco" / "instances.json").stat().st_size / 1e6
        read, streamed, loaded, memory = [], [], [], []
        for repeat in range(args.repeats):
            read += run(READ, folder)
            for numbers, number in zip(
                (streamed, loaded, memory), run(LOAD, folder, Path(folder) / f"cache{repeat}"), strict=True
            ):
                numbers.append(number)
    result = {
        "instances_mb": megabytes,
        "read_seconds": min(read),
        "streamed_seconds": min(streamed),
        "streamed_ratio": min(streamed) / min(read),
        "load_seconds": min(loaded),
        "ratio": min(loaded) / min(read),
        "peak_gib": max(memory),
    }
    print(f"instances.json             {megabytes:8.1f} MB")
    print(f"json and pickle alone      {result['read_seconds']:8.2f} s")
    print(f"first 100 rows, streamed   {result['streamed_seconds']:8.2f} s   ratio {result['streamed_ratio']:.2f}")
    print(f"first 100 rows as Dataset  {result['load_seconds']:8.2f} s   ratio {result['ratio']:.2f}")
    print(f"peak memory of the loader  {result['peak_gib']:8.2f} GiB")
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
