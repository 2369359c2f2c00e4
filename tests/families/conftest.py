"""Which families are tried, and the table of all of them."""

import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from tests.support.families import TINY_FAMILIES
from tests.support.family_table import tried

FAST = ("llava", "qwen2_5_vl", "internvl", "paligemma")
"""Tried in every test run: a plain grid, the image's own aspect, tiles, prefix attention."""


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-families")
        metafunc.parametrize("family", TINY_FAMILIES if every else FAST, scope="module")


def coarse_noise(height, width, seed=0):
    """Patches differ, and something of them is left when the image is made smaller."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


RESULTS: dict[str, dict[str, str]] = defaultdict(dict)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    family = getattr(item, "callspec", None) and item.callspec.params.get("family")
    check = getattr(item.function, "column", None)
    counts = family and check and (report.when == "call" or report.outcome != "passed")
    if counts and RESULTS[family].get(check, "passed") == "passed":  # a column may be several tests
        RESULTS[family][check] = report.outcome


def pytest_terminal_summary(terminalreporter, config):
    """With --all-families: the first table of docs/families.md, and one line for machines."""
    if not config.getoption("--all-families") or not RESULTS:
        return
    table, whole = tried(RESULTS)
    terminalreporter.write_line(f"\n{table}")
    failed = {
        family: sorted(name for name, outcome in found.items() if outcome != "passed")
        for family, found in RESULTS.items()
        if family not in whole
    }
    result = {"families": len(RESULTS), "pass": len(whole), "failed": failed}
    terminalreporter.write_line("RESULT " + json.dumps(result))
