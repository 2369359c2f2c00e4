"""Saved folders of every format version load, and answer as they did when they were written.

tests/support/saved_folder.py writes the folder of a new version, and says when.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.manifest import FORMAT_VERSION, MANIFEST
from tests.support.saved_folder import answers

SAVED = Path(__file__).with_name("saved")
FOLDERS = sorted(folder for folder in SAVED.iterdir() if folder.is_dir())


def size(folder):
    return sum(path.stat().st_size for path in [*folder.iterdir(), folder.with_suffix(".safetensors")])


def test_there_is_a_folder_of_every_format_version():
    versions = [json.loads((folder / MANIFEST).read_text())["format_version"] for folder in FOLDERS]
    assert versions == list(range(1, FORMAT_VERSION + 1)), "python -m tests.support.saved_folder writes the next"
    assert [folder.name for folder in FOLDERS] == [f"format-{version}" for version in versions]
    assert all(size(folder) <= 300_000 for folder in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_answers_as_when_it_was_written(folder, caplog):
    model = SegCompassModel.from_pretrained(folder)
    made = answers(model, SegCompassProcessor.from_pretrained(folder))
    expected = load_file(folder.with_suffix(".safetensors"))
    assert "manifest" not in caplog.text and "differ" not in caplog.text, "its signature holds"
    for name in ("input_ids", "concept_indices"):
        assert torch.equal(made[name], expected[name]), name
    # float32 of another machine: sums in another order; and since format 1 was written, patches of images whose sides
    # are no whole multiples lie where their pixels are, a part of a pixel from where they were taken to be (2e-4 here)
    for name in ("pred_masks", "pred_logits"):
        torch.testing.assert_close(made[name], expected[name], atol=5e-4, rtol=5e-4)
