"""Push a model, an SAE, a data set or the metric to the Hub, with its card.

    python examples/push_to_hub.py model examples/checkpoints/mini USER/segcompass-mini \\
        --image examples/scene.png --instruction "everything to the left of the blue star" \\
        --evaluation runs/test/metrics.json --evaluation-name "Scenes, test" --evaluation-data scenes
    python examples/push_to_hub.py sae runs/mini/sae USER/sae-mini --quality runs/mini/sae/quality.json
    python examples/push_to_hub.py dataset scenes USER/scenes --split test --seed 100 --num-samples 500
    python examples/push_to_hub.py metric loaders/reasoning_segmentation USER/reasoning_segmentation

The Hub is that of `HF_ENDPOINT`, the token that of `hf auth login` or `HF_TOKEN`. Prints the commit to pin.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from segcompass.hub_cards import Evaluation, push_dataset, push_metric, push_model, push_sae
from segcompass.loaders import load_rows
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder

HERE = Path(__file__).parent


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("model", help="a SegCompass folder")
    scene = json.loads((HERE / "scene.json").read_text())
    model.add_argument("--image", default=str(HERE / scene["image"]), help="example image of the card's snippet")
    model.add_argument("--instruction", default=scene["instruction"], help="what the snippet asks about it")
    model.add_argument("--evaluation", help="metrics.json of examples/evaluate.py")
    model.add_argument("--evaluation-name", default="Scenes", help="how people call that data set")
    model.add_argument("--evaluation-data", default="scenes", help="its Hub id or loader")
    model.add_argument("--evaluation-split", default="test")
    model.add_argument("--evaluation-command", help="the command that measured it")
    model.add_argument("--quality", help="quality.json of examples/train_sae.py, for the SAE's table")
    model.add_argument("--training", help="JSON file of training arguments to list")
    model.add_argument("--limitations", help="what the model cannot do, in a sentence or two")
    model.add_argument("--emissions", type=float, help="grams of CO2 of its training, if known")
    model.add_argument("--refer", nargs="*", default=[], metavar="PART=REPO[@REVISION]", help="parts kept elsewhere")
    sae = kinds.add_parser("sae", help="a SparseAutoencoder folder")
    sae.add_argument("--quality", help="quality.json of examples/train_sae.py")
    data = kinds.add_parser("dataset", help="'scenes' or a folder written by Dataset.save_to_disk")
    data.add_argument("--split", default="test")
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--num-samples", type=int, default=500)
    data.add_argument("--description", default="Rows for reasoning segmentation.")
    metric = kinds.add_parser("metric", help="a metric module's folder")
    for kind in (model, sae, data, metric):
        kind.add_argument("source")
        kind.add_argument("repo_id", help="USER/NAME")
        kind.add_argument("--branch", help="where to push (default: main)")
        kind.add_argument("--tag", help="name for the commit")
        kind.add_argument("--private", action="store_true")
        if kind in (model, sae, data):
            kind.add_argument("--license", default="apache-2.0")
    return parser.parse_args(argv)


def read(path):
    return json.loads(Path(path).read_text()) if path else None


def push(args):
    where = {"branch": args.branch, "tag": args.tag, "private": args.private}
    if args.kind == "metric":
        return push_metric(args.source, args.repo_id, **where)
    if args.kind == "dataset":
        rows = load_rows(args.source, args.split, args.seed, args.num_samples)
        told = {"split": args.split, "license": args.license}
        return push_dataset(rows, args.repo_id, args.description, **told, **where)
    if args.kind == "sae":
        sae = SparseAutoencoder.from_pretrained(args.source)
        return push_sae(sae, args.repo_id, quality=read(args.quality), license=args.license, **where)
    model = SegCompassModel.from_pretrained(args.source)
    processor = SegCompassProcessor.from_pretrained(args.source)
    references = dict(part.split("=", 1) for part in args.refer)
    metrics = read(args.evaluation)
    told = (args.evaluation_name, args.evaluation_data, args.evaluation_split, args.evaluation_command)
    card = {
        "evaluations": [Evaluation(metrics, *told)] if metrics else [],
        "license": args.license,
        "sae_quality": read(args.quality),
        "training": read(args.training),
        "limitations": args.limitations,
        "emissions": args.emissions,
    }
    example = (Image.open(args.image).convert("RGB"), args.instruction)
    return push_model(model, processor, args.repo_id, example, references=references, **card, **where)


def main(argv=None):
    args = parse(argv)
    print(f"{args.repo_id} is at {push(args).oid}")


if __name__ == "__main__":
    main()
