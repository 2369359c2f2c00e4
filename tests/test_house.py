"""The layout rules of CONTRIBUTING.md, and that the pages name files, commands, options and functions that exist."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import segcompass

ROOT = Path(__file__).parents[1]
PARTS = ("modeling_segcompass", "trainers", "loaders", "hub_cards")
FOLDERS = (*PARTS, "segcompass", "examples", "benchmarks", "tests", "dev")
FORBIDDEN = {
    "modeling_segcompass": {"segcompass"},  # the Hub serves the folder alone
    "loaders": {"segcompass.trainers", "segcompass.hub_cards"},
    "trainers": {"segcompass.hub_cards"},
    "hub_cards": {"segcompass.trainers"},
    "segcompass": {"segcompass.examples", "examples", "tests", "benchmarks"},
}
"""Part -> what it must not import. The four parts also import nothing of the face (see FACE)."""
FACE = {f"segcompass.{path.stem}" for path in (ROOT / "segcompass").iterdir() if path.suffix == ".py" or path.is_dir()}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ROOT / "examples" / "checkpoints"
CODE = sorted(
    path
    for path in [ROOT / "setup.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    if GENERATED not in path.parents
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Each import of a file: the module's name ("" for `from . import x`), and the level of a relative import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level
            if not node.level and node.module == "segcompass":
                yield from ((f"segcompass.{alias.name}", 0) for alias in node.names)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


# -- arrows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_imports_within_a_part_are_relative_and_stay_in_it(part):
    for path in (ROOT / part).rglob("*.py"):
        if path.parent.name in ("space", "reasoning_segmentation"):  # run alone, outside the package
            continue
        depth = len(path.relative_to(ROOT / part).parts)
        for module, level in imports(path):
            assert level <= depth, f"{name_of(path)}: '{'.' * level}{module}' leaves {part}/; import it absolutely"
            assert not is_within(module, f"segcompass.{part}"), f"{name_of(path)}: import {module} relatively"


@pytest.mark.parametrize("part", FORBIDDEN)
def test_arrows_point_one_way(part):
    for path in (ROOT / part).rglob("*.py"):
        for module, level in imports(path):
            if level:
                continue
            for forbidden in FORBIDDEN[part] | (FACE if part in PARTS else set()):
                assert not is_within(module, forbidden), (
                    f"{name_of(path)} imports {module}: imports point examples → segcompass → trainers, loaders, "
                    "hub_cards → modeling_segcompass, never back"
                )


def test_modeling_imports_only_what_the_hub_has():
    allowed = {"torch", "transformers", "numpy"} | sys.stdlib_module_names
    for path in (ROOT / "modeling_segcompass").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # an import inside a function may be optional
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{name_of(path)} imports {name} when it is imported"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_nothing_imports_a_part_as_a_top_level_name(path):
    for module, level in imports(path):
        assert level or module.split(".")[0] not in PARTS, (
            f"{name_of(path)} imports {module}: two copies of one class are two classes; import segcompass.{module}"
        )


DECIDED_IN = {
    r"SamVision|Sam2Vision|Sam3Vision|Dinov2|DINOv3": {"image_encoder.py", "sam_weights.py", "published_backbones.py"},
    r"Llava|Qwen|InternVL": {"backbone.py", "published_backbones.py"},
}
"""Classes of transformers (a pattern) -> the files that may know them; everybody else asks the first."""


@pytest.mark.parametrize("part", (*PARTS, "segcompass"))
def test_one_decision_has_one_file(part):
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    for classes, files in DECIDED_IN.items():
                        allowed = path.name in files or not re.match(classes, alias.name)
                        assert allowed, f"{name_of(path)} imports {alias.name}; ask {sorted(files)[0]} instead"
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                assert not any(re.search(r"\bactivation$", side) for side in sides), (
                    f"{name_of(path)} asks {ast.unparse(node)}; add a method to the classes of sae_activations.py"
                )


# -- public names and docstrings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", segcompass.__all__)
def test_public_name_exists_and_a_public_class_has_an_example(name):
    value = getattr(segcompass, name)
    if inspect.isclass(value):
        assert "Example:" in (value.__doc__ or ""), f"{name} has no 'Example:' of three lines in its docstring"


def test_type_checkers_see_the_public_names():
    seen = {}
    for node in ast.walk(ast.parse((ROOT / "segcompass" / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("segcompass."):
            seen |= {alias.asname: node.module for alias in node.names}
    assert seen == {name: f"segcompass.{part}" for name, part in segcompass._PART_OF.items()}


def test_every_module_says_what_it_is():
    modules = [path for path in CODE if ROOT / "tests" not in path.parents]
    silent = [name_of(path) for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent, f"no docstring at the top of {silent}"


def test_public_functions_are_annotated():
    missing = []
    for part in (*PARTS, "segcompass"):
        for path in sorted(set((ROOT / part).rglob("*.py")) - set((ROOT / "hub_cards" / "space").glob("*.py"))):
            missing += [f"{name_of(path)}: {found}" for found in unannotated(ast.parse(path.read_text("utf-8")).body)]
    assert not missing, "annotate every argument and the result:\n" + "\n".join(missing)


def unannotated(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public functions and methods of a module or class of which an argument or the result has no type."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from unannotated(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
            bare = [argument.arg for argument in arguments if argument.annotation is None]
            bare = bare[1:] if prefix and not is_static and bare[:1] in (["self"], ["cls"]) else bare
            if node.returns is None and node.name != "__init__":
                bare.append("the result")
            if bare:
                yield f"{prefix}{node.name} ({', '.join(bare)})"


def test_docstrings_give_each_argument_a_line():
    crowded = []
    for path in CODE:
        for docstring in docstrings(path):
            for line in argument_lines(docstring):
                if re.match(r"\w+(, \w+)+:", line) or re.match(r"\w+:.*; \w+: ", line):
                    crowded.append(f"{name_of(path)}: {line}")
    assert not crowded, "one argument per line:\n" + "\n".join(crowded)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file's module, classes and functions, without common indentation."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def argument_lines(docstring: str) -> Iterator[str]:
    """The first line of each entry under `Args:`."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", docstring, re.M)
    for line in section[1].split("\n") if section else []:
        if re.match(r" {4}\S", line):
            yield line.strip()


