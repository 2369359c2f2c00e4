"""How much faster is reading SAM's features from the cache than encoding the images?

    python benchmarks/image_features.py

The encoder is SAM ViT-B at 1,024 pixels with random weights (`--images` few, for it is slow on a CPU); both ways start
from decoded images: encoding prepares pixels and runs the encoder, reading hashes the pixels, reads the map, compares
the checksum. Keys of RESULT: ratio (images a second, cached over encoded), cached_images_s, encoded_images_s, ...
"""

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from transformers import SamVisionConfig, SamVisionModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.trainers.image_features import ImageFeatures, ImageFeatureWriter, encoder_id, image_key


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="times the cache is read")
    parser.add_argument("--side", type=int, default=1024, help="SAM's frame in pixels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    sam = SamVisionModel(SamVisionConfig(image_size=args.side)).eval()
    side = {"height": args.side, "width": args.side}
    processor = SamImageProcessorPil(size={"longest_edge": args.side}, pad_size=side)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)) for _ in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        sam_id = encoder_id(sam, processor)
        writer = ImageFeatureWriter(folder, sam_id, Frame(args.side))
        began = time.perf_counter()
        features = [sam(processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state[0] for image in images]
        encoded = args.images / (time.perf_counter() - began)
        for image, feature in zip(images, features, strict=True):
            writer.add(image_key(image), feature)
        writer.close()
        cache = ImageFeatures(folder, sam_id)
        began = time.perf_counter()
        for _ in range(args.repeats):
            for image in images:
                cache.inputs([image])
        cached = args.images * args.repeats / (time.perf_counter() - began)
    print(f"encoded {encoded:8.2f} images a second\ncached  {cached:8.2f} images a second")
    result = {
        "ratio": round(cached / encoded, 2),
        "cached_images_s": round(cached, 2),
        "encoded_images_s": round(encoded, 4),
        "encoder": sam_id,
        "threads": args.threads,
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
