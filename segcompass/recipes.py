"""The training recipes that ship with the package, found by name, and how a command reads one.

A recipe is a YAML file whose fields are the options of `segcompass train …`; its header says what it is for.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from segcompass.shipped import RECIPES


def list_recipes() -> dict[str, str]:
    """Name, such as "mini/grpo" -> the first line of the recipe's header."""
    return {
        path.relative_to(RECIPES).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        .split("\n")[0]
        .lstrip("# ")
        for path in sorted(RECIPES.glob("*/*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its path or its name.

    Args:
        name: a path, or a name that `segcompass recipes` lists.

    Returns:
        An existing file.

    Raises:
        ValueError: neither.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ValueError(f"{name!r} is neither a file nor the name of a recipe; there are {', '.join(list_recipes())}.")


def parse_with_recipe(parser: Any, argv: list[str] | None) -> tuple:
    """Parse options; what they leave open is taken from the recipe that `--config` names, by path or name.

    Args:
        parser: a TrlParser.
        argv: the options; None takes the process's own.

    Returns:
        One filled-in dataclass for each of the parser's.

    Raises:
        ValueError: no such recipe, or a field or value that the parser refuses.
    """
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--config")
    named, options = recipes.parse_known_args(argv)
    if named.config:
        options = ["--config", str(find_recipe(named.config)), *options]
    try:
        if named.config:
            text = find_recipe(named.config).read_text(encoding="utf-8")
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise ValueError(
                    f"the recipe {named.config} refers to its own parts (&, *), which can grow without end; write the "
                    "values where they are used."
                )
        *parsed, from_recipe, from_options = parser.parse_args_and_config(
            options, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    if from_recipe:
        fields = ", ".join(word.removeprefix("--") for word in from_recipe[::2])
        raise ValueError(f"the recipe {named.config} has the unknown fields {fields}; see `{parser.prog} --help`.")
    if from_options:
        raise ValueError(f"the options {' '.join(from_options)} are unknown; see `{parser.prog} --help`.")
    return tuple(parsed)
