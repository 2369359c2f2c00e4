"""The pages as a site: built strictly, with every public name, and with nothing to be fetched from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

for name in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(name, reason=f"{name} is missing: pip install -c constraints.txt -e '.[docs]'")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "dev" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


class Loaded(HTMLParser):
    """What a browser fetches for a page, and the ids on it."""

    def __init__(self, path):
        super().__init__()
        self.fetched, self.links, self.ids = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag in ("script", "img", "iframe", "source") and attributes.get("src"):
            self.fetched.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.fetched.append(attributes["href"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])


def pages_of(site):
    return {path: Loaded(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_site_builds_strictly_and_fetches_nothing_from_elsewhere(site):
    pages = pages_of(site)
    assert len(pages) > 25
    for path, page in pages.items():
        for source in page.fetched:
            assert not re.match(r"(https?:)?//", source), f"{path.name} fetches {source}"
            assert source.startswith("data:") or (path.parent / source.split("?")[0]).is_file(), (path.name, source)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_link_and_anchor_on_the_site_leads_somewhere(site):
    pages = pages_of(site)
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), f"{path.relative_to(site)} links to {link}"
            if anchor and there in pages and not anchor.startswith("__"):
                assert anchor in pages[there].ids, f"{path.relative_to(site)} links to {link}"


def test_start_page_has_one_picture_and_three_doors(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    main = page.split("<article")[1].split("</article>")[0]
    assert main.count("<img") == 1
    doors = re.findall(r"<strong>(.+?)</strong>", main)
    assert doors == ["Use it", "Train it", "Look inside it"]
    links = Loaded(site / "index.html").links
    for notebook in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.stem}.html" in links


def test_public_names_and_nothing_else_have_their_places(site, hooks):
    for package in hooks.PARTS:
        ids = Loaded(site / hooks.api_path(package).replace(".md", ".html")).ids - {None}
        if package == "segcompass":
            continue
        names = {f"{package}.{name}" for name in hooks.public_names(package)}
        assert names <= ids, f"without a place: {sorted(names - ids)}"
        top = {name for name in ids if re.fullmatch(rf"{package}\.\w+", name)}
        assert top == names


def test_a_new_page_finds_its_place_by_itself(hooks, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("index.md", "families.md", "white_box.md", "brand_new.md"):
        (tmp_path / "docs" / name).write_text("# x\n")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    sections = {heading: pages for entry in hooks.navigation() for heading, pages in entry.items()}
    assert sections["Use it"] == ["families.md"] and sections["Look inside it"] == ["white_box.md"]
    assert sections["More"] == ["brand_new.md"] and "Extend it" not in sections


def test_links_of_the_repository_become_links_of_the_site(hooks):
    source = ROOT / "docs" / "sae.md"
    text = (
        "[a](../README.md#rows) [b](data.md) [c](../dev/log.md) [d](../constraints.txt) "
        "[e](https://x.y) [f](../gone.md)\n"
        "```\n[g](../README.md)\n```\n[h](../examples/notebooks/judge_a_white_box.ipynb)\n"
    )
    assert hooks.within_site(text, source, "sae.md") == (
        "[a](project/readme.md#rows) [b](data.md) [c](project/log.md) [d](files/constraints.txt.md) [e](https://x.y) "
        "[f](../gone.md)\n```\n[g](../README.md)\n```\n[h](notebooks/judge_a_white_box.md)\n"
    )
    moved = hooks.within_site("[a](docs/sae.md) [b](LICENSE)", ROOT / "README.md", "project/readme.md")
    assert moved == "[a](../sae.md) [b](../files/LICENSE.md)"
