"""Measure whether the white box means what it shows: six criteria, each beside random concepts.

    segcompass white-box --model PATH --num-samples 300 --output runs/white_box
    segcompass white-box --model PATH --dataset refcoco --split val --root REFER --image-dir train2014

The model writes its own reasoning on images whose objects are known, greedily; each right mask (confidence and IoU with
a target of 0.5 or more) is examined. All intervals are 95 % bootstrap intervals over images. Of procedural scenes the
looks are colour, shape and size; of annotated images the category, and the colour where an expression names it.
    name, name_look  share of a slot's weight on concepts that detect an attribute (a look) of its object
    selectivity      weight on attributes that only this object has, over weight on those that only others have
    pointing         the maximum of the shown map lies on the object
    auc_others       the shown map tells the object's patches from other objects' (0.5 is chance)
    move             another question's concepts make its object appear, whatever the concentration tokens say
    steer_own        IoU lost without the detectors of the object's looks, less that without as many random concepts
    steer_others     IoU lost without the detectors of another object's looks
    steer_flip       the looks' weight handed to another object's detectors makes that object appear
    content          share of what deleting the top 5 costs that is lost when only their content is the mean's
    shown            share of the mask that is lost when what fires on the image is taken away
    sum_error        greatest difference between the sum of what is shown and the heatmap
    write_swap       a colour or shape replaced while the response is written: the conclusion says the other one
    write_off        its detectors off while the response is written: the conclusion no longer names it
Concepts are labelled on other images: thresholds on training scenes, F1 and lift on scenes of another seed; annotated
images on two halves of the training split, without any that is examined. What cannot be measured is null, and
report.md says why. Prints as its last line "RESULT {json}", [mean, low, high] of each. Writes into the output folder
    metrics.json   all of it, with the controls
    report.md      the same as tables
    report.html    the same as bars, with intervals and controls
    items.jsonl    what was measured of each sample
Repeat the command to resume an interrupted run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from . import options

KEYS = (
    *("name", "name_look", "selectivity", "pointing", "auc_others", "move", "steer_own", "steer_others", "steer_flip"),
    *("content", "shown", "sum_error", "write_swap", "write_off"),
)
BARS = {
    "name": "≥ .60",
    "name_look": "≥ .50",
    "selectivity": "≥ 10",
    "pointing": "≥ .90",
    "auc_others": "≥ .93",
    "energy": "≥ .35",
    "move": "≥ .85",
    "steer_own": "≥ .45",
    "steer_others": "≤ .05",
    "steer_flip": "≥ .70",
    "content": "≥ .80",
    "shown": "≥ .80",
    "sum_error": "≤ 1e-5",
}
"""What the project requires of the lower end (of the upper, where it is ≤)."""
CONTROLS = {
    "name": "all active concepts alike",
    "name_look": "all active concepts alike",
    "selectivity": "all active concepts alike",
    "pointing": "all active concepts alike",
    "auc_others": "all active concepts alike",
    "energy": "all active concepts alike",
    "move": "the concentration tokens' object appears",
    "steer_flip": "the weight to as many random concepts",
    "content": "as many random concepts' content",
    "shown": "what fires on words taken away",
    "write_swap": "at each token a random direction of the same length",
    "write_off": "as many random concepts of the sample off",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("white-box", __doc__)
    parser.add_argument("--model", required=True, help=options.MODEL)
    options.add_rows(
        parser,
        "test",
        300,
        dataset="'scenes', 'mixed-scenes' or 'twin-scenes'; a benchmark of the RefCOCO family (with --root and "
        "--image-dir); coco (with --root); a folder of `segcompass prepare-data … --instances`, or a .jsonl file with "
        "instances",
        seed_of="the scenes and the random concepts",
    )
    options.add_benchmark(parser)
    parser.add_argument(
        "--label-samples",
        type=options.positive,
        default=400,
        help="training images that label the concepts, and three quarters as many held-out ones; default: %(default)s",
    )
    parser.add_argument(
        "--label-seed",
        type=int,
        default=900101,
        help="of those training scenes, the held-out ones have the next; default: %(default)s",
    )
    parser.add_argument(
        "--label-split", default="train", help="of annotated images: split that labels; default: %(default)s"
    )
    parser.add_argument(
        "--held-out-split",
        help="split that F1 and lift of labels are measured on; default: test of scenes, other images of --label-split",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="samples segmented at once; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=options.folder,
        default=Path("runs/white_box"),
        help="folder for the results; default: %(default)s",
    )
    args = parser.parse_args(argv)
    from segcompass.loaders.scenes import STYLES

    scenes = args.dataset in STYLES
    if args.dataset in ("reasonseg", "obelics"):
        parser.error(
            f"--dataset is {args.dataset!r}, whose rows do not say what else is in their images; the criteria need all "
            "objects: use 'scenes', 'mixed-scenes' or the RefCOCO family, or instances of your own (docs/data.md)."
        )
    if scenes and args.label_split != "train":
        parser.error(f"--label-split is {args.label_split!r}; scenes are labelled on their training split.")
    if scenes and args.held_out_split is None:
        args.held_out_split = "test"
    if args.label_samples < 2:
        parser.error(f"--label-samples is {args.label_samples}; at least 2 are needed.")
    if scenes and (args.split, args.seed) in (("train", args.label_seed), (args.held_out_split, args.label_seed + 1)):
        parser.error(
            f"--seed is {args.seed}: these scenes of split {args.split!r} label the concepts, and labels must come "
            "from others than those examined; choose another --seed or --label-seed."
        )
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command with these options (None takes the process's own) and return the content of metrics.json."""
    args = parse(argv)
    from segcompass.journal import Journal, weights_of
    from segcompass.loaders.identity import rows_digest
    from segcompass.loaders.scenes import STYLES
    from segcompass.loading import load
    from segcompass.modeling_segcompass.whole_files import read_signed_json, signed_json, write_whole
    from segcompass.white_box.concept_access import reading_of
    from segcompass.white_box.concept_labels import find_labels, reference_batches
    from segcompass.white_box.criteria import summarise_criteria
    from segcompass.white_box.criteria_page import criteria_page
    from segcompass.white_box.criteria_records import measure_images
    from segcompass.white_box.examination import annotated_rows, examine, read_rows, truths_of

    where = {name: getattr(args, name) for name in ("root", "image_dir", "split_by")}
    if args.dataset in STYLES:
        rows = read_rows(args.dataset, args.split, args.seed, args.num_samples)
    else:
        rows = annotated_rows(args.dataset, args.split, args.num_samples, **where)
    run = {name: value for name, value in vars(args).items() if name not in ("output", "batch_size")}
    journal = Journal(args.output, {**run, "weights": weights_of(args.model), "rows": rows_digest(rows)})
    found_file = args.output / "labels.json"
    if any(name not in journal.records for name in rows["sample_id"]):
        scored = max(1, args.label_samples * 3 // 4)
        labelled = (args.label_split, args.held_out_split, args.label_seed, args.label_samples, scored)
        truths = truths_of(set(rows["image_id"]), args.dataset, *labelled, **where)
        model, processor = load(args.model)
        reading_class = reading_of(model)
        found = find_labels(model, processor, truths, args.batch_size)
        counts = {**found.counts, "held-out split": args.held_out_split}
        write_whole(found_file, signed_json(counts) + "\n")
        means = reading_class.gather_means(model, reference_batches(model, processor, truths, args.batch_size))
        numbers = {name: number for number, name in enumerate(rows["sample_id"])}

    def measure_batch(batch):
        places = [numbers[row["sample_id"]] for row in batch]
        return measure_images(model, processor, batch, places, truths, args.seed, found.labels, means)

    records = examine(journal, rows, measure_batch, args.batch_size)
    measured = {
        part: [(record["sample_id"], value) for record in records for value in record[part]]
        for part in ("slots", "moves", "twins", "steered")
    }
    values = {part: [value for _, value in pairs] for part, pairs in measured.items()}
    images = {part: [name for name, _ in pairs] for part, pairs in measured.items()}
    metrics = summarise_criteria(
        values["slots"],
        images["slots"],
        values["moves"],
        images["moves"],
        values["twins"],
        images["twins"],
        values["steered"],
        images["steered"],
        seed=args.seed,
    )
    metrics = {
        **metrics,
        "scenes": len(records),
        "scenes_with_masks": len(set(images["slots"])),
        "heaviest_concepts": len({slot["heaviest"] for slot in values["slots"]}),
        "labels": read_signed_json(found_file),
    }
    metrics["not measured"] = not_measured(metrics, records)
    write_whole(args.output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    source = f"{args.model}, {args.dataset}, split {args.split}, seed {args.seed}"
    page = report(metrics, source)
    write_whole(args.output / "report.md", page)
    write_whole(args.output / "report.html", criteria_page(metrics, source, BARS, CONTROLS))
    print(page)
    print("RESULT " + json.dumps({name: metrics[name] for name in KEYS}))
    return metrics


def not_measured(metrics: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    """Why criteria are None.

    Args:
        metrics: of `summarise_criteria`.
        records: of `measure_images`.

    Returns:
        Criterion -> a sentence, of those that are None.
    """
    several = sum(record["objects"] > 1 for record in records)
    asked = sum(record["asked"] for record in records)
    looks = metrics["labels"]["looks"]
    alone = f"no right mask is of an object whose looks have labels; {looks} looks have labels"
    other = f"{several} of {len(records)} images have a second object"
    reasons = {
        "name_look": alone,
        "selectivity": f"{other}, and none of them a right mask with labels that only one of the two has",
        "auc_others": f"{other}, and none of them a right mask beside an object that fills half a patch",
        "move": f"{asked} of {len(records)} images have two objects that can each be asked for, and in none of these "
        "were both questions' own masks right",
        **dict.fromkeys(
            ("steer_own", "steer_others", "steer_flip"),
            f"{other}, and none of them a right mask of the one target that differs from it in a look with labels; "
            f"{looks} looks have labels",
        ),
        **dict.fromkeys(
            ("write_swap", "write_off", "write_doubled"),
            "no response's conclusion names an attribute that has patch detectors",
        ),
        "twins": "no target shares its name with another object",
    }
    empty = "no mask was right"
    examined = ("move", "twins", "write_swap", "write_off", "write_doubled")
    names = (*BARS, "write_swap", "write_off", "write_doubled", "twins")
    return {
        name: reasons.get(name, empty) if metrics["masks"] or name in examined else empty
        for name in names
        if metrics[name] is None
    }


def report(metrics: dict[str, Any], source: str) -> str:
    """The criteria as a page.

    Args:
        metrics: content of metrics.json.
        source: what was examined.

    Returns:
        Markdown.
    """
    from segcompass.white_box.criteria_page import caution

    labels = metrics["labels"]
    held_out = f" of split {labels['held-out split']}" if labels["held-out split"] else ""
    nameless = ", ".join(labels["looks without a name"]) or "none"
    lines = [
        "# Does the white box mean what it shows?",
        "",
        f"{source}: {metrics['masks']} right masks in {metrics['scenes_with_masks']} of {metrics['scenes']} images, "
        f"{metrics['pairs']} exchanges between two questions. Mean [95 % interval over images]. "
        f"{caution(metrics['scenes_with_masks'])}".rstrip(),
        "",
        "| criterion | measured | control | the control is | bar |",
        "|---|---|---|---|---|",
    ]
    for name, bar in BARS.items():
        control = _interval(metrics["controls"].get(name))
        lines.append(f"| {name} | {_interval(metrics[name])} | {control} | {CONTROLS.get(name, '–')} | {bar} |")
    for name in ("write_swap", "write_off"):
        control = _interval(metrics["controls"][name])
        lines.append(f"| {name} | {_interval(metrics[name])} | {control} | {CONTROLS[name]} | – |")
    lines += [
        "",
        f"Written again under steering: {metrics['steered responses']} responses. With the same concepts doubled, the "
        f"wrong sign, {_interval(metrics['write_doubled'])} no longer name the attribute.",
    ]
    if metrics["not measured"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name}: {why}." for name, why in metrics["not measured"].items()]
    if labels["missing"]:
        lines += ["", "What these data cannot say:", "", *(f"- {sentence}" for sentence in labels["missing"])]
    lines += ["", f"Objects whose looks another object has too, found: {_interval(metrics['twins'])} (bar ≥ .80)."]
    shared = {name: "–" if value is None else value for name, value in labels["shared"].items()}
    shared |= {name: f"{value:.3f}" for name, value in shared.items() if isinstance(value, float)}
    lines += [
        f"Words and patches share {shared['concepts']} concepts for {shared['looks']} of {labels['looks']} looks "
        f"(F1 ≥ 0.5 on both; bar ≥ 10), with exchanged words {shared['control concepts']} for "
        f"{shared['control looks']}. A word's own code finds its patches with AUC {shared['identity']} (exchanged "
        f"{shared['control identity']}; bar ≥ .90). "
        "Cosine of these concepts' decoder rows with what sets the looks apart: "
        f"{shared['cosine on patches']} on patches, {shared['cosine on words']} on words (bar ≥ .5).",
    ]
    lines += ["", "| IoU of the masks | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {_interval(value)} |" for name, value in metrics["iou"].items()]
    lines += [
        "",
        f"{metrics['heaviest_concepts']} different concepts are the heaviest of a mask. {labels['name something']} of "
        f"{labels['concepts']} concepts name an attribute, {labels['name a look']} a look (F1 ≥ 0.8 and lift ≥ 0.5 on "
        f"{labels['held-out scenes']} held-out images{held_out}, thresholds from "
        f"{labels['training scenes']} training images); looks without a name: {nameless}.",
        "",
    ]
    return "\n".join(lines)


def _interval(values: Any) -> str:
    if values is None:
        return "–"
    if isinstance(values, float):
        return f"{values:.3g}"
    estimate, low, high = values
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
