"""Encode every image of a data set once with a model's frozen SAM encoder, for trainers and evaluators to read.

    python examples/precompute_image_features.py --model PATH --dataset FOLDER --split train --output runs/features
    python examples/train_grpo.py --config RECIPE.yaml --image_features runs/features
    python examples/evaluate.py --model PATH --dataset FOLDER --output runs/val --image-features runs/features

SAM ViT-H's features take 2 MB an image in float16. Repeat the command after an interruption, or with another split or
data set: images that are there already are skipped.
"""

import argparse

import torch
from tqdm import tqdm

from segcompass.loaders import load_rows
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers.image_features import ImageFeatureWriter, encoder_id, image_key


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SegCompass folder or Hub id, whose SAM encoder is used")
    parser.add_argument("--dataset", default="scenes", help="'scenes' or a folder written by Dataset.save_to_disk")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shard-size", type=int, default=256, help="images a shard; a killed run loses at most one")
    parser.add_argument("--output", required=True, help="folder of the cache")
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    return args


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    try:
        rows = load_rows(args.dataset, args.split, args.seed, args.num_samples)
        processor = SegCompassProcessor.from_pretrained(args.model)
        model = SegCompassModel.from_pretrained(args.model, dtype="float32")
        sam_id = encoder_id(model.image_encoder, processor.encoder_image_processor)
        writer = ImageFeatureWriter(args.output, sam_id, model.config.image_encoder_config.image_size, args.shard_size)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(str(error)) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found, batch = len(writer.known), {}

    def encode():
        inputs = processor.encoder_inputs(list(batch.values()))
        features = model.get_image_embeddings(inputs["encoder_pixel_values"].to(model.device))
        for key, feature in zip(batch, features, strict=True):
            writer.add(key, feature)
        batch.clear()

    for row in tqdm(rows, unit="row", dynamic_ncols=True):
        key = image_key(row["image"])
        if key in writer or key in batch:
            continue
        batch[key] = row["image"]
        if len(batch) == args.batch_size:
            encode()
    if batch:
        encode()
    writer.close()
    print(f"{args.output}: {len(writer.known)} images of encoder {sam_id}, {len(writer.known) - found} of them new")


if __name__ == "__main__":
    main()
