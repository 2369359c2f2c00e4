"""Push a model, an SAE, a data set, the metric or a Space to the Hub, with its card.

    segcompass push model PATH USER/NAME --image photo.jpg --instruction "the mug nearest the sink" \\
        --evaluation runs/test/metrics.json --evaluation-name "Scenes, test" --evaluation-data USER/scenes
    segcompass push sae runs/mini/sae USER/sae-mini --quality runs/mini/sae/quality.json
    segcompass push dataset scenes USER/scenes --split test --seed 100 --num-samples 500
    segcompass push metric USER/reasoning_segmentation
    segcompass push space USER/NAME USER/SPACE    # a Space that shows a pushed model

The Hub is that of `HF_ENDPOINT`, the token that of `hf auth login` or `HF_TOKEN`. Prints the commit to pin.
`segcompass push KIND --help` lists the options of each kind.
"""

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcompass.shipped import default_scene

from . import options

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

GPS = 0x8825
"""The EXIF entry that says where a photograph was taken."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("push", __doc__)
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="KIND", help="model, sae, dataset, metric or space"
    )
    image, instruction = default_scene()
    model = kinds.add_parser("model", help="push a SegCompass model")
    model.add_argument("source", help="SegCompass folder")
    model.add_argument("--image", default=str(image), help="example image of the card's snippet; default: our scene")
    model.add_argument("--instruction", default=instruction, help="what the snippet asks about it")
    model.add_argument("--evaluation", help="metrics.json that `segcompass evaluate` wrote")
    model.add_argument("--evaluation-name", default="Scenes", help="how people call the data set it was evaluated on")
    model.add_argument("--evaluation-data", default="scenes", help="that data set's Hub id, ID@COMMIT, or loader")
    model.add_argument("--evaluation-split", default="test", help="its split; default: %(default)s")
    model.add_argument("--evaluation-command", help="the command that measured it")
    model.add_argument("--quality", help="quality.json that `segcompass train sae` wrote, for the SAE's table")
    model.add_argument("--training", help="JSON file of training arguments to list")
    model.add_argument("--limitations", help="what the model cannot do, in a sentence or two")
    model.add_argument("--emissions", type=float, help="grams of CO2 of its training, if known")
    model.add_argument(
        "--refer",
        nargs="*",
        default=[],
        metavar="PART=REPO[@REVISION]",
        help="parts that are kept in other repositories",
    )
    sae = kinds.add_parser("sae", help="push a sparse autoencoder")
    sae.add_argument("source", help="SAE folder")
    sae.add_argument("--quality", help="quality.json that `segcompass train sae` wrote")
    sae.add_argument("--dashboard", help="output folder of `segcompass dashboard`, pushed with it")
    data = kinds.add_parser("dataset", help="push a data set")
    data.add_argument("source", help=options.TRAINING_ROWS)
    data.add_argument(
        "--split",
        nargs="+",
        default=["test"],
        help="splits to push, together, since the card tells of these; default: test",
    )
    data.add_argument(
        "--dataset-seed", "--seed", dest="seed", type=int, default=0, help="seed of the procedural scenes"
    )
    data.add_argument(
        "--num-samples",
        type=options.positive,
        help="push only the first N rows; default: all, and 500 of data sets that are drawn as they are read",
    )
    data.add_argument(
        "--with-places", action="store_true", help="push photographs that say where they were taken (EXIF) as they are"
    )
    data.add_argument("--description", default="Rows for reasoning segmentation.", help="what the card says of them")
    metric = kinds.add_parser("metric", help="push the metric of this project")
    space = kinds.add_parser("space", help="push the demo as a Space that shows a pushed model")
    space.add_argument("source", help="the model's Hub id")
    for kind in (model, sae, data, metric, space):
        kind.add_argument("repo_id", help="USER/NAME")
        kind.add_argument("--branch", help="where to push; default: main")
        kind.add_argument("--private", action="store_true", help="make a new repository private")
        if kind is not space:
            kind.add_argument("--tag", help="name for the commit")
        if kind not in (metric, space):
            kind.add_argument("--license", default="apache-2.0", help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    print(f"{args.repo_id} is at {push(args).oid}")


def push(args: argparse.Namespace) -> "CommitInfo":
    """Push what the options name."""
    from datasets import DatasetDict

    from segcompass.hub_cards import push_dataset, push_metric, push_sae, push_space
    from segcompass.loaders import METRIC, load_rows
    from segcompass.loaders.registry import takes_streaming
    from segcompass.modeling_segcompass import SparseAutoencoder

    if args.kind == "space":
        return push_space(args.source, args.repo_id, branch=args.branch, private=args.private)
    where = {"branch": args.branch, "tag": args.tag, "private": args.private}
    if args.kind == "metric":
        return push_metric(METRIC, args.repo_id, **where)
    if args.kind == "dataset":
        number = args.num_samples or (500 if takes_streaming(args.source) else None)
        parts = {split: load_rows(args.source, split, args.seed, number) for split in args.split}
        for rows in parts.values():
            if not (args.with_places or args.private):
                check_places(rows)
        rows = DatasetDict(parts) if len(parts) > 1 else parts[args.split[0]]
        split = args.split[0] if len(parts) == 1 else None
        return push_dataset(rows, args.repo_id, args.description, split=split, license=args.license, **where)
    if args.kind == "sae":
        sae = SparseAutoencoder.from_pretrained(args.source)
        card = {"quality": _read(args.quality), "license": args.license}
        return push_sae(sae, args.repo_id, dashboard=args.dashboard, **card, **where)
    return push_model_with_card(args, where)


def check_places(rows: Any) -> None:
    """Refuse to publish photographs that say where they were taken.

    Args:
        rows: with a column `image`.

    Raises:
        ValueError: with the number of such images, and a sample.
    """
    from PIL import Image

    from segcompass.loaders.identity import encoded_key
    from segcompass.loaders.rows import leave_images_encoded

    told: dict[Any, str | None] = {}  # an image -> the first sample of one that says it
    for row in leave_images_encoded(rows.select_columns(["image", "sample_id"])):
        key = encoded_key(row["image"])
        if key is None or key in told:
            continue
        content = row["image"].get("bytes")
        with Image.open(row["image"]["path"] if content is None else BytesIO(content)) as image:
            told[key] = row["sample_id"] if GPS in image.getexif() else None
    samples = [sample for sample in told.values() if sample is not None]
    if samples:
        raise ValueError(
            f"{len(samples)} of {len(told)} images say where they were taken (GPS in EXIF), such as that of sample "
            f"{samples[0]!r}, and everybody could read it; save them without it (exiftool -gps:all= …), push with "
            "--private, or as they are with --with-places."
        )


def push_model_with_card(args: argparse.Namespace, where: dict) -> "CommitInfo":
    """Push a model, with what the options say about it on its card."""
    from segcompass.hub_cards import Evaluation, push_model
    from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
    from segcompass.modeling_segcompass.images import read_image

    check_evaluation(args)
    metrics = _read(args.evaluation)
    data, _, revision = args.evaluation_data.partition("@")
    measured = (args.evaluation_name, data, args.evaluation_split, args.evaluation_command, revision or None)
    card = {
        "evaluations": [Evaluation(metrics, *measured)] if metrics else [],
        "license": args.license,
        "sae_quality": _read(args.quality),
        "training": _read(args.training),
        "limitations": args.limitations,
        "emissions": args.emissions,
    }
    return push_model(
        SegCompassModel.from_pretrained(args.source),
        SegCompassProcessor.from_pretrained(args.source),
        args.repo_id,
        example=(read_image(args.image), args.instruction),
        references=dict(part.split("=", 1) for part in args.refer),
        **card,
        **where,
    )


def check_evaluation(args: argparse.Namespace) -> None:
    """Refuse metrics of another model, or of another split than the card would name. Raises ValueError."""
    from segcompass.journal import weights_of

    note = Path(args.evaluation or "").with_name("run.json") if args.evaluation else None
    if note is None or not note.exists():
        return
    run = json.loads(note.read_text(encoding="utf-8"))
    if run.get("weights") is not None and run["weights"] != weights_of(args.source):
        raise ValueError(
            f"{args.evaluation} was measured on the model {run.get('model')!r} as it was then, and {args.source} holds "
            "other files; evaluate what you push."
        )
    if run.get("split") not in (None, args.evaluation_split):
        raise ValueError(
            f"{args.evaluation} was measured on split {run['split']!r}, the card would say {args.evaluation_split!r}; "
            f"give --evaluation-split {run['split']}."
        )


def _read(path: str | None) -> dict | None:
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
