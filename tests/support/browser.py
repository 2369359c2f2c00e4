"""A headless Chromium, for tests of pages. What is missing is skipped by name."""

import base64
import io
import shutil

import numpy as np
import pytest
from PIL import Image

DESKTOP, PHONE = (1280, 900), (390, 844)
"""Width and height of the two windows that pages are tried in."""


def chromium():
    """A driver of a headless Chromium; the caller quits it."""
    webdriver = pytest.importorskip("selenium.webdriver", reason='selenium is missing: pip install -e ".[browser]"')
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver") or shutil.which(
        "chromedriver", path="/usr/lib/chromium:/usr/lib/chromium-browser"
    )
    if not (browser and driver):
        pytest.skip("chromium is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def size_window(browser, size):
    """Make the page as wide and high as a window or a phone."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def overflow(browser):
    """Pixels by which the page is wider than its window."""
    return browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def contrast(browser, selector, behind):
    """How far the text of one element stands out from the ground of another: 1 (not at all) to 21.

    As the accessibility guidelines define it; 4.5 is needed.
    """
    colours = browser.execute_script(
        "const of = selector => getComputedStyle(document.querySelector(selector));"
        "const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
        "probe.fillStyle = '#fff'; probe.fillRect(0, 0, 1, 1);"
        "return [of(arguments[1]).backgroundColor, of(arguments[0]).color].map(colour => {"
        "probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);"
        "return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3)})",
        selector,
        behind,
    )
    linear = [
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255] for rgb in colours
    ]
    low, high = sorted(float(np.dot(rgb, [0.2126, 0.7152, 0.0722])) for rgb in linear)
    return (high + 0.05) / (low + 0.05)


def picture(browser, selector=None, width=1000):
    """What a part of the page looks like, or all of it: PIL image, RGB, at most `width` pixels wide."""
    box = browser.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.left + scrollX, b.top + scrollY, b.width, b.height]",
        selector or "html",
    )
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    made = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    made.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    return made
