"""How far does the choice of a protocol move the number? The same synthetic predictions, scored under each.

    python benchmarks/protocols.py

A made-up split of referred objects, each with three sentences, some of no object or of several, some images with an
ignored region; and a made-up model that finds a slightly wrong ellipse, sometimes adds a spurious one, sometimes
nothing, differently for each sentence. No model was run: the table shows what rules do, not what a model can do.
`docs/protocols.md` holds the table.
"""

import argparse
import json

import numpy as np

from segcompass.loaders.masks import decode_mask, encode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import PROTOCOLS, sample_counts, summarise

SIZES = ((120, 160), (160, 120), (90, 200), (240, 320))  # of the images: height, width
SENTENCES = 3
NAMES = ("gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.5")


def ellipse(size, centre, radii):
    """bool (h, w); centre and radii as shares of the image's width and height."""
    y, x = np.ogrid[: size[0], : size[1]]
    return ((x / size[1] - centre[0]) / radii[0]) ** 2 + ((y / size[0] - centre[1]) / radii[1]) ** 2 <= 1


def make_refs(count, seed):
    """`count` refs: {"size", "instances": masks, "ignore": mask or None, "predictions": SENTENCES lists of masks}."""
    generator = np.random.default_rng(seed)
    refs = []
    for _ in range(count):
        targets = generator.choice([0, 1, 2, 3], p=[0.12, 0.7, 0.12, 0.06])
        size = SIZES[generator.integers(len(SIZES))]
        places = [(generator.uniform(0.15, 0.85, 2), generator.uniform(0.04, 0.22, 2)) for _ in range(targets)]
        ignore = None
        if targets and generator.random() < 0.3:  # beside the target, as ambiguous parts are marked
            centre, radii = places[0]
            beside = ellipse(size, centre + radii * generator.uniform(0.6, 1.2), radii * 0.8)
            ignore = beside & ~ellipse(size, centre, radii)
        predictions = [predict(generator, size, places) for _ in range(SENTENCES)]
        instances = [ellipse(size, *place) for place in places]
        refs.append({"size": size, "instances": instances, "ignore": ignore, "predictions": predictions})
    return refs


def predict(generator, size, places):
    found = []
    for centre, radii in places:
        if generator.random() < 0.88:
            error = generator.normal(0, 0.25, 2)
            found.append(ellipse(size, centre + error * radii, radii * generator.uniform(0.85, 1.3, 2)))
    if generator.random() < (0.1 if places else 0.35):
        found.append(ellipse(size, generator.uniform(0.15, 0.85, 2), generator.uniform(0.03, 0.14, 2)))
    return found


def samples(refs, unit):
    """(predicted masks, instances, ignore) of each sample of a unit, as RLE.

    A merged question is answered by what most of its sentences' predictions agree on.
    """
    for ref in refs:
        answers = ref["predictions"] if unit == "sentence" else ref["predictions"][:1]
        if unit == "merged":
            unions = [np.any([np.zeros(ref["size"], bool), *masks], axis=0) for masks in ref["predictions"]]
            answers = [[np.sum(unions, axis=0) * 2 > SENTENCES]]
        for masks in answers:
            ignore = None if ref["ignore"] is None else encode_mask(ref["ignore"])
            yield [encode_mask(m) for m in masks if m.any()], [encode_mask(m) for m in ref["instances"]], ignore


def resized(sample, side):
    """A sample at a square size, as the network of ReLA sees it: nearest pixels."""

    def each(rles):
        masks = [decode_mask([rle], *rle["size"]) for rle in rles]
        grid = [np.ix_(np.arange(side) * len(m) // side, np.arange(side) * m.shape[1] // side) for m in masks]
        return [encode_mask(mask[places]) for mask, places in zip(masks, grid, strict=True)]

    predicted, instances, ignore = sample
    return each(predicted), each(instances), None if ignore is None else each([ignore])[0]


def score(given, protocol):
    return summarise((sample_counts(*sample, protocol) for sample in given), protocol)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    refs = make_refs(args.refs, args.seed)
    by_unit = {unit: list(samples(refs, unit)) for unit in ("sentence", "ref", "merged")}
    table = []
    for protocol, rules in PROTOCOLS.items():
        table.append((protocol, "sentence", score(by_unit["sentence"], protocol)))
        if rules.unit != "sentence":
            table.append((protocol, rules.unit, score(by_unit[rules.unit], protocol)))
    square = [resized(sample, 480) for sample in by_unit["sentence"]]
    table.insert(1, ("rela at 480 x 480", "sentence", score(square, "rela")))

    print("| protocol | unit | " + " | ".join(NAMES) + " | n | left out |")
    print("|---" * (len(NAMES) + 4) + "|")
    for protocol, unit, metrics in table:
        values = " | ".join("none" if metrics[name] is None else f"{100 * metrics[name]:.1f}" for name in NAMES)
        print(f"| {protocol} | {unit} | {values} | {metrics['n']} | {metrics['n_skipped']} |")
    result = {f"{protocol}/{unit}": {name: metrics[name] for name in NAMES} for protocol, unit, metrics in table}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
