"""The pages as a site: built strictly, with every public name, with nothing to be fetched from elsewhere; and as read.

The second half opens the site in a browser (`pip install -e ".[docs,browser]"`, Debian's `chromium` and
`chromium-driver`). `SITE_SCREENSHOTS=FOLDER` keeps what it saw.
"""

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.browser import DESKTOP, PHONE, chromium, contrast, overflow, picture, size_window

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


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    driver = chromium()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(site):
    """The site on this machine, as a web server shows it: search does not work from files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Reader:
    """Somebody with a window of this size, who prefers light or dark pages."""

    def __init__(self, browser, address, size=DESKTOP, theme="light"):
        self.browser, self.address, self.js = browser, address, browser.execute_script
        size_window(browser, size)
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )

    def open(self, page):
        self.browser.get(f"{self.address}/{page}")
        self.wait("return document.readyState == 'complete' && !!document.querySelector('.md-content')")

    def wait(self, condition, *arguments, patience=120):
        deadline = time.monotonic() + patience
        while not (found := self.js(condition, *arguments)):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.1)
        return found

    def keep(self, name):
        if "SITE_SCREENSHOTS" in os.environ:
            time.sleep(0.5)
            picture(self.browser).save(Path(os.environ["SITE_SCREENSHOTS"]) / name)


def test_every_page_fits_a_phone_and_shows_its_pictures(site, browser, address):
    reader = Reader(browser, address, PHONE)
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if "files" not in path.parts)
    assert len(pages) > 25
    for page in pages:
        reader.open(page)
        broken = reader.wait(
            "const images = [...document.images]; images.forEach(each => each.loading = 'eager');"
            "return images.every(each => each.complete) && [images.filter(each => !each.naturalWidth).map(i => i.src)]"
        )
        assert broken == [[]], f"{page} does not show {broken}"
        wide = reader.js(
            "return [...document.querySelectorAll('.md-content *')].filter(each => each.getBoundingClientRect().right >"
            " innerWidth + 1 && !each.closest('pre, table, .md-typeset__scrollwrap, .tabbed-set')).map(each => "
            "each.outerHTML.slice(0, 150)).slice(0, 3)"
        )
        assert overflow(browser) <= 0 and not wide, f"{page} is wider than a phone: {wide}"
    reader.open("index.html")
    reader.keep("site_phone.png")


def test_start_page_leads_through_each_door(browser, address):
    reader = Reader(browser, address)
    reader.open("index.html")
    reader.keep("site_start.png")
    doors = reader.js(
        "return [...document.querySelectorAll('.doors > ul > li')].map(each => [each.offsetTop, each.offsetWidth, "
        "each.querySelector('a').href])"
    )
    assert len(doors) == 3 and len({top for top, _, _ in doors}) == 1, "the doors stand beside one another"
    image = reader.js("const i = document.querySelector('.md-content img'); return [i.naturalWidth, i.offsetWidth]")
    assert image[0] > 0 and 300 < image[1] <= DESKTOP[0]
    for _, _, link in doors:
        reader.browser.get(link)
        assert reader.js("return document.querySelector('.md-content h1').textContent.length") > 3


def test_search_finds_a_word_and_leads_to_it(browser, address):
    reader = Reader(browser, address)
    reader.open("index.html")
    reader.js("document.querySelector('[data-md-toggle=search]').click()")
    field = browser.find_element("css selector", ".md-search__input")
    field.send_keys("concept_replace")
    links = reader.wait(
        "const found = [...document.querySelectorAll('.md-search-result__link')]; "
        "return found.length && found.map(each => each.href)"
    )
    assert any("white_box.html" in link for link in links), links
    reader.keep("site_search.png")
    browser.get(links[0])
    assert "concept_replace" in reader.js("return document.querySelector('.md-content').textContent")


def test_light_and_dark_follow_the_reader_and_the_switch(browser, address):
    grounds = {}
    for theme in ("light", "dark"):
        reader = Reader(browser, address, theme=theme)
        reader.open("white_box.html")
        for selector in (".md-content p", ".md-content td", ".md-content p a", ".md-content h2", ".md-nav__link"):
            found = contrast(browser, selector, "body")
            assert found >= 4.5, f"{theme}, {selector}: {found:.1f} to 1"
        grounds[theme] = reader.js("return getComputedStyle(document.body).backgroundColor")
        reader.keep(f"site_{theme}.png")
    assert grounds["dark"] != grounds["light"]
    reader.js("document.querySelector('label.md-header__button[for^=__palette]:not([hidden])').click()")
    reader.wait("return document.body.dataset.mdColorScheme == 'default'")  # from dark to light, by hand


def test_code_is_copied_whole(browser, address):
    reader = Reader(browser, address)
    for page in ("project/readme.html", "notebooks/segment_and_look_inside.html"):
        reader.open(page)
        blocks = reader.js(
            "window.copied = null; navigator.clipboard.writeText = async text => { window.copied = text };"
            "document.execCommand = () => { window.copied = getSelection().toString() || "
            "document.activeElement.value; return true };"
            "return [...document.querySelectorAll('.md-content pre > code')].map(each => "
            "[each.textContent, !!each.parentElement.parentElement.querySelector('button.md-clipboard, "
            "button[data-md-type=copy], .md-code__button')])"
        )
        assert len(blocks) > 4
        assert all(button for _, button in blocks), [text for text, button in blocks if not button]
        reader.js("document.querySelector('.md-content pre button, .md-content .md-code__button').click()")
        copied = reader.wait("return window.copied")
        assert copied.strip() == blocks[0][0].strip()
