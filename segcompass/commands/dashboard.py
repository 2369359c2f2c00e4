"""Draw what each feature of a model's SAE does: a page to look at, and files for Neuronpedia.

    segcompass dictionary --model PATH --output runs/dictionary
    segcompass dashboard --model PATH --dictionary runs/dictionary --output runs/dashboard
    segcompass push sae runs/mini/sae USER/sae-mini --dashboard runs/dashboard

Beside what the dictionary knows (density, strongest contexts, what a feature detects), it segments rows and switches
each mask's heaviest concepts off, one at a time, to see how much of the mask goes. Writes into the output folder
    dashboard.html   the features, with a field to search them; it needs nothing but itself
    features.json    the same in short, for the card of `segcompass push sae`
    neuronpedia/     release, model, set, features, activations and explanations as Neuronpedia imports them; put your
                     user's id where CREATOR_ID stands
The rows are those that the dictionary was made from. Repeat the command to resume an interrupted run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("dashboard", __doc__)
    parser.add_argument("--model", required=True, help=f"{options.MODEL}, of which the dictionary is")
    parser.add_argument("--dictionary", type=Path, required=True, help="output folder of `segcompass dictionary`")
    parser.add_argument("--output", type=options.folder, required=True, help="folder that the results are written into")
    parser.add_argument("--name", default="", help="repository of the SAE, or a name; default: the model's name")
    parser.add_argument(
        "--num-masks",
        type=options.positive,
        default=100,
        help="rows whose masks concepts are switched off in; default: %(default)s",
    )
    parser.add_argument(
        "--num-features", type=options.positive, default=300, help="features shown at most; default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="rows read at once; default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    from segcompass.journal import Journal, weights_of
    from segcompass.loading import load
    from segcompass.modeling_segcompass.whole_files import read_signed_json, write_whole
    from segcompass.white_box.concept_dictionary import ConceptDictionary
    from segcompass.white_box.dashboard import (
        dashboard_page,
        feature_cards,
        promoted_words,
        steered_masks,
        summaries,
        summarise_steering,
    )
    from segcompass.white_box.dictionary_reader import TokenReader, patch_pictures
    from segcompass.white_box.examination import examine, read_rows
    from segcompass.white_box.neuronpedia import export_features

    note = args.dictionary / "run.json"
    dictionary = ConceptDictionary.from_pretrained(args.dictionary) if note.is_file() else None
    if dictionary is None:
        raise ValueError(
            f"{args.dictionary} is no output folder of `segcompass dictionary` (run.json, concepts.json); run that "
            "first."
        )
    made: dict[str, Any] = read_signed_json(note)
    if made["weights"] != weights_of(args.model):
        raise ValueError(
            f"{args.dictionary} is of the model {made['model']!r} as it was then, and {args.model} holds other files; "
            "run `segcompass dictionary` on this model."
        )
    rows = read_rows(made["dataset"], made["split"], int(made["seed"]), int(made["num_samples"]))
    run = {"dictionary": made, "num_masks": args.num_masks, "weights": made["weights"]}
    journal = Journal(args.output, run)
    model, processor = load(args.model)
    segmented = rows.select(range(min(args.num_masks, len(rows))))
    records = examine(journal, segmented, lambda batch: steered_masks(model, processor, batch), args.batch_size)
    scores = args.dictionary / "scores.json"
    detected = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else None
    cards = feature_cards(dictionary, detected, summarise_steering(records), args.num_features)
    words = promoted_words(model, processor, [card.entry.index for card in cards])
    for card in cards:
        card.promotes, card.demotes = words[card.entry.index]
    name = args.name or Path(args.model).name
    steering_of = f"Concepts were switched off in the masks of {len(segmented):,} rows, by the model's own reasoning."
    title = f"Features of {name}"
    page = dashboard_page(dictionary, cards, title, steering_of, patch_pictures(rows))
    write_whole(args.output / "dashboard.html", page)
    write_whole(args.output / "features.json", summaries(cards))
    reader = TokenReader(model, processor)
    folder = args.output / "neuronpedia"
    export_features(folder, reader, rows, cards, repo_id=name, source=dictionary.source, batch_size=args.batch_size)
    steering = sum(card.steered is not None for card in cards)
    print(f"{len(cards)} features shown, {steering} of them among the heaviest of some mask")
    print(f"wrote dashboard.html, features.json and neuronpedia/ to {args.output}")