# -- what pages and docstrings name ------------------------------------------------------------------------------------


def named_paths(text: str, folder: Path) -> set[str]:
    """The paths in a text that do not exist from the clone's root, from `folder` or from a folder of code."""
    roots = "|".join(re.escape(entry.name) for entry in ROOT.iterdir() if entry.is_dir() and entry.name[0] != ".")
    text = re.sub(r"https?://\S+", "", text)
    named = set(re.findall(rf"(?<![\w/.<-])((?:{roots}|\.ci|\.github)/[\w./-]*\w/?)(?![\w*{{<])", text))
    named |= set(re.findall(r"(?<![\w/.*<$-])((?:[a-z_][\w-]*/)*[a-z_]\w*\.(?:py|sh))(?![\w/*(])", text))
    named = {re.sub(rf"^segcompass/({'|'.join(PARTS)})/", r"\1/", path) for path in named}  # as installed
    placeholder = re.compile(
        r"(^|/)(runs|my_\w+|[A-Z]+)(/|\.|$)|^utils.py$"
    )  # outputs, the reader's files, what we avoid
    starts = [ROOT, folder, *(ROOT / part for part in (*FOLDERS, "docs", "segcompass/white_box"))]
    return {
        path for path in named if not placeholder.search(path) and not any((start / path).exists() for start in starts)
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_in_a_page_exists(page):
    missing = named_paths(page.read_text(encoding="utf-8"), page.parent)
    assert not missing, f"{name_of(page)} names {sorted(missing)}, which do not exist"


def test_every_path_in_docstrings_comments_and_recipes_exists():
    texts = {path: [*docstrings(path), *re.findall(r"#.*", path.read_text(encoding="utf-8"))] for path in CODE}
    recipes = [path for path in ROOT.glob("examples/**/*") if path.suffix in (".yaml", ".sh")]
    texts |= {path: [path.read_text(encoding="utf-8")] for path in [*recipes, ROOT / ".ci" / "run"]}
    missing = {name_of(path): named_paths("\n".join(text), path.parent) for path, text in texts.items()}
    missing = {name: sorted(paths) for name, paths in missing.items() if paths}
    assert not missing, "paths that do not exist:\n" + "\n".join(f"{name}: {paths}" for name, paths in missing.items())


LINKING = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "dev" / "log.md",
    *sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")),
]


