"""List the training recipes that ship with the package, or print one.

    segcompass recipes
    segcompass recipes mini/grpo > mine.yaml

A recipe is given to a command by its name or as a file: `segcompass train grpo --config mini/grpo`, or
`segcompass train grpo --config mine.yaml`. Options of the command line replace its values.
"""

import argparse

from segcompass.recipes import find_recipe, list_recipes
from segcompass.shipped import EXAMPLES

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("recipes", __doc__)
    parser.add_argument("name", nargs="?", help="print this recipe instead of the list")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    if args.name:
        print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        return
    recipes = list_recipes()
    width = max(map(len, recipes)) + 2
    for name, header in recipes.items():
        print(f"{name:<{width}}{header}")
    print(f"\nConfigurations for `accelerate launch --config_file` are in {EXAMPLES / 'accelerate'}.")
