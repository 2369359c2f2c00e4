"""A manifest notices whatever happens to a file after it was signed."""

import json
import logging
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from segcompass.modeling_segcompass import manifest


@pytest.fixture
def folder(tmp_path):
    save_file({"w": torch.arange(256.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": 1}\n')
    (tmp_path / "README.md").write_text("# card\n")
    (tmp_path / "sae").mkdir()
    save_file({"w": torch.arange(25.0)}, tmp_path / "sae" / "W.safetensors")
    manifest.sign(tmp_path)
    return tmp_path


def test_an_untouched_folder_has_no_findings_and_its_readme_may_change(folder, caplog):
    (folder / "README.md").write_text("# another card\n")
    assert manifest.findings(folder) == [] and manifest.unlisted(folder) == []
    with caplog.at_level(logging.WARNING):
        manifest.check(folder)
    assert not caplog.records


@pytest.mark.parametrize("name", ["model.safetensors", "sae/W.safetensors"])
@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_a_cut_and_a_missing_weights_file_are_errors_that_name_it(folder, name, seed):
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[random.Random(seed).randrange(len(whole))] ^= 1 << seed
    for broken in (bytes(flipped), whole[:-1], None):
        (folder / name).unlink(missing_ok=True)
        if broken is not None:
            (folder / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name}.*verify"):
            manifest.check(folder)


def test_an_edited_json_is_a_warning_with_the_command_that_signs_anew(folder, caplog):
    (folder / "config.json").write_text('{"a": 2}\n')
    with caplog.at_level(logging.WARNING):
        manifest.check(folder)
    assert "config.json" in caplog.text and f"segcompass verify {folder} --sign" in caplog.text
    manifest.sign(folder)
    assert manifest.findings(folder) == []


def test_large_weights_are_compared_by_size_alone_at_load_and_whole_by_verify(folder, monkeypatch):
    monkeypatch.setattr(manifest, "HASH_BELOW", 1000)
    save_file({"w": torch.zeros(256)}, folder / "model.safetensors")
    manifest.check(folder)
    assert [name for name, _ in manifest.findings(folder)] == ["model.safetensors"]
    save_file({"w": torch.zeros(255)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        manifest.check(folder)


def test_a_file_that_is_not_read_is_not_looked_at_and_one_that_was_not_fetched_is_not_missed(folder):
    (folder / "model.safetensors").unlink()
    manifest.check(folder, manifest.READ_BY_PROCESSORS)
    manifest.check(folder, missing=False)
    with pytest.raises(ValueError, match=r"model.safetensors \(missing\)"):
        manifest.check(folder)


def test_saving_beside_reads_only_what_it_wrote(folder, monkeypatch):
    for name in manifest.listed(folder):
        os.utime(folder / name, ns=(0, 0))
    read = []
    with manifest.signing(folder):
        (folder / "processor_config.json").write_text("{}\n")
        monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path.name) or "0")
    assert read == ["processor_config.json"]


def test_an_edit_is_not_signed_by_saving_something_beside_it(folder):
    (folder / "config.json").write_text('{"a": 2}\n')
    save_file({"w": torch.ones(256)}, folder / "model.safetensors")
    for name in ("config.json", "model.safetensors"):
        os.utime(folder / name, ns=(0, 0))  # long ago, or they would pass for written by this save
    with manifest.signing(folder):
        (folder / "processor_config.json").write_text("{}\n")
    changed = "its content changed"
    assert manifest.findings(folder) == [("config.json", changed), ("model.safetensors", changed)]


def test_the_outermost_save_signs_and_a_failed_one_leaves_the_manifest(folder):
    before = (folder / manifest.MANIFEST).read_text()
    with manifest.signing(folder), manifest.signing(folder):
        (folder / "a.json").write_text("{}")
    assert "a.json" in manifest.listed(folder)
    with pytest.raises(OSError), manifest.signing(folder):
        (folder / "b.json").write_text("{}")
        raise OSError("the disk is full")
    assert "b.json" not in manifest.listed(folder) and (folder / manifest.MANIFEST).read_text() != before


def test_checkpoints_below_a_saved_model_are_signed_on_their_own(folder):
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    manifest.sign(folder / "checkpoint-3")
    manifest.sign(folder)
    assert manifest.listed(folder) == ["config.json", "model.safetensors", "sae/W.safetensors"]
    assert manifest.listed(folder / "checkpoint-3") == ["optimizer.pt"]


def test_every_bit_of_the_manifest_itself_counts(folder):
    path = folder / manifest.MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"manifest.json|format version"):
            manifest.check(folder)
        with pytest.raises(ValueError, match=r"manifest.json|format version"):
            manifest.findings(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_an_error_that_names_it(folder, text):
    (folder / manifest.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        manifest.check(folder)


def test_a_later_version_and_files_outside_are_refused(folder):
    noted = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / manifest.MANIFEST).write_text(json.dumps({**noted, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99.*upgrade"):
        manifest.check(folder)
    (folder / manifest.MANIFEST).write_text(manifest._text({"../x": {"size": 1, "sha256": ""}}))
    with pytest.raises(ValueError, match="outside its folder"):
        manifest.check(folder)


def test_a_folder_without_manifest_is_left_to_its_readers_but_not_verified(tmp_path):
    manifest.check(tmp_path)
    with pytest.raises(ValueError, match="has no manifest.json"):
        manifest.findings(tmp_path)


def test_a_copy_of_a_folder_is_as_signed(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(folder, copy)
    assert manifest.findings(copy) == [] and manifest.unlisted(copy) == []
