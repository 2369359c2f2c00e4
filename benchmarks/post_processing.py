"""What do masks at a photograph's own size cost, beside resizing the masks that win and nothing else?

    python benchmarks/post_processing.py
    python benchmarks/post_processing.py --size 1000 1500 --winning 2

`post_process_instance_segmentation` of one image with 6 slots, all of which win unless told otherwise. The peer takes
the winning slots' logits to the image's size, one after the other, by torch's `interpolate` and compares them with 0:
no confidences, no boxes, no checks. Calls alternate; seconds are medians of what one thread computed. Each peak of
memory is that of a process of its own, above what it had just before the call; the masks that come back are in it.

Keys of RESULT: ratio (of seconds), gigabytes (of the peak), peer_gigabytes, masks_gigabytes (what comes back), ...
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from workload import MINI

from segcompass.modeling_segcompass import SegCompassProcessor

LOGITS = 256
NAMES = ("post-processing", "resizing alone")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[4000, 6000], help="height and width in pixels")
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--winning", type=int, default=6, help="of the slots, those that are confident")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def prepared(args):
    """{name: call} of both, on the same logits of smooth blobs."""
    torch.set_num_threads(1)
    processor = SegCompassProcessor.from_pretrained(MINI)
    coarse = torch.randn(1, args.slots, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.interpolate(coarse, (LOGITS, LOGITS), mode="bicubic") * 4
    confident = torch.tensor([[1.0 if slot < args.winning else -1.0 for slot in range(args.slots)]])
    outputs = SimpleNamespace(
        pred_masks=logits, pred_logits=confident, slot_mask=torch.ones(1, args.slots, dtype=torch.bool)
    )
    side, (rows, columns) = processor.frame.side, processor.frame.reshaped_size(*args.size)

    def resized(slot):
        frame = torch.nn.functional.interpolate(logits[:, slot, None], (side, side), mode="bilinear")
        return torch.nn.functional.interpolate(frame[..., :rows, :columns], args.size, mode="bilinear")[0, 0] > 0

    calls = (
        lambda: processor.post_process_instance_segmentation(outputs, target_sizes=[args.size]),
        lambda: torch.stack([resized(slot) for slot in range(args.winning)]),
    )
    return dict(zip(NAMES, calls, strict=True))


def peak_of(name, args, answers):
    """Put into `answers` by how many gigabytes one call raises this process's peak."""
    call = prepared(args)[name]
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, others kilobytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    answers.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)


def main(argv=None):
    args = parse(argv)
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for name in NAMES:  # first: a process begins with the peak of the one that starts it
        answers = spawn.Queue()
        process = spawn.Process(target=peak_of, args=(name, args, answers))
        process.start()
        peaks[name] = answers.get()
        process.join()
    calls = prepared(args)
    (found,), alone = (call() for call in calls.values())
    differ = float((found["masks"] != alone).float().mean())
    seconds = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name in NAMES:
        print(f"{name:<16} {medians[name]:.3f} s   {peaks[name]:.3f} GB at its peak")
    result = {"ratio": round(medians[NAMES[0]] / medians[NAMES[1]], 3)}
    result |= {"gigabytes": round(peaks[NAMES[0]], 3), "peer_gigabytes": round(peaks[NAMES[1]], 3)}
    result |= {"masks_gigabytes": round(args.winning * args.size[0] * args.size[1] / 1e9, 3)}
    result |= {"pixels_that_differ": differ, "size": args.size, "slots": args.slots, "winning": args.winning}
    result |= {"seconds": {name: round(value, 3) for name, value in medians.items()}}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
