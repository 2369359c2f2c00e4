"""Compare saved folders with their manifests, every byte of them; or sign a folder anew after editing it.

    segcompass verify runs/mini/grpo
    segcompass verify runs/mini/grpo --sign

Exit status 0 when everything is as signed, 1 otherwise. Loading a model compares sizes always and hashes of files below
1 GiB; this command reads everything, also what transformers reads before this project's code runs.
"""

import argparse
from pathlib import Path

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("verify", __doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="saved models, SAEs, adapters or checkpoints")
    parser.add_argument("--sign", action="store_true", help="write the manifest anew, from the files as they are now")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    from segcompass.modeling_segcompass.manifest import findings, sign, unlisted

    wrong = 0
    for folder in args.folder:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; name a folder that save_pretrained or a trainer wrote.")
        if args.sign:
            sign(folder)
            print(f"{folder}: signed")
            continue
        found = findings(folder) + [(name, "not in the manifest") for name in unlisted(folder)]
        for name, finding in found:
            print(f"{folder / name}: {finding}")
        print(f"{folder}: {f'{len(found)} files differ' if found else 'as it was signed'}")
        wrong += len(found)
    if wrong:
        raise SystemExit(1)
