"""What mkdocs needs to make a site of docs/ as it is: the hooks of mkdocs.yml.

    mkdocs build --strict

The pages of docs/ are found, not listed: a new one appears in the section that SECTIONS gives it, or in the last. Added
are a page for the public names of each part, read from its `__all__`; the notebooks of examples/notebooks/; README.md,
CONTRIBUTING.md, CHANGELOG.md and dev/log.md; and every other file that a page links to. Links between files of the
repository, which work on a forge, become links within the site. Imports nothing of the package.
"""

import ast
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = "examples/notebooks"
START = "index.md"
SECTIONS = {
    "Use it": ("families.md", "encoders.md", "routes.md", "generation.md", "serving.md", "space.md", "hub.md"),
    "Train it": ("own_data.md", "data.md", "training.md", "sae.md", "reproduce.md"),
    "Look inside it": ("white_box.md",),
    "Extend it": ("extending.md",),
    "Measured": ("measured.md", "performance.md", "protocols.md", "reliability.md", "outside_suites.md"),
}
"""Heading -> pages of docs/ in order; those that do not exist are passed over."""
MORE = "More"
"""Where pages stand that no section names."""
SECTION_OF_NOTEBOOKS = {"segment": "Use it", "train": "Train it", "judge": "Look inside it"}
"""What a notebook's name begins with -> its section; others stand under MORE."""
PROJECT = {
    "README.md": "project/readme.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "dev/log.md": "project/log.md",
}
PARTS = {
    "segcompass": "The package",
    "segcompass.modeling_segcompass": "The model",
    "segcompass.trainers": "Trainers",
    "segcompass.loaders": "Data sets",
    "segcompass.hub_cards": "The Hub",
    "segcompass.white_box": "The white box",
}
"""Package -> title of the page of its public names."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.M | re.S)

_layout: list[str] = []  # the folder with the installed layout, until the build ends


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: Any) -> Any:
    """Write the navigation, and lay the parts out as they are when installed, where mkdocstrings reads them.

    Args:
        config: of mkdocs.

    Returns:
        The same.
    """
    folder = tempfile.mkdtemp(prefix="segcompass-docs-")
    _layout.append(folder)
    package = Path(folder) / "segcompass"
    package.mkdir()
    parts = [name.split(".")[1] for name in PARTS if "." in name and (ROOT / name.split(".")[1]).is_dir()]
    for source in (*(ROOT / "segcompass").iterdir(), *(ROOT / part for part in parts)):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers.setdefault("python", {})["paths"] = [folder]
    config.nav = navigation()
    return config


def on_post_build(config: Any) -> None:
    """Remove what `on_config` laid out.

    Args:
        config: of mkdocs.
    """
    while _layout:
        shutil.rmtree(_layout.pop(), ignore_errors=True)


def navigation() -> list[dict[str, Any]]:
    """The pages that exist, by section."""
    found = {path.name for path in (ROOT / "docs").glob("*.md")} - {START}
    sections: dict[str, list[Any]] = {}
    for heading, names in SECTIONS.items():
        sections[heading] = [name for name in names if name in found]
        found -= set(names)
    for path in notebooks():
        heading = SECTION_OF_NOTEBOOKS.get(re.split(r"[_-]", path.stem)[0], MORE)
        sections.setdefault(heading, []).insert(0, site_path(path))
    sections.setdefault(MORE, []).extend(sorted(found))
    nav: list[dict[str, Any]] = [{"Start": START}]
    nav += [{heading: pages} for heading, pages in sections.items() if pages]
    nav.append({"Public names": [{title: api_path(package)} for package, title in PARTS.items()]})
    names = {"README.md": "Overview", "CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changes"}
    project = [{names.get(source, "Log of experiments"): page} for source, page in PROJECT.items()]
    nav.append({"Project": project})
    return nav


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/.

    Args:
        files: those of docs/.
        config: of mkdocs.

    Returns:
        All of them.
    """
    made = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PROJECT.items()}
    sources = {page: ROOT / source for source, page in PROJECT.items()}
    for path in notebooks():
        made[site_path(path)] = notebook_markdown(path)
        sources[site_path(path)] = path
    linked = set()
    texts = [(path, path.read_text(encoding="utf-8")) for path in (ROOT / "docs").glob("*.md")]
    for source, markdown in (*texts, *((sources[page], markdown) for page, markdown in made.items())):
        linked |= set(files_linked(markdown, source))
    for path in sorted(linked):
        made.setdefault(site_path(path), file_markdown(path))
    for page, markdown in made.items():
        markdown = within_site(markdown, sources[page], page) if page in sources else markdown
        files.append(File.generated(config, page, content=markdown))
    for package, title in PARTS.items():
        files.append(File.generated(config, api_path(package), content=api_markdown(package, title)))
    listed = set(made) - set(PROJECT.values()) - {site_path(path) for path in notebooks()}
    for page in listed:  # reached by links, not by the navigation
        shown = files.get_file_from_path(page)
        if shown is not None:
            shown.inclusion = InclusionLevel.NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page of docs/ into links within the site.

    Args:
        markdown: of the page.
        page: of mkdocs.
        config: of mkdocs.
        files: all of them.

    Returns:
        The same with other links.
    """
    path = ROOT / "docs" / page.file.src_uri
    return within_site(markdown, path, page.file.src_uri) if path.is_file() else markdown


# -- links -------------------------------------------------------------------------------------------------------------


def within_site(markdown: str, source: Path, page: str) -> str:
    """A text with its links to files of the repository led to their pages on the site.

    Args:
        markdown: the text.
        source: its file in the repository.
        page: its page on the site.

    Returns:
        The text; links to what does not exist are left, for mkdocs to complain of.
    """

    def lead(link: re.Match) -> str:
        path, mark, fragment = link[2].partition("#")
        target = _in_repository(path, source)
        if target is None:
            return link[0]
        relative = os.path.relpath(site_path(target), PurePosixPath(page).parent.as_posix() or ".")
        return f"{link[1]}{relative.replace(os.sep, '/')}{mark}{fragment}{link[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)


def files_linked(markdown: str, source: Path) -> list[Path]:
    """The files that a text links to and that no page of docs/ shows."""
    text = "".join(part for part in FENCE.split(markdown) if not part.startswith("```"))
    targets = (_in_repository(link[2].partition("#")[0], source) for link in LINK.finditer(text))
    return [target for target in targets if target is not None and site_path(target).startswith("files/")]


def _in_repository(link: str, source: Path) -> Path | None:
    """The file of the repository that a relative link means; None for other links and for what does not exist."""
    if not link or re.match(r"[a-z]+:|/", link):
        return None
    target = (source.parent / link).resolve()
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def site_path(target: Path) -> str:
    """Where the site shows a file of the repository.

    Args:
        target: the file.

    Returns:
        The page's or the picture's path within the site.
    """
    path = target.relative_to(ROOT).as_posix()
    if path in PROJECT:
        return PROJECT[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(f"{NOTEBOOKS}/") and path.endswith(".ipynb"):
        return f"notebooks/{target.stem}.md"
    return f"files/{path}.md"


def file_markdown(path: Path) -> str:
    """A file's text as a page."""
    name = path.relative_to(ROOT).as_posix()
    language = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash"}.get(
        path.suffix, "text"
    )
    return f"# `{name}`\n\n````{language}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"


