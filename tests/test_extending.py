"""The walks of docs/extending.md, applied to a copy of the repository exactly as the page has them.

A comment before a code block says what it is for: `new: FILE` writes it, `edit: FILE` applies a diff (its lines must be
found exactly once), `run; expect: TEXT` runs it in the copy and looks for the text in what it printed.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
COPIED = ("segcompass", "modeling_segcompass", "trainers", "loaders", "hub_cards", "examples")
EXISTING_FILES = {"a text reward": 0, "a mask reward": 0, "a data set": 0}
"""How many existing files a walk may change; one, where nothing is said."""


class Block(NamedTuple):
    action: str
    """"new", "edit" or "run"."""
    target: str
    """the file, or the text that is expected."""
    language: str
    code: str


def read_walks() -> dict[str, list[Block]]:
    """Title of each section -> its marked code blocks, in order."""
    walks = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        title = section.split("\n")[0].lower()
        found = re.findall(r"^<!-- (\w+)(?:; expect)?: (.+?) -->\n```(\w+)\n(.*?)^```", section, re.M | re.S)
        walks[title] = [Block(*block) for block in found]
    return walks


WALKS = read_walks()


def apply_diff(text: str, diff: str) -> str:
    """A text after a diff whose old lines it must hold exactly once."""
    lines = diff.rstrip("\n").split("\n")
    assert all(line[:1] in ("", " ", "+", "-") for line in lines), diff
    old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert text.count(old) == 1, f"these lines are there {text.count(old)} times:\n{old}"
    return text.replace(old, new)


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository, without its history, tests and pages."""
    folder = tmp_path / "clone"
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("runs"))
    return folder


@pytest.fixture
def environment(clone, tmp_path):
    """As after `pip install -e .`: `segcompass` can be imported and run, the current folder is not on the path."""
    site, programs = tmp_path / "site", tmp_path / "bin"
    site.mkdir()
    programs.mkdir()
    (site / "segcompass").symlink_to(clone / "segcompass")
    command = programs / "segcompass"
    command.write_text(f"#!{sys.executable}\nfrom segcompass.cli import main\n\nmain()\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": str(site), "PATH": path, "HF_HOME": str(tmp_path / "cache")}


def test_the_page_walks_through_everything_that_contributing_names():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## To add X, edit Y")[1].split("\n\n")[1]
    to_add = [row.split("|")[1].strip().lower() for row in table.split("\n")[2:10]]
    assert to_add == list(WALKS)


@pytest.mark.parametrize("title", WALKS)
def test_walk(title, clone, environment):
    blocks = WALKS[title]
    assert {"new", "edit"} & {block.action for block in blocks}, "nothing is added"
    assert blocks[-1].action == "run", "what was added is never run"
    changed = set()
    for block in blocks:
        if block.action == "new":
            assert not (clone / block.target).exists(), f"{block.target} is there already"
            (clone / block.target).write_text(block.code, encoding="utf-8")
        elif block.action == "edit":
            file = clone / block.target
            file.write_text(apply_diff(file.read_text(encoding="utf-8"), block.code), encoding="utf-8")
            changed.add(block.target)
        else:
            program = ["bash", "-e", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            finished = subprocess.run(
                [*program, block.code], cwd=clone, env=environment, capture_output=True, text=True, timeout=600
            )
            assert finished.returncode == 0, f"{block.code}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
            assert block.target in finished.stdout, f"{block.target!r} is not in\n{finished.stdout[-2000:]}"
    assert len(changed) <= EXISTING_FILES.get(title, 1), f"this walk changes {sorted(changed)}"
