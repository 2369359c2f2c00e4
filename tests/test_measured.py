"""The tables of measurements in docs/: what stands there is what dev/measured.yaml records."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured():
    spec = importlib.util.spec_from_file_location("measured", ROOT / "dev" / "measured.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def alone(measured, tmp_path, monkeypatch):
    """A project of one page and one entry."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n<!-- measured: one -->\n<!-- end -->\n\nAfter.\n")
    (tmp_path / "docs" / "measured.md").write_text("<!-- measured: list -->\n<!-- end -->\n")
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    monkeypatch.setattr(measured, "RECORDS", tmp_path / "measured.yaml")

    def begin(printed, status=0):
        (tmp_path / "printing").write_text(f"print({printed!r}); raise SystemExit({status})")
        entry = {"what": "a count", "page": "page.md#page", "command": f"{sys.executable} printing", "day": "before"}
        measured.write({"one": {**entry, "table": "| a |\n|---|\n| 1 |\n"}})
        return lambda: (measured.RECORDS.read_text(), (tmp_path / "docs" / "page.md").read_text())

    return begin


def test_the_pages_tables_are_what_is_recorded(measured):
    records = measured.read()
    for path, text in measured.pages(records).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python dev/measured.py`"
    marked = {
        name
        for path in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"<!-- measured: (.+?) -->", path.read_text(encoding="utf-8"))
    }
    assert marked == {"list", *(name for name, entry in records.items() if "table" in entry)}


def test_each_command_stands_in_its_page(measured):
    for name, entry in measured.read().items():
        page = (ROOT / "docs" / entry["page"].partition("#")[0]).read_text(encoding="utf-8")
        said = " ".join(page.replace("\\\n", " ").split())
        assert entry["command"] in said, f"{name}: {entry['page']} does not have `{entry['command']}`"


def test_a_command_is_run_and_its_table_kept(measured, alone):
    now = alone("Before.\n\n| a | b |\n|---|---|\n| 2 | x |\n\n| c |\n|---|\n| 3 |\nRESULT {}")
    measured.main(["one"])
    record, page = now()
    assert "| 2 | x |" in record and "| 3 |" not in record and f"day: {measured.date.today()}" in record
    assert re.search(r"-->\n\d{4}-\d\d-\d\d, transformers [\d.]+, torch [\d.]+:\n\n\| a \| b \|\n", page)
    assert page.startswith("# Page\n\n<!-- measured") and page.endswith("<!-- end -->\n\nAfter.\n")


@pytest.mark.parametrize(
    ("printed", "status", "said"),
    [
        ("| a |\n|---|\n| 2 |", 1, "ended with status 1"),
        ("no table", 0, "no Markdown table"),
        ("| a |\n|---|", 0, "table"),
    ],
)
def test_a_command_that_fails_or_prints_no_table_changes_nothing(measured, alone, printed, status, said):
    now = alone(printed, status)
    before = now()
    with pytest.raises(SystemExit, match=said):
        measured.main(["one"])
    assert now() == before


def test_an_unknown_name_and_a_page_without_its_mark_are_refused(measured, alone, capsys):
    alone("")
    with pytest.raises(SystemExit):
        measured.main(["two"])
    assert "no entry two in measured.yaml; it has one." in capsys.readouterr().err
    with pytest.raises(ValueError, match="page.md must have one '<!-- measured: one -->'"):
        measured.filled("# Page", "one", "", "page.md")