# -- notebooks ---------------------------------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    """The notebooks, by name."""
    return sorted((ROOT / NOTEBOOKS).glob("*.ipynb"))


def notebook_markdown(path: Path) -> str:
    """A notebook as a page: its text, its code, and the outputs that are kept in it.

    Args:
        path: the notebook.

    Returns:
        Markdown; pictures are part of it.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```python\n{source}\n```")
            parts += [part for output in cell["outputs"] if (part := _output_markdown(output))]
    link = f"This page is the notebook `{path.relative_to(ROOT).as_posix()}`, with the outputs of its last run."
    return "\n\n".join([*parts, f"*{link}*"]) + "\n"


def _output_markdown(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    data = output.get("data", {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            return f'<img alt="output of the cell above" src="data:{kind};base64,{"".join(data[kind]).strip()}">'
    if "text/plain" in data:
        return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
    return ""


# -- public names ------------------------------------------------------------------------------------------------------


def api_path(package: str) -> str:
    """Where the page of a package's public names is."""
    return f"api/{package.rsplit('.')[-1]}.md"


def public_names(package: str) -> list[str]:
    """What a package exports, read from its `__init__.py`.

    Args:
        package: dotted name.

    Returns:
        The names of `__all__`; of the package itself, those of its parts.
    """
    tree = ast.parse(init_of(package).read_text(encoding="utf-8"))
    values = {
        ast.unparse(target): node.value for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
    }
    if package == "segcompass":
        return [name for names in ast.literal_eval(values["_PUBLIC"]).values() for name in names]
    return list(ast.literal_eval(values["__all__"]))


def init_of(package: str) -> Path:
    """The `__init__.py` of a package in the clone."""
    parts = package.split(".")
    folder = ROOT / parts[-1] if len(parts) > 1 and (ROOT / parts[-1]).is_dir() else ROOT.joinpath(*parts)
    return folder / "__init__.py"


def api_markdown(package: str, title: str) -> str:
    """The page of a package's public names.

    Args:
        package: dotted name.
        title: of the page.

    Returns:
        Markdown, in which mkdocstrings fills in the names' docstrings.
    """
    names = public_names(package)
    if package != "segcompass":
        documented = "\n\n".join(f"::: {package}.{name}" for name in names)
        return f"# {title}\n\n`{package}`\n\n{documented}\n"
    tree = ast.parse(init_of(package).read_text(encoding="utf-8"))
    parts = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC"
    )
    rows = [
        f"| [`{name}`]({part}.md#segcompass.{part}.{name}) | [`segcompass.{part}`]({part}.md) |"
        for part, named in parts.items()
        for name in named
    ]
    table = "\n".join(["| name | is part of |", "|---|---|", *rows])
    others = "\n".join(f"- [`{other}`]({api_path(other)[4:]})" for other in PARTS if other != package)
    return (
        f"# {title}\n\n```python\nfrom segcompass import SegCompassModel, SegCompassProcessor\n```\n\n{table}\n\n"
        f"The parts export these and more:\n\n{others}\n"
    )
