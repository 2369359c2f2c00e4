"""The page docs/own_data.md, run as it stands, in an empty folder; and each command of docs/reproduce.md is one."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from segcompass import cli
from segcompass.recipes import find_recipe
from segcompass.shipped import EXAMPLES

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page):
    """(marker, language, code) of the marked code blocks of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^<!-- (.+?) -->\n```(\w+)\n(.*?)^```", text, re.M | re.S)


def commands(code):
    """The words of each command of a block."""
    return [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    ran = 0
    for marker, language, code in blocks("own_data.md"):
        if not marker.startswith("run"):
            assert marker.startswith("not run here: needs")
            continue
        if language == "python":
            exec(compile(code, "own_data.md", "exec"), {})
        else:
            for program, *words in commands(code):
                assert program == "segcompass"
                cli.main(words)
                ran += 1
        printed = capsys.readouterr().out
        if expected := re.search("expect: (.+)", marker):
            assert expected[1] in printed
    assert ran == 7
    assert (tmp_path / "runs" / "mine-val" / "gallery.html").is_file()
    assert (tmp_path / "data" / "mine-traces" / "train-gallery.html").is_file()


@pytest.mark.parametrize("page", ["own_data.md", "reproduce.md"])
def test_commands_that_are_not_run_name_recipes_and_commands_that_exist(page):
    unmarked = re.findall(r"(?<! -->)\n```bash", (DOCS / page).read_text(encoding="utf-8"))
    assert not unmarked, "each block of commands says whether it is run"
    found = 0
    for marker, language, code in blocks(page):
        if language != "bash" or marker.startswith("run"):
            continue
        for words in commands(code):
            if "segcompass" not in words:
                assert words[0] in ("for", "done")
                continue
            words = words[words.index("segcompass") + 1 :]
            name = " ".join(words[: 2 if words[0] == "train" else 1])
            assert name in cli.COMMANDS, name
            found += 1
            for option in ("--config", "--recipe"):
                if option in words:
                    recipe = words[words.index(option) + 1].replace("MODEL", "llava-1.5-7b")
                    assert yaml.safe_load(find_recipe(recipe).read_text())
    assert found >= 3
