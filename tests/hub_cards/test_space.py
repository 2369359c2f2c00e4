"""The Space as people meet it: in a real browser at desktop and phone width, with the keyboard alone, and as MCP tools.

Needs gradio, selenium and mcp (`pip install -e ".[browser]"`) and, but for the tools, Debian's `chromium` and
`chromium-driver`; what is missing is skipped by name. The pictures in docs/figures are taken by
`SPACE_SCREENSHOTS=docs/figures python -m pytest -q tests/hub_cards/test_space.py`. `SPACE_ADDRESS=http://…` tries a
Space that already runs, with the small model.
"""

import asyncio
import base64
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from segcompass.loaders.masks import coco_rle
from segcompass.segmentation import segment_image
from tests.support.browser import DESKTOP, PHONE, chromium, contrast, overflow, picture, size_window
from tests.support.hub_client import ROOT

if importlib.util.find_spec("gradio") is None:  # not imported here, which takes seconds
    pytest.skip('gradio is missing: pip install -e ".[browser]"', allow_module_level=True)

EXAMPLES = ROOT / "examples"
MINI = EXAMPLES / "checkpoints" / "mini"
SCENE = json.loads((EXAMPLES / "scene.json").read_text())
PATIENCE = 600
"""Seconds after which something will never come; a busy machine takes minutes for the first."""
TWO, STARS, NONE = 0, 1, 3
# examples.json: two purple boxes beside a blue star; a red star and a yellow one; nothing to the left of the red thing


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app in a process of its own, which cannot import this project; or one that already runs."""
    if "SPACE_ADDRESS" in os.environ:
        yield os.environ["SPACE_ADDRESS"]
        return
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(ROOT / "hub_cards" / "space", folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment |= {"SEGCOMPASS_MODEL": str(MINI), "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    with open(folder / "log", "w") as log:
        command = [sys.executable, str(folder / "space" / "app.py")]
        app = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert app.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        app.terminate()
        app.wait()


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    driver = chromium()
    yield driver
    driver.quit()


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser, address, size=DESKTOP, theme="light"):
        from selenium.webdriver.common.action_chains import ActionChains

        self.browser, self.pointer = browser, lambda: ActionChains(browser, duration=50)
        size_window(browser, size)
        browser.get(f"{address}/?__theme={theme}")
        self.wait(lambda: self.all("#examples button") and self.all("#ask") and self.all(".why"))
        self.js(  # every shift counts, also those that follow a click
            "window.shifts = []; new PerformanceObserver(list => list.getEntries().forEach(entry => window.shifts.push("
            "[entry.value, entry.hadRecentInput, entry.sources.map(s => s.node && (s.node.className || s.node.id || "
            "s.node.nodeName)).join()]))).observe({type: 'layout-shift'})"
        )

    def wait(self, condition, patience=PATIENCE):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, patience, poll_frequency=0.05).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.wait(lambda: self.all(selector), 120)[0]

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    @property
    def answer(self):
        return self.js("return document.querySelector('.why').dataset.answer")

    def until_answered(self, before=""):
        """Wait for another answer than `before`; returns the lengths that its text had on the way."""
        lengths = set()

        def answered():
            lengths.add(len(self.text(".why .text")))
            return self.answer not in ("", before)

        self.wait(answered)
        self.wait(lambda: self.all(".why .slot:not([hidden])"))
        return lengths

    def run(self, example):
        before = self.answer
        self.one(f"[data-example='{example}']").click()
        return self.until_answered(before)

    def concept(self, name):
        return self.one(f".slot:not([hidden]) .concept[data-name='{name}']")

    def kind(self, kind):
        """The heaviest concept of a kind, "look" or "place"."""
        rows = self.all(".slot:not([hidden]) .concept[data-c]")
        return next(row for row in rows if row.find_element("css selector", ".head small").text == kind)

    def forecast(self, row):
        """What a concept says it does when it is switched off."""
        said = self.js("return arguments[0].querySelector('.loss .said').textContent", row)
        assert said.startswith("off: ")
        return said.removeprefix("off: ")

    def to(self, element):
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        return element

    def press(self, action):
        """A button of the controls; waits for the answer to it."""
        before = self.text(".changes")
        self.to(self.one(f".controls [data-do={action}]")).click()
        self.wait(lambda: self.text(".changes") != before)
        self.wait(lambda: not self.all(".why.computing"))

    def overflows(self):
        return overflow(self.browser)

    def keep(self, name, selector=None, width=1000):
        """A picture of the page, or of a part of it, only when pictures are asked for."""
        if "SPACE_SCREENSHOTS" not in os.environ:
            return
        self.wait(lambda: self.all(".foretold p"))
        time.sleep(0.5)
        picture(self.browser, selector, width).save(Path(os.environ["SPACE_SCREENSHOTS"]) / name, quality=66, method=6)


def test_an_example_says_why_its_mask_is_there_and_nothing_shifts(browser, address):
    page = Page(browser, address)
    lengths = page.run(TWO)
    assert len(lengths) > 3, f"the reasoning came in {len(lengths)} pieces"
    time.sleep(0.3)
    shifts = page.js("return window.shifts")
    assert sum(value for value, _, _ in shifts) < 0.02, shifts
    assert page.text(".verdict").startswith("2 masks") and len(page.all(".tab")) == 2
    assert "answer: B4 purple box, C2 purple box." in page.text(".why .text")
    rows = page.all(".slot:not([hidden]) .concept[data-c]")
    names = [row.get_attribute("data-name") for row in rows]
    assert "purple" in names and any(name.startswith("column ") for name in names), names
    shares = [row.get_attribute("data-share") for row in rows]
    shares = [0 if share.startswith("under") else int(share.removeprefix("over ").rstrip("%")) for share in shares]
    assert shares == sorted(shares, reverse=True) and 90 <= sum(shares) <= 103
    told = page.concept("purple").get_attribute("title")
    assert told == "purple: It says how a thing looks; it is named after what it was found to detect in images."
    assert page.text(".about-chosen")
    assert "Look: how a thing looks; place: where it is." in page.text(".slot:not([hidden]) .rows + .caption")
    stages = [each.text for each in page.all(".slot:not([hidden]) .stage")]
    assert [stage.split("\n")[0] for stage in stages[1:]] == ["it decides", "it concludes"]
    assert "left of D3" in stages[1]
    assert "Relations (left of, larger) are settled where it decides" in page.text(
        ".slot:not([hidden]) .words .caption"
    )

    page.pointer().move_to_element(page.to(page.concept("purple"))).perform()
    lit = lambda: [each.text for each in page.all(".slot:not([hidden]) .word.lit")]  # noqa: E731
    page.wait(lambda: "purple" in lit(), 120)
    visible = "return getComputedStyle(document.querySelector(arguments[0])).visibility"
    number = page.concept("purple").get_attribute("data-c")
    assert page.js(visible, f".slot:not([hidden]) .places .part[data-c='{number}']") == "visible"
    assert page.js(visible, ".slot:not([hidden]) .places .total") == "hidden"
    share = page.concept("purple").get_attribute("data-share")
    assert page.text(".slot:not([hidden]) .place") == f"only purple ({share})"
    assert page.js(visible, ".slot:not([hidden]) .places .edge") == "visible"  # where the mask ends, over any heat
    ramp, mark = (page.one(f".slot:not([hidden]) .legend {each}").rect for each in (".ramp", ".ramp b"))
    hottest = float(page.text(".slot:not([hidden]) .most").split()[-1])
    assert (mark["x"] + mark["width"] / 2 - ramp["x"]) / ramp["width"] == pytest.approx(hottest, abs=0.05)
    assert "".join(page.text(".slot:not([hidden]) .board").split()) == "ABCD1234"

    row = next(
        row for row in page.all(".slot:not([hidden]) .concept[data-c]") if row.get_attribute("data-name") == "box"
    )
    word = next(word for word in page.all(".slot:not([hidden]) .word") if word.text == "box")
    page.to(word).click()
    assert row.get_attribute("aria-pressed") == "true"  # a word chooses the concept of its name
    assert page.text(".note:not([hidden]) span") == "“purple” and “box” heat B4 too; “column C” makes the difference."
    page.pointer().move_to_element(page.to(page.one(".slot:not([hidden]) .word"))).perform()  # from the word
    page.wait(lambda: len(page.all(".slot:not([hidden]) .concept.lit")) >= 2, 120)
    heat = page.to(page.one(".slot:not([hidden]) .places .picture"))  # from the place, the upper box
    right, down = (0.71 - 0.5) * heat.size["width"], (0.33 - 0.5) * heat.size["height"]
    page.pointer().move_to_element_with_offset(heat, right, down).perform()
    page.wait(lambda: len(page.all(".concept.lit")) == 1, 120)  # the one that adds most there
    page.pointer().move_to_element(page.one("h1")).perform()
    page.wait(lambda: not page.all(".concept.lit"), 120)

    page.all(".tab")[1].click()  # the other mask has reasons of its own
    others = [row.get_attribute("data-name") for row in page.all(".slot:not([hidden]) .concept[data-c]")]
    assert others != names and "purple" in others


def test_switching_off_swapping_and_undoing_show_before_and_after(browser, address):
    page = Page(browser, address)
    page.run(STARS)
    look = page.kind("look").get_attribute("data-name")
    other = {"red": "yellow", "yellow": "red"}[look]
    source = lambda side: page.js(  # noqa: E731
        "return document.querySelector('.pair:not([hidden]) .' + arguments[0] + ' .drawn')?.getAttribute('href')", side
    )
    before = source("before")
    assert before and source("after") is None
    assert page.text(".pair:not([hidden]) .before figcaption") == "before: mask 1 of 2"
    page.to(page.concept(look)).click()
    assert page.text(".do > span") == f"Change {look}: acts on all masks of this answer"
    offered = page.js("return [...document.querySelector('.other').options].filter(o => !o.hidden).map(o => o.value)")
    assert look not in offered and other in offered and offered[:12] == sorted(offered[:12])
    assert page.js("return [...document.querySelector('.other').options].some(o => o.text === 'column A')")
    page.wait(lambda: "→" in page.text(".foretold"), 120)
    rows = dict(reversed(row.text.split(": ", 1)) for row in page.all(".foretold p"))
    does, names = next((does, names) for does, names in rows.items() if f" {other}" in names.replace(",", ""))
    assert does == "it moves to " + {"red": "B2", "yellow": "C3"}[other] and "× 2" in page.text(".foretold")
    chosen = page.js("return document.querySelector('.other').selectedOptions[0].text")
    assert f"→ {chosen}" in rows[page.one(".foretold p:nth-child(2) b").text]  # what moves it most is offered first
    page.js(  # as a visitor chooses
        "const other = document.querySelector('.other'); other.value = arguments[0];"
        "other.dispatchEvent(new Event('change', {bubbles: true}))",
        other,
    )
    page.press("swap")
    assert page.text(".pair:not([hidden]) .moved") == f"{look} → {other}: the mask {does.removeprefix('it ')}."
    assert source("before") == before and source("after") not in (None, before)
    assert f"→ {other}" in page.concept(look).text and page.text(".changes") == f"{look} → {other}×"
    assert page.concept(look).get_attribute("aria-pressed") == "true"  # still chosen
    page.keep("space.webp")
    page.keep("space_swap.webp", ".lower")
    row = page.to(page.kind("place"))
    name = row.get_attribute("data-name")
    row.click()
    page.press("off")
    assert "off" in page.concept(name).text and page.text(".controls [data-do=off]") == "Switch on"
    assert page.text(".slot:not([hidden]) .mask .caption").startswith("after:")
    assert page.text(".pair:not([hidden]) .moved").startswith(f"{name} off: ")
    page.press("drop")  # the first change alone
    assert page.text(".changes") == f"{name} off×"
    page.press("off")  # on again
    assert page.text(".changes") == "" and page.text(".controls [data-do=off]") == "Switch off"
    page.press("double")
    page.press("undo")
    assert page.text(".changes") == "" and source("after") is None and source("before") == before


def test_what_is_foretold_is_what_the_click_shows_and_the_headline_counts_the_masks_asked_about(browser, address):
    page = Page(browser, address)
    page.run(TWO)
    drawn = ".pair:not([hidden]) .after .drawn"
    for _ in range(5):  # one concept after the other, until nothing is left of the first mask
        row = next(
            row for row in page.all(".slot:not([hidden]) .concept") if row.find_elements("css selector", ".loss")
        )
        name, told = row.get_attribute("data-name"), page.forecast(row)
        page.to(row).click()
        page.press("off")
        moved = page.text(".pair:not([hidden]) .moved")
        number = told.split()[0] if "%" in told else ""
        assert moved.startswith(f"{name} off: {number}"), (told, moved)
        assert page.text(".verdict").startswith("After: mask 1: ") and "; mask 2: " in page.text(".verdict")
        if told == "no mask left":
            break
        assert page.all(drawn)
    assert told == "no mask left" and f"{name} off: no mask is left (" in moved
    assert page.text(".verdict").startswith("After: mask 1: no mask left; mask 2: ")
    tab = page.text(".tab[aria-pressed=true]")  # sure or not, it does not claim a mask
    assert ("no mask left" in tab or "needs 0.50" in tab) and not page.all(drawn)
    assert "How sure the model is" in page.one(".tab").get_attribute("title")


def test_words_that_the_model_never_learned_are_named(browser, address):
    page = Page(browser, address)
    page.run(TWO)
    assert not page.all(".warned")
    before = page.answer
    box = page.one("#instruction textarea, #instruction input")
    box.clear()
    box.send_keys("the dog and the star")
    page.one("#ask").click()
    page.until_answered(before)
    assert page.text(".warned").startswith("It never learned “dog” (as written), so its answer is a guess.")
    assert "ball, box, cone, moon, ring, star" in page.text(".warned")
    assert page.overflows() <= 0


def test_a_change_is_under_way_at_once_and_nothing_queues_behind_it(browser, address):
    page = Page(browser, address)
    page.run(TWO)
    page.to(page.concept("purple")).click()
    seen = page.js(  # three clicks before anything can have come back
        "const off = document.querySelector('[data-do=off]'), why = document.querySelector('.why');"
        "off.click(); off.click(); document.querySelector('[data-do=double]').click();"
        "return [why.classList.contains('computing'), off.getAttribute('aria-disabled'), off.textContent,"
        "getComputedStyle(document.querySelector('.pair:not([hidden]) .after .picture'), '::after').content]"
    )
    assert seen == [True, "true", "Switch off", '"computing …"']
    page.wait(lambda: page.text(".changes") and not page.all(".why.computing"), 60)
    time.sleep(2)
    assert page.text(".changes") == "purple off×" and not page.all(".controls [data-do][aria-disabled=true]")
    page.js(
        "document.querySelector('.changes button').dataset.concept = 999; "
        "document.querySelector('.changes button').click()"
    )  # refused
    page.wait(lambda: "none of this answer" in page.text("body") and not page.all(".why.computing"), 60)
    page.js("window.settled = 0; document.addEventListener('settled', () => window.settled++)")
    from selenium.webdriver.common.keys import Keys

    needed = page.one("#threshold input[type=number]")
    page.to(needed).send_keys(Keys.CONTROL, "a")
    needed.send_keys("1")  # typed, not dragged: it counts at once
    page.wait(lambda: "no mask" in page.text(".verdict") and not page.all(".why.computing"), 60)
    assert page.js("return window.settled") and page.text(".changes") == "purple off×"


def test_no_target_explains_itself(browser, address):
    page = Page(browser, address)
    page.run(NONE)
    assert page.text(".verdict").startswith(
        "No target: it answered that nothing fits (“answer: none”), confidence below 0.01, a mask needs 0.50."
    )
    names = [row.get_attribute("data-name") for row in page.all(".slot:not([hidden]) .concept[data-c]")]
    assert names and not any(re.fullmatch(r"\W*", name) for name in names)  # marks are no names
    assert page.text(".note").startswith("There is no mask to move: confidence is missing")
    assert page.one(".slot:not([hidden]) .word").get_attribute("title").count("mask reads comes from this word.")
    assert "answer: none." in page.text(".why .text") and "best guess" in page.text(".tab")
    assert page.all(".slot:not([hidden]) .concept[data-c]") and "all together" in page.text(".place")
    page.keep("space_none.webp", ".why")


def test_a_phone_shows_everything_without_scrolling_sideways(browser, address):
    page = Page(browser, address, PHONE)
    assert page.overflows() <= 0
    page.run(TWO)
    assert page.overflows() <= 0
    top = page.js("return document.querySelector('.why').getBoundingClientRect().top")
    assert top < PHONE[1], "the answer is out of sight"
    time.sleep(0.3)
    shifts = page.js("return window.shifts")
    assert sum(value for value, _, _ in shifts) < 0.05, shifts
    page.to(page.concept("purple")).click()
    assert "purple" in [word.text for word in page.all(".slot:not([hidden]) .word.lit")]  # a tap lights, as pointing
    page.press("off")
    before, after = (page.one(f".pair:not([hidden]) .{side}").rect for side in ("before", "after"))
    assert before["y"] == after["y"] and before["x"] + before["width"] <= after["x"], "not side by side"
    assert page.overflows() <= 0
    small = page.js(
        "return [...document.querySelectorAll('.why button, #examples button')].filter(b => b.offsetParent && "
        "b.offsetHeight < 24).map(b => b.outerHTML.slice(0, 80))"
    )
    assert not small, "too small for a finger"
    page.keep("space_phone.webp", ".why", width=390)


def test_the_keyboard_is_enough(browser, address):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, address)

    def tab_to(selector, limit=60):
        for _ in range(limit):
            focused = browser.switch_to.active_element
            if page.js("return arguments[0].matches(arguments[1])", focused, selector):
                outline = focused.value_of_css_property("outline-style")
                assert outline != "none", f"{selector} does not show that it has the focus"
                return focused
            page.pointer().send_keys(Keys.TAB).perform()
        raise AssertionError(f"{selector} is out of reach")

    page.js("document.body.focus()")
    before = page.answer
    tab_to(f"[data-example='{TWO}']").send_keys(Keys.ENTER)
    page.until_answered(before)
    tab_to(".tab[aria-pressed=false]").send_keys(Keys.ENTER)
    name = page.kind("place").get_attribute("data-name")
    tab_to(f".slot:not([hidden]) .concept[data-name='{name}']").send_keys(Keys.SPACE)
    assert page.text(".chosen") == name and page.concept(name).get_attribute("class").split()[-1] == "lit"
    tab_to(".controls [data-do=off]").send_keys(Keys.ENTER)
    page.wait(lambda: page.text(".changes"))
    assert page.js("return document.activeElement.dataset.do") == "off"  # the focus stays where it was
    assert "mask" in page.text(".pair:not([hidden]) .moved")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, address, theme):
    page = Page(browser, address, theme=theme)
    page.run(NONE)
    for selector in (".caption", ".hint", ".from", ".text", ".stage small", ".legend", ".concept strong", "h2"):
        found = contrast(browser, f".why {selector}", ".step")
        assert found >= 4.5, f"{selector}: {found:.1f} to 1"


def test_an_image_of_ones_own_is_asked_about(browser, address, tmp_path):
    shutil.copyfile(EXAMPLES / SCENE["image"], tmp_path / "mine.png")
    page = Page(browser, address)
    page.one("#ask").click()
    page.wait(lambda: "No image yet" in page.text("body"))  # refused in words
    page.all("#image input[type=file]")[0].send_keys(str(tmp_path / "mine.png"))
    page.wait(lambda: page.all("#image img"))
    page.one("#instruction textarea, #instruction input").send_keys("the blue star")
    page.one("#ask").click()
    page.until_answered()
    assert page.text(".verdict").startswith("1 mask,") and page.concept("blue").is_displayed()


# -- as MCP tools ------------------------------------------------------------------------------------------------------


def call(address, *calls):
    """What an MCP client gets: the tools, and the answer to each call (name, arguments)."""
    mcp = pytest.importorskip("mcp", reason='mcp is missing: pip install -e ".[browser]"')
    from mcp.client.streamable_http import streamablehttp_client

    async def talk():
        async with (
            streamablehttp_client(f"{address}/gradio_api/mcp/") as (reads, writes, _),
            mcp.ClientSession(reads, writes) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            return tools, [await session.call_tool(name, given) for name, given in calls]

    return asyncio.run(talk())


def test_an_mcp_client_gets_the_masks_of_segment(address, tmp_path):
    path = EXAMPLES / SCENE["image"]
    image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    asked = {"image": image, "instruction": SCENE["instruction"]}
    tools, (segmented, explained, changed, refused) = call(
        address,
        ("segment", asked),
        ("explain", asked),
        ("change_concepts", {**asked, "instruction": "find the blue star", "swap": "blue=purple"}),
        ("segment", {**asked, "instruction": "x" * 1001}),
    )
    assert set(tools) == {"segment", "explain", "change_concepts"}
    for tool in tools.values():
        described = tool.inputSchema["properties"]
        assert len(tool.description) > 80 and all(each.get("description") for each in described.values()), tool.name
    answer = json.loads(segmented.content[0].text)
    ours = segment_image(str(path), SCENE["instruction"], str(MINI), tmp_path)
    assert answer["text"] == ours["text"] and answer["no_target"] is False and len(ours["instances"]) == 2
    for got, wanted in zip(answer["instances"], ours["instances"], strict=True):
        assert got["slot"] == wanted["slot"] and got["box"] == wanted["box"]
        assert got["score"] == pytest.approx(wanted["score"], abs=1e-6)
        assert coco_rle(got["segmentation"], *got["segmentation"]["size"]) == wanted["segmentation"]
    reasons = json.loads(explained.content[0].text)
    concepts = reasons["slots"][0]["concepts"]
    assert "purple" in [each["name"] for each in concepts] and reasons["verdict"].startswith("2 masks")
    assert all(0 <= each["lost_without_it"] <= 1 for each in concepts) and reasons["unknown_words"] == []
    moved = json.loads(changed.content[0].text)
    (star,), elsewhere = moved["before"]["instances"], [each["box"] for each in moved["after"]["instances"]]
    assert elsewhere and star["box"] not in elsewhere and elsewhere[0] in [each["box"] for each in answer["instances"]]
    assert refused.isError and "1,001 characters" in refused.content[0].text
