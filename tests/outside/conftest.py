"""Which tests of the outside suites run: all with SEGCOMPASS_OUTSIDE=all, otherwise those that are quick."""

from pathlib import Path

import pytest

from tests.outside.exclusions import SKIPPED, SLOW, excluded, matches
from tests.outside.transformers_suite import ALL

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    slow = []
    for item in items:
        if item.path.parent != HERE:
            continue
        why = excluded(item.path.stem.removeprefix("test_"), item.originalname)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        elif not ALL and matches(item.originalname, SLOW):
            slow.append(item)
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and item.get_closest_marker("skip") is None:
        said = report.longrepr[2].removeprefix("Skipped: ")
        if not matches(said, SKIPPED):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that exclusions.SKIPPED does not list: {said}"
    return report
