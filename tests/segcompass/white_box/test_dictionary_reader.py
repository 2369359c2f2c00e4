"""The dictionary of a data set is the same when its reading was interrupted."""

import pytest
import torch

from segcompass.loaders.scenes import load_scenes
from segcompass.loading import load
from segcompass.white_box import dictionary_reader
from segcompass.white_box.dictionary_reader import TokenReader, build_dictionary


@pytest.fixture
def reader(saved):
    return TokenReader(*load(saved[0]))


def test_interrupted_reading_resumes_where_it_was(reader, tmp_path, monkeypatch):
    rows = load_scenes(split="train", seed=1, num_samples=6)
    monkeypatch.setattr(dictionary_reader, "SAVE_EVERY", 1)
    whole = build_dictionary(reader, rows, "scenes", tmp_path / "whole.pt", batch_size=2)
    read, batches = reader.read, []

    def killed(batch):
        batches.append(len(batch))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return read(batch)

    monkeypatch.setattr(reader, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        build_dictionary(reader, rows, "scenes", tmp_path / "partial.pt", batch_size=2)
    resumed = build_dictionary(reader, rows, "scenes", tmp_path / "partial.pt", batch_size=2)
    assert batches == [2] * 4, "two batches before the kill, the killed one, and that one again"
    assert resumed.entries == whole.entries and resumed.tokens == whole.tokens > 0
    contexts = [context for entry in whole.entries for context in entry.contexts]
    assert {context.part for context in contexts} == {"image", "instruction", "response"}


def test_reading_of_another_version_is_named(reader, tmp_path):
    torch.save({"builder": {}, "done": 3}, tmp_path / "partial.pt")
    with pytest.raises(ValueError, match="partial.pt was written by another version .*delete it"):
        build_dictionary(reader, load_scenes(split="train", seed=1, num_samples=2), "", tmp_path / "partial.pt")
