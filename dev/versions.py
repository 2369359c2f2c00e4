"""Does the saved model load, and give the same masks, with every version of transformers that setup.py allows?

    python dev/versions.py                    # the newest release of each minor, and the very first allowed
    python dev/versions.py --ends             # the first allowed and the newest only, as the tests do
    python dev/versions.py --versions 5.16.1  # these

Each version is laid over the installed torch: `pip install --no-deps --target`, into a folder that git ignores and
that is kept, with the huggingface-hub and tokenizers that it asks for where the installed ones do not do. In each, a
process that cannot see this project loads the small model as a user would who has transformers only
(`trust_remote_code=True`), with the code of the working tree in its folder, and segments the scene. Sequences and masks
are compared with those of the installed version. Prints the table of docs/encoders.md (`python dev/measured.py
versions` keeps it there), and a RESULT line.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LAID_OVER = ("huggingface-hub", "tokenizers")
"""What transformers is particular about, besides torch."""
UNREACHABLE = 3
"""Exit status when a version is neither kept nor to be had."""

PROBE = """
import sys, torch, transformers
from transformers import AutoModel, AutoProcessor
folder, scene, output = sys.argv[1:]
assert "segcompass" not in sys.modules
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
made = model.segment(**processor(images=scene, text="everything to the left of the blue star"))
assert type(model).__module__.startswith("transformers_modules"), type(model)
torch.save({name: made[name] for name in ("sequences", "pred_masks", "pred_logits", "heatmaps")}, output)
print(transformers.__version__)
"""


class Unreachable(Exception):
    """The package registry did not answer, or has no such version."""


def pip(*arguments: str) -> str:
    """What pip prints. Raises Unreachable."""
    patience = ["--retries", "1", "--timeout", "15"]
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, *patience], capture_output=True, text=True)
    if done.returncode:
        raise Unreachable(f"pip {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def allowed() -> Requirement:
    """What setup.py says of transformers."""
    return Requirement(re.search(r'"(transformers>=[^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1])


def released() -> list[Version]:
    """The released versions that setup.py allows, oldest first. Raises Unreachable."""
    listed = re.search(r"Available versions: (.+)", pip("index", "versions", "transformers"))[1]
    return sorted(v for v in map(Version, listed.split(", ")) if v in allowed().specifier)


def chosen(versions: list[Version], ends: bool) -> list[str]:
    """The first version and the newest of all, or of each minor."""
    newest = {version.release[:2]: version for version in versions}
    kept = {versions[0], versions[-1]} if ends else {versions[0], *newest.values()}
    return [str(version) for version in sorted(kept)]


def lay_over(version: str, cache: Path) -> list[Path]:
    """Folders that put a version before the installed one, on PYTHONPATH. Raises Unreachable."""
    if version == metadata.version("transformers"):
        return []
    library = install(cache / f"transformers-{version}", "--no-deps", f"transformers=={version}")
    own = next(library.glob("transformers-*.dist-info"))
    needs = [Requirement(line) for line in metadata.Distribution.at(own).requires or () if "extra ==" not in line]
    needs = sorted((need for need in needs if need.name in LAID_OVER), key=lambda need: need.name)
    if all(metadata.version(need.name) in need.specifier for need in needs):
        return [library]
    name = re.sub(r"[^\w.]+", "-", " ".join(map(str, needs)))
    return [library, install(cache / name, *map(str, needs))]


def install(folder: Path, *wanted: str) -> Path:
    """A folder that pip filled, now or before. Raises Unreachable."""
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        pip("install", "--quiet", "--no-compile", "--target", str(part), *wanted)
        part.rename(folder)
    return folder


def with_todays_code(model: Path, folder: Path) -> Path:
    """A copy of a saved model whose code is the working tree's; unsigned, as its manifest was of other code."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.py", "manifest.json"))
    for path in (ROOT / "modeling_segcompass").glob("*.py"):
        if path.name != "__init__.py":
            shutil.copy(path, folder)
    return folder


def run(version: str, cache: Path, model: Path, work: Path) -> dict[str, torch.Tensor] | str:
    """What the model makes with a version; or, where it fails, the last line of the error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / version), "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, lay_over(version, cache)))
    output = work / f"{version}.pt"
    command = [sys.executable, "-c", PROBE, str(model), str(ROOT / "examples" / "scene.png"), str(output)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    assert done.stdout.split()[-1] == version, f"{done.stdout} ran, not {version}"
    return torch.load(output, weights_only=True)


def largest_difference(made: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Between mask logits, confidences and heatmaps."""
    floats = [name for name in reference if reference[name].is_floating_point()]
    return max((made[name] - reference[name]).abs().max().item() for name in floats)


def main() -> None:
    """Run the versions and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", help="instead of those on the package registry")
    parser.add_argument("--ends", action="store_true", help="the first allowed and the newest only")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "checkpoints" / "mini")
    parser.add_argument("--cache", type=Path, default=ROOT / ".versions", help="where the versions are kept")
    args = parser.parse_args()
    installed = metadata.version("transformers")
    failed, worst = [], 0.0
    with tempfile.TemporaryDirectory() as work:
        try:
            versions = args.versions or chosen(released(), args.ends)
            model = with_todays_code(args.model, Path(work, "model"))
            reference = run(installed, args.cache.resolve(), model, Path(work))
            if isinstance(reference, str):
                sys.exit(f"{installed}, which is installed, fails: {reference}")
            print("| transformers | loads | largest difference of masks and confidences |\n|---|---|---|")
            versions = sorted({*versions, installed}, key=Version)
            for version in versions:
                made = reference if version == installed else run(version, args.cache.resolve(), model, Path(work))
                if isinstance(made, str):
                    failed.append(version)
                    print(f"| {version} | no: {made} | |", flush=True)
                    continue
                same = torch.equal(made["sequences"], reference["sequences"])
                difference = largest_difference(made, reference) if same else float("inf")
                worst = max(worst, difference)
                print(f"| {version} | yes | {difference:g} |", flush=True)
        except Unreachable as error:
            print(error)
            sys.exit(UNREACHABLE)
    print("RESULT", json.dumps({"versions": len(versions), "failed": failed, "max_difference": worst}))
    sys.exit(bool(failed) or worst > 0)


if __name__ == "__main__":
    main()
