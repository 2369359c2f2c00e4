"""A run's journal belongs to that run, and a damaged line is named."""

import pytest

from segcompass.journal import Journal


def test_damaged_line_is_named(tmp_path):
    Journal(tmp_path, {"a": 1}).add([{"sample_id": "x"}])
    (tmp_path / "items.jsonl").write_text('{"sample_id": "x"}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Journal(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="a=1, this run has 2"):
        Journal(tmp_path, {"a": 2})
