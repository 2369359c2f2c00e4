"""List what each concept of a model fires on, name the concepts, and score the names where the truth is known.

    segcompass dictionary --model PATH --output runs/dictionary
    segcompass dictionary --model PATH --dataset FOLDER --split train --output runs/dictionary --save-to PATH
    segcompass dictionary --model PATH --dataset refcoco --root REFER --image-dir train2014 --output runs/dictionary

Reads the SAE's activations on images, instructions and reference reasoning. Writes into the output folder
    concepts.json     of each feature: density, strength, what it fires on, its strongest contexts and a short label
    dictionary.html   the same to look at
    scores.json       where the objects are known: how well features detect attributes
Objects are known on scenes, and on annotated images: of the RefCOCO family, of a folder that `segcompass prepare-data …
--instances` wrote, and of a .jsonl file with instances. There the label of a concept that detects an attribute on
patches or words (held-out F1 of 0.8 and lift of 0.5 or more) is that attribute.
`segcompass segment`, `explain` and the Space show a concept's label where its model's folder holds a concepts.json.

The command prints for each attribute (of scenes colour, shape and size; of annotated images category, and colour where
an expression names it) the feature and threshold that detect it best, and their F1, lift, precision and recall on
held-out images: scenes of another split, or further annotated images of the same. Lift is what F1
has above a feature that always fires, as a share of what is above that: 0 means nothing was detected. Three readings:
    scene  the feature fires on some image patch  <=>  some object of the scene has the attribute
    patch  it fires on an image patch             <=>  half of that patch or more shows such an object
    word   it fires on a word piece               <=>  the word is the attribute's name
Image patches come before the instruction, so no word can give them anything away. Repeat the command to resume an
interrupted run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("dictionary", __doc__)
    parser.add_argument("--model", required=True, help=options.MODEL)
    options.add_rows(parser, "train", 600, seed=5, dataset=options.ROWS)
    options.add_benchmark(parser)
    parser.add_argument(
        "--held-out-split",
        help="split that labels are scored on; default: test of scenes, further images of --split of annotated data",
    )
    parser.add_argument(
        "--held-out-samples",
        type=options.positive,
        default=300,
        help="how many images labels are scored on; default: %(default)s",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=32, help="samples read at once; default: %(default)s"
    )
    parser.add_argument(
        "--contexts", type=options.positive, default=6, help="strongest places kept per feature; default: %(default)s"
    )
    parser.add_argument("--output", type=options.folder, required=True, help="folder that the results are written into")
    parser.add_argument("--save-to", type=Path, help="folder of a model or an SAE that also gets concepts.json")
    args = parser.parse_args(argv)
    if args.dataset == "scenes" and args.held_out_split is None:
        args.held_out_split = "test"
    return args


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Run the command with these options (None takes the process's own); the scores, None where nothing is known."""
    args = parse(argv)
    from segcompass.journal import Journal, weights_of
    from segcompass.loaders.identity import rows_digest
    from segcompass.loading import load
    from segcompass.modeling_segcompass.patch_boxes import grid_shape
    from segcompass.modeling_segcompass.whole_files import write_whole
    from segcompass.white_box.annotated_truth import patch_texts as texts_of_patches
    from segcompass.white_box.concept_labels import read_labelled, score_looks
    from segcompass.white_box.dictionary_reader import TokenReader, build_dictionary, patch_pictures
    from segcompass.white_box.examination import read_rows, truths_of
    from segcompass.white_box.image_truth import looks_of
    from segcompass.white_box.scene_attributes import (
        ATTRIBUTES,
        detected_attributes,
        labelled_activations,
        patch_words,
        score_attributes,
    )

    where = {name: getattr(args, name) for name in ("root", "image_dir", "split_by")}
    rows = read_rows(args.dataset, args.split, args.seed, args.num_samples, instances=True, **where)
    run = {name: str(value) for name, value in vars(args).items() if name not in ("output", "save_to")}
    journal = Journal(args.output, {**run, "weights": weights_of(args.model), "rows": rows_digest(rows)})
    model, processor = load(args.model)
    reader = TokenReader(model, processor)
    scenes = args.dataset == "scenes"
    patch_texts, truths = None, None
    if scenes:
        patch_texts = lambda number, boxes: patch_words(args.split, args.seed, number, grid_shape(boxes))  # noqa: E731
    elif "instances" in rows.column_names:
        labelled = (args.split, args.held_out_split, args.seed, args.num_samples, args.held_out_samples)
        truths = truths_of([], args.dataset, *labelled, **where)
        patch_texts = texts_of_patches(rows)
    dictionary = build_dictionary(
        reader,
        rows,
        source=f"{args.dataset}, split {args.split}, {len(rows)} samples",
        partial=args.output / "partial.pt",
        contexts=args.contexts,
        batch_size=args.batch_size,
        patch_words=patch_texts,
    )
    fired = sum(entry.density > 0 for entry in dictionary.entries)
    print(f"{fired} of {len(dictionary.entries)} features fired on {dictionary.tokens} tokens")
    scores = None
    if scenes:
        chosen = labelled_activations(reader, args.split, args.seed, args.num_samples, args.batch_size)
        held_out = labelled_activations(
            reader, args.held_out_split, args.seed + 1, args.held_out_samples, args.batch_size
        )
        scores = score_attributes(chosen, held_out)
        dictionary.name(detected_attributes(chosen, held_out))
        looks = ATTRIBUTES
    elif truths is not None:
        read, other = (
            read_labelled(reader, truths, part, args.batch_size, name)
            for part, name in zip(truths.label_rows(), ("labels, thresholds", "labels, F1 and lift"), strict=True)
        )
        scores, names = score_looks(read, other, truths)
        dictionary.name(names)
        looks = looks_of(truths)
        print("\n".join(truths.missing))
    if scores is not None:
        write_whole(journal.path.with_name("scores.json"), json.dumps(scores, indent=2) + "\n")
        report(scores, looks)
    dictionary.save_pretrained(args.output)
    if args.save_to:
        dictionary.save_pretrained(args.save_to)
    write_whole(journal.path.with_name("dictionary.html"), dictionary.to_html(patch_pictures(rows), scores=scores))
    print(f"wrote concepts.json and dictionary.html to {args.output}")
    return scores


def report(scores: dict[str, dict[str, dict[str, float]]], looks: Sequence[str]) -> None:
    """Print the scores.

    Args:
        scores: reading -> attribute -> the fields of a Detector.
        looks: the attributes.
    """
    from segcompass.white_box.scene_attributes import READINGS

    width = max(10, *(len(name) + 2 for name in looks)) if looks else 10
    print("\nF1 on held-out images, lift (precision / recall) #feature")
    print(f"{'attribute':<{width}}" + "".join(f"{reading:<36}" for reading in READINGS))
    for name in looks:
        print(f"{name:<{width}}" + "".join(f"{_cell(scores[reading].get(name)):<36}" for reading in READINGS))
    for reading in READINGS:
        good = sum(detector["f1"] >= 0.8 and detector["lift"] >= 0.5 for detector in scores[reading].values())
        print(f"{reading}: {good} of {len(looks)} attributes with F1 >= 0.8 and lift >= 0.5")


def _cell(detector: dict[str, float] | None) -> str:
    if detector is None:
        return "–"
    scores = f"{detector['f1']:.3f}, {detector['lift']:.2f}"
    return f"{scores} ({detector['precision']:.2f} / {detector['recall']:.2f}) #{detector['index']}"
