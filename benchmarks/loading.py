"""How long until the first 100 rows of a RefCOCO-sized data set, against reading its files at all?

    python benchmarks/loading.py

Makes annotation files of RefCOCO's size (142,000 expressions of 50,000 objects, 197,000 annotations, 20,000 images;
polygons of about 25 points), then measures in a fresh process each: `json.load` and `pickle.load` of the two files,
and `load_refcoco`, streamed and with `num_samples=100`, 100 rows read, without a cache. Times are
CPU seconds of one process, which other work on the machine hardly moves. Peak memory is the loader process's.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

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
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return [float(number) for number in done.stdout.split()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of RefCOCO's size")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
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