def prose(page: Path) -> str:
    """The text of a page, or of a notebook's cells of text, without its code blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a forge calls the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def dead_links(text: str, page: Path) -> list[str]:
    """The relative links of a page that name a file, or a heading of a page, that does not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if re.match(r"https?://|mailto:", target):
            continue
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_every_link_leads_somewhere(page):
    dead = dead_links(prose(page), page)
    assert not dead, f"{name_of(page)} links to {dead}"


def test_a_dead_link_is_found():
    text = "[a](data.md#jsonl) [b](data.md#json) [c](gone.md) [d](#start) [e](https://x.y/#z) [f](../README.md#rows)"
    assert dead_links(text, ROOT / "docs" / "sae.md") == ["data.md#json", "gone.md", "#start"]


def test_contributing_says_which_file_to_edit_and_it_exists():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## To add X, edit Y")[1].split("\n\n")[1]
    rows = [row.split("|")[1:-1] for row in table.split("\n")[2:]]
    assert len(rows) >= 8
    for what, where, _ in rows:
        files = re.findall(r"`([\w./-]+/[\w./-]*)`", where)
        assert files or "nothing" in where, f"no file is named for{what}"
        for file in files:
            assert (ROOT / file).exists(), f"for{what}CONTRIBUTING.md names {file}"


def test_architecture_names_files_that_exist():
    drawing = ast.parse((ROOT / "dev" / "draw_architecture.py").read_text(encoding="utf-8"))
    strings = {
        node.value for node in ast.walk(drawing) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    files = {string for string in strings if re.fullmatch(r"[\w/]+\.py", string)}
    assert len(files) >= 11
    for file in files:
        assert (ROOT / file).exists() or (ROOT / "modeling_segcompass" / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dotted_names_in_pages_can_be_imported(page):
    for dotted in set(re.findall(r"\bsegcompass(?:\.\w+)+", page.read_text(encoding="utf-8"))):
        if dotted.endswith(("_segcompass.py", ".git")):
            continue
        names = dotted.split(".")
        for length in range(len(names), 0, -1):  # the longest module, then attributes
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join(names[:length]))
                break
        for name in names[length:]:
            assert hasattr(found, name), f"{name_of(page)} names {dotted}, but {found} has no {name!r}"
            found = getattr(found, name)


def commands_in_pages() -> list[tuple[str, str, str]]:
    """(page, command, options as written) of each `segcompass …` in a page's code."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        for line in "\n".join(code).replace("\\\n", " ").split("\n"):
            for words in re.findall(r"(?:^|&& |-m |^\$ )segcompass ([^#&|]*)", line):
                found.append((name_of(page), words.strip(), line))
    return found


def test_commands_and_options_in_the_pages_exist():
    from segcompass.cli import COMMANDS

    helps: dict[str, str] = {}
    added = set(re.findall(r"^\+ +(\w+):", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.M))
    for page, words, _ in commands_in_pages():
        if not re.match(r"[a-z]", words):  # `segcompass …`, `segcompass --help`
            continue
        stages = {name.split()[0] for name in COMMANDS if " " in name}
        command = " ".join(words.split()[: 2 if words.split()[0] in stages else 1])
        assert command in COMMANDS, f"{page}: `segcompass {words}` is no command; choose one of {list(COMMANDS)}"
        if command not in helps:
            helps[command] = help_of(command)
        for option in re.findall(r"--[\w-]+", words):
            known = option.replace("_", "-") in helps[command].replace("_", "-")
            known |= page == "docs/extending.md" and option[2:].replace("-", "_") in added
            assert known, f"{page}: `segcompass {command}` has no option {option}"


def help_of(command: str) -> str:
    """What `segcompass COMMAND --help` prints; with the help of its parts, where it has any (`push model`)."""
    from segcompass.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for part in ([], *([kind] for kind in ("model", "sae", "dataset", "metric") if command == "push")):
            with contextlib.suppress(SystemExit):
                main([*command.split(), *part, "--help"])
    return printed.getvalue()
