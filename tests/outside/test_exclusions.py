"""The lists of what is not run are those of the docs, name tests that exist, and give no failure as a reason."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.outside import transformers_suite
from tests.outside.exclusions import EXCLUDED, LANGUAGE_ALONE, SKIPPED, SLOW, matches, tables
from tests.outside.generation import GenerationChecks
from tests.outside.transformers_suite import suite_module

PAGE = Path(__file__).parents[2] / "docs" / "outside_suites.md"


def test_the_page_shows_the_tables():
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert shown == [line for line in tables().splitlines() if line]


def test_no_reason_is_that_a_test_fails():
    for why in (*EXCLUDED.values(), *LANGUAGE_ALONE.values(), *SKIPPED.values()):
        assert "fail" not in why.lower()


def test_every_name_in_the_lists_is_that_of_a_test():
    suites = {
        "models": suite_module("test_modeling_common").ModelTesterMixin,
        "processors": suite_module("test_processing_common").ProcessorTesterMixin,
    }
    named = {suite: [name for name in dir(mixin) if name.startswith("test_")] for suite, mixin in suites.items()}
    for suite, pattern in EXCLUDED:
        assert any(matches(name, [pattern]) for name in named[suite]), pattern
    for pattern in (*LANGUAGE_ALONE, *SLOW):
        assert any(matches(name, [pattern]) for name in named["models"]), pattern
    assert suite_module("test_modeling_common").GenerationTesterMixin is GenerationChecks


def test_a_distribution_that_cannot_be_had_is_a_reason_to_skip_or_where_all_is_asked_for_an_error(
    monkeypatch, tmp_path
):
    pytest.importorskip("parameterized")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = SimpleNamespace(returncode=1, stderr="looked it up\nno network\n")
    monkeypatch.setattr(transformers_suite.subprocess, "run", lambda *args, **kwargs: failed)
    transformers_suite._open.cache_clear()
    try:
        for asked, kind in ((False, pytest.skip.Exception), (True, RuntimeError)):
            monkeypatch.setattr(transformers_suite, "ALL", asked)
            with pytest.raises(kind, match=r"the source distribution of transformers==.* cannot be had \(no network\)"):
                suite_module("test_modeling_common")
    finally:
        transformers_suite._open.cache_clear()
    assert not list((tmp_path / "segcompass-tests").iterdir())
