"""Encode every image of a data set once with a model's frozen image encoder, for training and evaluation to read.

    segcompass precompute-features --model PATH --dataset FOLDER --split train --output runs/features
    segcompass train grpo --config RECIPE.yaml --image-features runs/features
    segcompass evaluate --model PATH --dataset FOLDER --output runs/val --image-features runs/features

SAM ViT-H's features take 2 MB per image in float16. Repeat the command to resume an interrupted run, or to add another
split or data set: images that are there already are skipped.
"""

import argparse
from typing import Any

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("precompute-features", __doc__)
    parser.add_argument("--model", required=True, help=f"{options.MODEL}, whose image encoder is used")
    options.add_rows(parser, "train", 10_000)
    parser.add_argument(
        "--batch-size", type=options.positive, default=8, help="images encoded at once; default: %(default)s"
    )
    parser.add_argument(
        "--shard-size",
        type=options.positive,
        default=256,
        help="images per file; a killed run loses at most one file's; default: %(default)s",
    )
    parser.add_argument("--output", type=options.folder, required=True, help="folder of the features")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    import torch
    from tqdm import tqdm

    from segcompass.loaders import load_rows
    from segcompass.loaders.rows import leave_images_encoded, row_image
    from segcompass.loading import load
    from segcompass.trainers.image_features import ImageFeatureWriter, encoder_id, image_key

    rows = load_rows(args.dataset, args.split, args.seed, args.num_samples)
    model, processor = load(args.model)
    encoder = encoder_id(model.image_encoder, processor.encoder_image_processor)
    writer = ImageFeatureWriter(args.output, encoder, model.config.frame, args.shard_size)
    found = len(writer.known)
    batch: dict[str, Any] = {}  # key -> image

    @torch.no_grad()
    def encode() -> None:
        inputs = processor.encoder_inputs(list(batch.values()))
        features = model.get_image_embeddings(inputs["encoder_pixel_values"].to(model.device))
        for key, feature in zip(batch, features, strict=True):
            writer.add(key, feature)
        batch.clear()

    for row in tqdm(leave_images_encoded(rows), unit="row", dynamic_ncols=True):
        image = row_image(row)
        key = image_key(image)
        if key in writer or key in batch:
            continue
        batch[key] = image
        if len(batch) == args.batch_size:
            encode()
    if batch:
        encode()
    writer.close()
    print(f"{args.output}: {len(writer.known)} images of encoder {encoder}, {len(writer.known) - found} of them new")
