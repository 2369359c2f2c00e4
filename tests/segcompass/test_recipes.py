"""Recipes are found by name, and their values give way to the command line's."""

from dataclasses import dataclass

import pytest
import yaml

from segcompass import cli
from segcompass.commands.options import recipe_parser
from segcompass.recipes import find_recipe, list_recipes, parse_with_recipe
from segcompass.shipped import EXAMPLES, MODEL, RECIPES, default_scene


@dataclass
class Options:
    learning_rate: float = 1.0
    max_steps: int = 1


def parse(*argv):
    return parse_with_recipe(recipe_parser("train x", "About x.", (Options,)), list(argv))[0]


def test_what_ships_is_there():
    image, instruction = default_scene()
    assert image.is_file() and instruction and (MODEL / "config.json").is_file()
    assert (EXAMPLES / "accelerate" / "fsdp2.yaml").is_file()


def test_recipes_are_listed_with_their_header_and_printed(capsys):
    names = list_recipes()
    assert {"mini/reason", "mini/sae", "mini/masks", "mini/grpo", "llava-1.5-7b/sft"} <= names.keys()
    assert names["mini/grpo"].startswith("Stage 4 of mini: joint GRPO")
    cli.main(["recipes"])
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["mini/sae", names["mini/sae"]] in listed
    cli.main(["recipes", "mini/sae"])
    assert capsys.readouterr().out == (RECIPES / "mini" / "sae.yaml").read_text()


def test_a_recipe_is_named_or_is_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("max_steps: 7\n")
    assert find_recipe(str(path)) == path
    assert find_recipe("mini/grpo") == RECIPES / "mini" / "grpo.yaml"
    with pytest.raises(
        ValueError, match="'mini/mine' is neither a file nor the name of a recipe; there are .*mini/sae"
    ):
        find_recipe("mini/mine")


@pytest.mark.parametrize("config", [["--config", "{}"], ["--config={}"]])
def test_options_replace_a_recipes_values(tmp_path, config):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"max_steps": 7, "learning_rate": 0.5}))
    config = [word.format(path) for word in config]
    assert parse("--max-steps", "9", *config) == Options(0.5, 9)
    assert parse(*config, "--learning_rate", "0.1") == Options(0.1, 7)
    assert parse() == Options()


def test_wrong_fields_are_named(tmp_path):
    path = tmp_path / "mine.yaml"
    for content, message in (
        ("max_step: 7", "mine.yaml has the unknown fields max_step; see `segcompass train x --help`"),
        ("- 7", "must contain a YAML mapping"),
        ("a: b: c", "mapping"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            parse("--config", str(path))
    with pytest.raises(ValueError, match="the options --max-stepz 3 are unknown; see `segcompass train x --help`"):
        parse("--max-stepz", "3")
