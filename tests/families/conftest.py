"""Which families are tried, and the table of all of them."""

import json
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.support.families import TINY_FAMILIES

FAST = ("llava", "qwen2_5_vl", "internvl", "paligemma")
"""Tried in every test run: a plain grid, the image's own aspect, tiles, prefix attention."""
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARKS = ("<!-- made by: pytest tests/families --all-families -->", "<!-- end -->")


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-families")
        metafunc.parametrize("family", TINY_FAMILIES if every else FAST, scope="module")


@pytest.fixture
def image():
    """Coarse noise of 120 x 40 (H x W): patches differ, and something of them is left when it is made smaller."""
    return coarse_noise(120, 40)


def coarse_noise(height, width, seed=0):
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


RESULTS: dict[str, dict[str, str]] = defaultdict(dict)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    family = getattr(item, "callspec", None) and item.callspec.params.get("family")
    check = getattr(item.function, "column", None)
    if family and check and (report.when == "call" or report.outcome != "passed"):
        RESULTS[family][check] = report.outcome


def pytest_terminal_summary(terminalreporter, config):
    """With --all-families: the table of docs/families.md, and one line for machines."""
    if not config.getoption("--all-families") or not RESULTS:
        return
    columns = list(dict.fromkeys(check for found in RESULTS.values() for check in found))
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    signs = {"passed": "✓", "skipped": "–"}
    for family, found in RESULTS.items():
        lines.append(f"| `{family}` | {' | '.join(signs.get(found.get(name, ''), '✗') for name in columns)} |")
    whole = [family for family, found in RESULTS.items() if {found.get(name) for name in columns} == {"passed"}]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    made = f"{date.today()}, {versions}: {len(whole)} of {len(RESULTS)} families pass all {len(columns)}."
    if PAGE.exists() and set(RESULTS) == set(TINY_FAMILIES):
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        body = "\n".join([MARKS[0], made, "", *lines, "", MARKS[1]])
        PAGE.write_text(before + body + after, encoding="utf-8")
    terminalreporter.write_line("\n".join(["", made, *lines]))
    failed = {
        family: sorted(name for name in columns if found.get(name) != "passed")
        for family, found in RESULTS.items()
        if family not in whole
    }
    terminalreporter.write_line(
        "RESULT " + json.dumps({"families": len(RESULTS), "pass": len(whole), "failed": failed})
    )
