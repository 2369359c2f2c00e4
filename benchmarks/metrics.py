"""Is scoring masks as fast as the libraries' own? The same masks, in one run, with equal results.

    python benchmarks/metrics.py            (torchmetrics is compared where it is installed)

5,000 pairs of masks at 640 x 480, drawn like objects, as bool arrays and as RLE. Ours returns whole I and U of each
sample and the metrics of the split; pycocotools and torchmetrics are called as their documentation shows, for the same
IoUs. Times are the best of `--repeats`, the contestants in turn, data made beforehand. Memory is how much the process
grows from the first fifth of the samples to the last.
"""

import argparse
import json
import resource
import time

import numpy as np
from pycocotools import mask as coco_mask

from segcompass.loaders import METRIC
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts, sample_iou, summarise

HEIGHT, WIDTH = 480, 640
DISTINCT = 250  # pairs in memory as arrays; they are gone through again and again


def make_pairs(count, seed=0):
    """(count, 2, H, W) bool: two overlapping ellipses of an object's size each."""
    generator = np.random.default_rng(seed)
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    pairs = np.empty((count, 2, HEIGHT, WIDTH), dtype=bool)
    for pair in pairs:
        centre, radii = generator.uniform((100, 100), (540, 380)), generator.uniform(20, 150, 2)
        for mask in pair:
            cx, cy = centre + generator.normal(0, 15, 2)
            mask[:] = ((x - cx) / radii[0]) ** 2 + ((y - cy) / radii[1]) ** 2 <= 1
    return pairs


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def ours(pairs):
    counts = [sample_counts(prediction, reference) for prediction, reference in pairs]
    summarise(counts)
    return [sample_iou(each) for each in counts]


def pycocotools_iou(pairs):
    if isinstance(pairs[0][0], np.ndarray):
        pairs = [(encode(prediction), encode(reference)) for prediction, reference in pairs]
    return [coco_mask.iou([prediction], [reference], [0])[0, 0] for prediction, reference in pairs]


def torchmetrics_iou(pairs):
    import torch
    from torchmetrics.functional.classification import binary_jaccard_index

    return [
        binary_jaccard_index(torch.from_numpy(prediction), torch.from_numpy(reference)).item()
        for prediction, reference in pairs
    ]


def has_torchmetrics():
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        return False
    return True


def best_times(contestants, pairs, samples, repeats):
    """{name: seconds for `samples`}; raises when the IoUs differ."""
    rounds = -(-samples // len(pairs))
    expected, seconds = None, dict.fromkeys(contestants, np.inf)
    for _ in range(repeats):
        for name, score in contestants.items():
            began = time.perf_counter()
            for _ in range(rounds):
                ious = score(pairs)
            seconds[name] = min(seconds[name], (time.perf_counter() - began) * samples / (rounds * len(pairs)))
            expected = ious if expected is None else expected
            np.testing.assert_allclose(ious, expected, rtol=1e-6, err_msg=f"{name} computes something else")
    return seconds


def growth(pairs, samples):
    """MiB that the peak memory grows while the metric object takes the last four fifths of the samples."""
    import evaluate

    metric = evaluate.load(METRIC)
    marks = []
    for start in range(0, samples, len(pairs)):
        metric.add_batch(predictions=list(pairs[:, 0]), references=list(pairs[:, 1]))
        if start + len(pairs) >= samples // 5:
            marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    metric.compute()
    return (marks[-1] - marks[0]) / 1024


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    arrays = make_pairs(min(DISTINCT, args.samples))
    rles = [(encode(prediction), encode(reference)) for prediction, reference in arrays]
    contestants = {"ours": ours, "pycocotools": pycocotools_iou}
    result = {"samples": args.samples}
    for form, pairs in (("arrays", arrays), ("rle", rles)):
        torch_too = form == "arrays" and has_torchmetrics()
        seconds = best_times(
            contestants | ({"torchmetrics": torchmetrics_iou} if torch_too else {}), pairs, args.samples, args.repeats
        )
        fastest = min(value for name, value in seconds.items() if name != "ours")
        for name, value in seconds.items():
            print(f"{form:<8}{name:<14}{value:8.3f} s   {1e6 * value / args.samples:8.1f} us a sample")
        ratio = seconds["ours"] / fastest
        print(f"{form:<8}ours / fastest other: {ratio:.2f}")
        result |= {f"{form}_seconds": seconds, f"{form}_ratio": ratio}
    result["growth_mib"] = growth(arrays, args.samples)
    print(f"memory grows by {result['growth_mib']:.1f} MiB from sample {args.samples // 5} to {args.samples}")
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
