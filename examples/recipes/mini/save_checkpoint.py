"""Write a model as the embedded checkpoint: weights rounded to float16 on disk, computing in float32 when loaded.

python examples/recipes/mini/save_checkpoint.py --model runs/mini/masks --output examples/checkpoints/mini
"""

import argparse
import json
from pathlib import Path

import torch

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = SegCompassModel.from_pretrained(args.model, dtype="float32").to(torch.float16)
    model.save_pretrained(args.output)
    SegCompassProcessor.from_pretrained(args.model).save_pretrained(args.output)
    path = args.output / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    print(f"{(args.output / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
