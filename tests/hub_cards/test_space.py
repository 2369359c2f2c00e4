"""The Space in a real browser: upload, ask, see the reasoning grow and a mask, switch a concept off, see it change.

Needs gradio and selenium (`pip install -e ".[browser]"`) and Debian's `chromium` and `chromium-driver`, and is skipped
without. `SPACE_SCREENSHOT=docs/figures/space.png python -m pytest tests/hub_cards/test_space.py` keeps a picture.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from tests.support.hub_client import ROOT

pytest.importorskip("gradio", reason='gradio is missing: pip install -e ".[browser]"')
pytest.importorskip("selenium", reason='selenium is missing: pip install -e ".[browser]"')
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium is missing: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

EXAMPLES = ROOT / "examples"
SCENE = json.loads((EXAMPLES / "scene.json").read_text())
PATIENCE = 240


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app in a process of its own, on the embedded checkpoint with this checkout's code."""
    folder = tmp_path_factory.mktemp("space")
    SegCompassModel.from_pretrained(EXAMPLES / "checkpoints" / "mini").save_pretrained(folder / "model")
    SegCompassProcessor.from_pretrained(EXAMPLES / "checkpoints" / "mini").save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "hub_cards" / "space" / "app.py"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment |= {"SEGCOMPASS_MODEL": str(folder / "model"), "GRADIO_SERVER_PORT": str(port)}
    environment.pop("PYTHONPATH", None)
    with open(folder / "log", "w") as log:
        app = subprocess.Popen(list(map(str, command)), env=environment, cwd=folder, stdout=log, stderr=log)
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


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1640"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a visitor sees and does, by the elem_ids of the app."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.all("#ask"))

    def wait(self, condition, patience=PATIENCE):
        return WebDriverWait(self.browser, patience, poll_frequency=0.1).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def value(self, selector):
        return self.all(f"{selector} textarea, {selector} input")[0].get_attribute("value")

    def source(self, selector):
        images = self.all(f"{selector} img")
        return images[0].get_attribute("src") if images else None

    def pixels(self, selector):
        with urllib.request.urlopen(self.source(selector)) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")).astype(int)

    def scale(self, factor):
        """Type into the slider's number field and leave it; returns the masks' pixels afterwards.

        A picture with the same bytes keeps its address, so one that does not change within 10 seconds is the same.
        """
        before = self.source("#overlay")
        field = self.all("#factor input[type=number]")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(factor), Keys.TAB)
        with contextlib.suppress(TimeoutException):
            self.wait(lambda: self.source("#overlay") != before, 10)
        return self.pixels("#overlay")


def test_upload_ask_see_a_mask_switch_a_concept_off_see_it_change(browser, address, tmp_path):
    shutil.copyfile(EXAMPLES / SCENE["image"], tmp_path / "mine.png")
    page = Page(browser, address)
    page.all("#image input[type=file]")[0].send_keys(str(tmp_path / "mine.png"))
    page.wait(lambda: page.source("#image"))
    page.all("#instruction textarea")[0].send_keys(SCENE["instruction"])
    page.all("#ask")[0].click()

    grown = set()
    page.wait(lambda: grown.add(len(page.value("#reasoning"))) or page.value("#verdict"))
    assert len(grown) > 3, f"the reasoning came in {len(grown)} pieces"
    reasoning = page.value("#reasoning")
    assert reasoning.startswith("<think>") and "instance" in page.value("#verdict")
    asked = np.asarray(Image.open(tmp_path / "mine.png").convert("RGB")).astype(int)
    segmented = page.pixels("#overlay")
    assert segmented.shape == asked.shape and (segmented != asked).any(-1).sum() > 20
    assert len(page.all("#slots img")) >= 2  # a heatmap and a mask at least

    concepts = page.all("#concepts input[type=radio]")
    assert len(concepts) >= 3
    changed = 0
    for concept in concepts:
        concept.click()
        page.wait(lambda: page.source("#fired") and float(page.value("#factor")) == 1)
        off = page.scale(0)
        changed = (off != segmented).any(-1).sum()
        if changed:
            break
    assert changed, "no concept of the list carries the mask"
    assert page.value("#reasoning") == reasoning  # nothing was generated again
    if "SPACE_SCREENSHOT" in os.environ:
        keep_screenshot(browser, os.environ["SPACE_SCREENSHOT"])

    before = page.source("#overlay")
    page.all("#restore")[0].click()
    page.wait(lambda: page.source("#overlay") != before)
    assert np.array_equal(page.pixels("#overlay"), segmented)


def keep_screenshot(browser, path):
    """The whole page in 128 colours, which keeps it below 300 kB."""
    time.sleep(2)  # pictures fade in
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(128).save(path, optimize=True)


def test_an_empty_question_is_refused_in_words(browser, address):
    page = Page(browser, address)
    page.all("#ask")[0].click()
    page.wait(lambda: "No image yet" in browser.find_element(By.TAG_NAME, "body").text)
