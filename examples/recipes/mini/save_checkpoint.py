"""Write a model as the embedded checkpoint: weights rounded to float16 on disk, computing in float32 when loaded.

python examples/recipes/mini/save_checkpoint.py --model runs/mini/masks --output examples/checkpoints/mini
python examples/recipes/mini/save_checkpoint.py --code-only --output examples/checkpoints/mini

The second renews the copies of the code beside the weights, after modeling_segcompass/ was edited. Both sign the folder.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, modeling_segcompass
from segcompass.modeling_segcompass.checkpoints import AUTO_MAP
from segcompass.modeling_segcompass.manifest import sign, signing
from segcompass.modeling_segcompass.pipeline_segcompass import CUSTOM_PIPELINES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the trained model; not with --code-only")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--code-only", action="store_true", help="renew the copies of the code, and sign")
    args = parser.parse_args()
    if args.code_only == (args.model is not None):
        parser.error("give either --model or --code-only.")
    if args.code_only:
        renew_code(args.output)
    else:
        with signing(args.output):
            save(args.model, args.output)
    print(f"{(args.output / 'model.safetensors').stat().st_size / 1e6:.1f} MB, signed")


def save(model, output):
    SegCompassModel.from_pretrained(model, dtype="float32").to(torch.float16).save_pretrained(output)
    SegCompassProcessor.from_pretrained(model).save_pretrained(output)
    path = output / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def renew_code(output):
    """Copy what `config.json` names and what that imports, as saving does; delete copies of files that are gone."""
    code = Path(modeling_segcompass.__file__).parent
    named = {*AUTO_MAP.values(), *(pipeline["impl"] for pipeline in CUSTOM_PIPELINES.values())}
    files = {code / f"{name.partition('.')[0]}.py" for name in named}
    files |= {Path(path) for file in files for path in get_relative_import_files(file)}
    for copy in output.glob("*.py"):
        copy.unlink()
    for file in sorted(files):
        shutil.copyfile(file, output / file.name)
    sign(output)


if __name__ == "__main__":
    main()
