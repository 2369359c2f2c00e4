"""A run's journal belongs to that run, and a damaged line is named."""

import os

import pytest

from segcompass.journal import Journal, weights_of
from segcompass.modeling_segcompass.manifest import sign


def test_damaged_line_is_named(tmp_path):
    Journal(tmp_path, {"a": 1}).add([{"sample_id": "x"}])
    (tmp_path / "items.jsonl").write_text('{"sample_id": "x"}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Journal(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="a=1, this run has 2"):
        Journal(tmp_path, {"a": 2})


def model_folder(folder):
    """A model's folder as far as a run looks at it."""
    folder.mkdir()
    contents = {"model.safetensors": "weights", "config.json": "{}", "processor_config.json": "{}", "README.md": "card"}
    for name, content in contents.items():
        (folder / name).write_text(content)
    sign(folder)
    return folder


def test_a_model_is_known_by_what_is_in_its_files(tmp_path):
    folder = model_folder(tmp_path / "model")
    known = weights_of(str(folder))
    assert known == weights_of(str(model_folder(tmp_path / "copy"))), "neither name nor time of a copy counts"
    for name in ("model.safetensors", "README.md"):
        os.utime(folder / name, (1, 1))
    for name in ("README.md", "concepts.json", "notes.md"):
        (folder / name).write_text("changed")
    assert weights_of(str(folder)) == known, "what changes no result may change"
    for name in ("model.safetensors", "config.json", "processor_config.json"):
        content, stat = (folder / name).read_text(), (folder / name).stat()
        (folder / name).write_text(content[::-1] if len(content) > 2 else "[]")  # of the same length
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert weights_of(str(folder)) != known, f"{name} was replaced, with its time"
        (folder / name).write_text(content)
    assert weights_of(str(folder)) == known


def test_of_a_large_file_the_manifests_hash_is_taken(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model")
    known = weights_of(str(folder))
    monkeypatch.setattr("segcompass.journal.HASH_BELOW", 1)
    monkeypatch.setattr("segcompass.journal.sha256", lambda path: pytest.fail(f"{path} was read"))
    assert weights_of(str(folder)) == known


def test_a_model_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    cache = tmp_path / "models--org--model"
    (cache / "refs").mkdir(parents=True)
    for commit in ("1" * 40, "2" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in ("1" * 40, "2" * 40):
        (cache / "refs" / "main").write_text(commit)
        assert weights_of("org/model") == commit
    assert weights_of("org/another") is None
