"""A manifest notices whatever happens to a file after it was signed."""

import json
import logging
import os
import random

import pytest

from segcompass.modeling_segcompass import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "config.json").write_text('{"a": 1}\n')
    (tmp_path / "README.md").write_text("# card\n")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "W.safetensors").write_bytes(b"x" * 100)
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
    (folder / "model.safetensors").write_bytes(bytes(1024))
    manifest.check(folder)
    assert [name for name, _ in manifest.findings(folder)] == ["model.safetensors"]
    (folder / "model.safetensors").write_bytes(bytes(1023))
    with pytest.raises(ValueError, match="model.safetensors"):
        manifest.check(folder)


def test_signing_again_reads_only_what_changed(folder, monkeypatch):
    for name in ("model.safetensors", "sae/W.safetensors", "config.json"):
        os.utime(folder / name, ns=(0, 0))
    read = []
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path.name) or "0")
    (folder / "processor_config.json").write_text("{}\n")
    manifest.sign(folder)
    assert read == ["processor_config.json"]


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
    (folder / manifest.MANIFEST).write_text(json.dumps({**noted, "files": {"../x": {"size": 1, "sha256": ""}}}))
    with pytest.raises(ValueError, match="outside its folder"):
        manifest.check(folder)


def test_a_folder_without_manifest_is_left_to_its_readers_but_not_verified(tmp_path):
    manifest.check(tmp_path)
    with pytest.raises(ValueError, match="has no manifest.json"):
        manifest.findings(tmp_path)
