"""Write a model as the embedded checkpoint: weights rounded to float16 on disk, computing in float32 when loaded.

python examples/recipes/mini/save_checkpoint.py --model runs/mini/masks --output examples/checkpoints/mini
python examples/recipes/mini/save_checkpoint.py --code-only --output examples/checkpoints/mini

The second renews only the copies of modeling_segcompass/ beside the weights, after a change of that folder. Both sign.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from segcompass import SegCompassModel, SegCompassProcessor, modeling_segcompass
from segcompass.modeling_segcompass.manifest import signing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="model to write")
    source.add_argument("--code-only", action="store_true", help="write only the code, beside weights that are there")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    args = parser.parse_args()
    with signing(args.output):
        if args.code_only:
            copy_code(args.output)
        else:
            save(args.model, args.output)


def save(model: str, folder: Path) -> None:
    """Write model and processor."""
    SegCompassModel.from_pretrained(model, dtype="float32").to(torch.float16).save_pretrained(folder)
    SegCompassProcessor.from_pretrained(model).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    print(f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


def copy_code(folder: Path) -> None:
    """Write today's modeling_segcompass/ beside the weights, as saving a model does."""
    for stale in folder.glob("*.py"):
        stale.unlink()
    for path in Path(modeling_segcompass.__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copy(path, folder)


if __name__ == "__main__":
    main()
