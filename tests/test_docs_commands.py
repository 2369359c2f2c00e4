"""Every command of the pages, the README and the recipes' headers: its arguments are accepted, and who runs it is said.

A shell block with commands of ours has a comment on the line above it:

    <!-- run … -->                            the page's own test runs it (RUN_BY)
    <!-- rehearsal: … -->, <!-- command: … --> tests/rehearsal and .ci/run do
    <!-- tested: FILE::TEST, FILE -->          these tests run its commands, small
    <!-- by hand: WHY -->                      no test runs it; it was run when the page was written
    <!-- not run here: needs … -->             nobody of us has
"""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from segcompass import cli
from segcompass.commands import options
from segcompass.recipes import find_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*/*.yaml"))
RUN_BY = {"own_data.md": "tests/test_own_data.py", "extending.md": "tests/test_extending.py"}
ELSEWHERE = {"rehearsal": "tests/rehearsal/test_rehearsal.py", "command": ".ci/run"}
BLOCK = re.compile(r"(?:^<!-- ([^\n]+) -->\n)?^```(?:bash|sh|shell|console)\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`(segcompass [^`]+)`")
OURS = re.compile(r"\b(segcompass [a-z-]|(benchmarks|dev|examples|tests)/\w)")
PLACEHOLDERS = {"RECIPE.yaml", "RECIPE", "NAME"}


class Refused(Exception):
    """The parser's own words."""


class Parser(Exception):
    """Carries the parser that a command made."""


def blocks(page):
    """(line, marker or None, code) of each shell block of a page."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text[: match.start(2)].count("\n"), match[1], match[2]


def commands(code):
    """The words of each command of a block, without assignments, launchers and loops."""
    line = ""
    for part in code.replace("\\\n", " ").splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation that goes on
            continue
        line = ""
        command: list[str] = []
        for word in [*words, "&&"]:
            if word not in ("&&", ";", "|"):
                command.append(word)
            elif command:
                yield without_launcher(command)
                command = []


def without_launcher(words):
    """`X=1 accelerate launch --config_file FILE -m segcompass evaluate …` -> `segcompass evaluate …`."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:2] == ["accelerate", "launch"] or words[:3] == ["python", "-m", "segcompass"]:
        for place, word in enumerate(words):
            if word == "segcompass" and words[place - 1] == "-m":
                return words[place:]
            if word.startswith("examples/") and word.endswith(".py"):
                return ["python", *words[place:]]
    return words


def as_command(words):
    """(name of the command, its options) of a command of ours; None for others."""
    if words[0] == "python" and len(words) > 1 and re.match(r"examples/\w+\.py$", words[1]):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        called = re.search(r"main\(\[(.+?), \*sys", source)
        words = ["segcompass", *re.findall(r'"([^"]+)"', called[1]), *words[2:]]
    if words[0] != "segcompass":
        return None
    rest = words[1:]
    rest = rest[1:] if rest[:1] == ["--debug"] else rest
    name = next((name for name in (" ".join(rest[:2]), *rest[:1]) if name in cli.COMMANDS), None)
    assert name is not None or rest[0].startswith("--"), f"{' '.join(words)}: no such command"
    return name, rest[len((name or "").split()) :]


@pytest.fixture
def accepts(monkeypatch, capsys):
    """Whether the real parser of a command takes these options; `whole` wants the required ones too."""

    def refuse(parser, message):
        raise Refused(message)

    def catch(*arguments):
        raise Parser(recipe_parser(*arguments))

    recipe_parser = options.recipe_parser
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(options, "recipe_parser", catch)

    def accepts(name, words, whole):
        words = [cli._hyphens(word) for word in words]
        for option in ("--config", "--recipe"):
            if option in words:
                recipe = words[words.index(option) + 1].replace("MODEL", "llava-1.5-7b")
                assert recipe in PLACEHOLDERS or find_recipe(recipe).is_file()
        module = import_module(f"segcompass.commands.{cli.COMMANDS[name][0]}")
        try:
            if hasattr(module, "parse"):
                module.parse(words)
                return
            try:
                module.main(words)
            except Parser as caught:
                (parser,) = caught.args
            if "--config" in words:
                place = words.index("--config")
                words = words[:place] + words[place + 2 :]
            for action in parser._actions:
                action.required = False  # the recipe has them
            argparse.ArgumentParser.parse_args(parser, words)
        except SystemExit as ended:
            assert ended.code == 0, capsys.readouterr().err  # --help
        except Refused as refused:
            if whole or "required" not in str(refused):
                raise

    return accepts


def test_a_stale_option_or_recipe_is_found(accepts):
    accepts("evaluate", ["--model", "PATH", "--output", "DIR"], True)
    for name, words in (("evaluate", ["--model", "PATH", "--output", "DIR", "--gone"]), ("train sft", ["--gone", "1"])):
        with pytest.raises(Refused, match="unrecognized arguments: --gone"):
            accepts(name, words, True)
    with pytest.raises(ValueError, match="neither a file nor the name of a recipe"):
        accepts("train sft", ["--config", "gone/sft"], True)


def check(accepts, place, words, whole):
    found = as_command(words)
    if found is None or found[0] is None:
        return
    try:
        accepts(*found, whole)
    except (Refused, AssertionError, OSError, ValueError) as error:
        pytest.fail(f"{place}: `{shlex.join(words)[:200]}` is not accepted: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_parsers_accept_every_command_of_a_page(page, accepts):
    for line, marker, code in blocks(page):
        if not (marker or "").startswith("run"):  # a page that runs itself may add options to the code first
            for words in commands(code):
                check(accepts, f"{page.name}, line {line}", words, whole=True)
    for mention in INLINE.findall(page.read_text(encoding="utf-8")):
        words = mention.replace("\n", " ")
        if "…" not in words and " -" in words and "NAME=" not in words:
            check(accepts, page.name, shlex.split(words), whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_says_who_runs_it(page):
    for line, marker, code in blocks(page):
        place = f"{page.name}, line {line}"
        if marker is None:
            assert not OURS.search(code), f"{place}: say above the block who runs it (see the head of this file)"
            continue
        kind, _, rest = marker.partition(":")
        if kind in ("by hand", "not run here"):
            assert kind == "by hand" or rest.startswith(" needs "), f"{place}: say what it needs"
            assert rest.strip(), f"{place}: say why"
        elif kind == "tested":
            check_tests(place, rest, code)
        elif kind in ELSEWHERE:
            assert (ROOT / ELSEWHERE[kind]).is_file()
        else:
            assert kind.split(";")[0] == "run" and page.name in RUN_BY, f"{place}: {marker!r} is no marker"
            assert (ROOT / RUN_BY[page.name]).is_file()


def check_tests(place, named, code):
    """The named tests exist, and each command of the block is a word of one of them."""
    texts = []
    for test in named.split(","):
        file, _, name = test.strip().partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", text, re.M), f"{place}: {file} has no {name}"
        texts.append(text)
    for words in commands(code):
        found = as_command(words)
        if found is None:
            files = [word for word in words if re.match(r"(benchmarks|dev|examples|tests)/", word)]
            assert all((ROOT / file).exists() for file in files), f"{place}: {files}"
        elif found[0] and found[1] != ["--help"]:
            spelled = {found[0], cli.COMMANDS[found[0]][0]}
            assert any(word in text for word in spelled for text in texts), f"{place}: none of the tests has {found[0]}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipes_header_says_whether_it_was_run_and_its_commands_are_accepted(recipe, accepts):
    text = recipe.read_text(encoding="utf-8")
    header = "\n".join(line.lstrip("# ") for line in re.match(r"(?:#.*\n)+", text)[0].splitlines())
    if not recipe.parent.name.startswith("mini"):
        assert re.search(r"not (run|measured)|[Nn]o such run", header), "say that it was not run here"
    for line in [*header.splitlines(), *INLINE.findall(header)]:
        if re.match(r"(segcompass|accelerate) \S", line):
            for words in commands(line):
                check(accepts, recipe.name, words, whole=False)


def test_scripts_of_the_recipes_are_accepted(accepts):
    for script in sorted((ROOT / "examples" / "recipes").glob("*/*.sh")):
        code = script.read_text(encoding="utf-8")
        for words in commands(code):
            if words[0] in ("segcompass", "python"):
                check(accepts, script.parent.name, words, whole=False)
