"""Damage to a saved folder is an error or a warning that names the file at load, and all of it is found by verify.

The fast subset is 20 of the 100 kinds of damage; all of them: SEGCOMPASS_ALL_DAMAGE=1 python -m pytest -q FILE.
"""

import logging
import os
import random
import shutil
from pathlib import Path

import pytest

from segcompass.commands import verify
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.manifest import MANIFEST, sign

MINI = Path(__file__).parents[2] / "examples" / "checkpoints" / "mini"
WEIGHTS = "model.safetensors"
ALL = bool(os.environ.get("SEGCOMPASS_ALL_DAMAGE"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the embedded model, signed."""
    copy = tmp_path_factory.mktemp("damage") / "mini"
    shutil.copytree(MINI, copy)
    sign(copy)
    return copy


def damages():
    """(id, file, function of its bytes and of those of the file it may be swapped with), 100 of them, drawn once."""
    numbers = random.Random(0)
    files = [path.name for path in sorted(MINI.iterdir()) if path.name != "README.md"]
    header = int.from_bytes((MINI / WEIGHTS).read_bytes()[:8], "little")

    def flip(whole, other, place, bit):
        place %= len(whole)
        return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]

    for number in range(100):
        # Every second one hits the weights, whose header and tensors are hit alike.
        name = WEIGHTS if number % 2 else files[number // 2 % len(files)]
        kind = ("flip", "flip", "flip", "cut", "swap")[number // 2 % 5]
        place, bit = numbers.randrange(1 << 40), numbers.randrange(8)
        if name == WEIGHTS and number % 4 == 1:
            place %= 8 + header
        if kind == "flip":
            yield f"{number}-{kind}-{name}", name, lambda whole, other, p=place, b=bit: flip(whole, other, p, b)
        elif kind == "cut":
            yield f"{number}-{kind}-{name}", name, lambda whole, other, p=place: whole[: p % len(whole)]
        else:
            yield f"{number}-{kind}-{name}", name, lambda whole, other: other


DAMAGES = list(damages())


@pytest.mark.parametrize(("name", "damage"), [pytest.param(*d[1:], id=d[0]) for d in DAMAGES[:: 1 if ALL else 5]])
def test_damage_is_named_at_load_and_found_by_verify(folder, name, damage, caplog, capsys):
    path = folder / name
    whole = path.read_bytes()
    swapped_with = folder / ("config.json" if name != "config.json" else "tokenizer.json")
    damaged = damage(whole, swapped_with.read_bytes())
    assert damaged != whole
    caplog.clear()
    try:
        path.write_bytes(damaged)
        said = []
        with caplog.at_level(logging.WARNING):
            for load in (SegCompassModel.from_pretrained, SegCompassProcessor.from_pretrained):
                try:
                    load(folder)
                except (ValueError, OSError) as error:
                    said.append(str(error))
                except Exception as error:  # whatever transformers raises; a warning of ours came before
                    said.append(type(error).__name__)
        assert any(name in text for text in (*said, caplog.text)), said
        if name in (WEIGHTS, MANIFEST):  # not a number of it was used
            assert any(name in text for text in said)
        with pytest.raises((SystemExit, ValueError)) as found:
            verify.main([str(folder)])
        assert name in capsys.readouterr().out + str(found.value)
    finally:
        path.write_bytes(whole)


def test_two_weights_files_that_changed_places_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    SegCompassModel.from_pretrained(folder).save_pretrained(tmp_path / "other")  # in float32, not float16
    whole = (folder / WEIGHTS).read_bytes()
    try:
        shutil.copyfile(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
        with pytest.raises(ValueError, match=WEIGHTS):
            SegCompassModel.from_pretrained(folder)
    finally:
        (folder / WEIGHTS).write_bytes(whole)


def test_a_model_without_configuration_is_refused_at_once(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "config.json").unlink()
    monkeypatch.setattr(SegCompassModel, "__init__", None)  # nothing is built
    with pytest.raises(OSError, match=r"cut holds no config\.json"):
        SegCompassModel.from_pretrained(tmp_path / "cut")


def test_one_number_that_is_not_finite_is_an_error_without_a_manifest_too(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(MINI, tmp_path / "mini")
    (tmp_path / "mini" / MANIFEST).unlink()
    weights = load_file(tmp_path / "mini" / WEIGHTS)
    weights["grounded_reading.concept_bias"][0] = float("nan")
    save_file(weights, tmp_path / "mini" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinity in 1 tensors .grounded_reading.concept_bias"):
        SegCompassModel.from_pretrained(tmp_path / "mini")


def test_verify_signs_anew_after_an_edit(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "mini")
    (tmp_path / "mini" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        verify.main([str(tmp_path / "mini")])
    assert "notes.txt: not in the manifest" in capsys.readouterr().out
    verify.main(["--sign", str(tmp_path / "mini")])
    verify.main([str(tmp_path / "mini")])
    assert "as it was signed" in capsys.readouterr().out


@pytest.fixture
def cache(folder, tmp_path):
    """The Hub's cache with the model as someone/mini, but for what loading does not fetch; and its snapshot."""
    repository = tmp_path / "models--someone--mini"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("*.py", "chat_template.jinja", "README.md"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return tmp_path, snapshot


def test_a_snapshot_of_the_hub_is_checked_and_misses_nothing(cache, caplog):
    where, snapshot = cache
    with caplog.at_level(logging.WARNING, "segcompass"):
        SegCompassModel.from_pretrained("someone/mini", cache_dir=where)
        SegCompassProcessor.from_pretrained("someone/mini", cache_dir=where)
    assert "was changed" not in caplog.text
    weights = bytearray((snapshot / WEIGHTS).read_bytes())
    weights[-100] ^= 1
    (snapshot / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=f"{WEIGHTS} .its content changed"):
        SegCompassModel.from_pretrained("someone/mini", cache_dir=where)
    path = snapshot / "processor_config.json"
    path.write_text(path.read_text().replace("{", "{ ", 1))
    with caplog.at_level(logging.WARNING, "segcompass"):
        SegCompassProcessor.from_pretrained("someone/mini", cache_dir=where)
    assert "processor_config.json" in caplog.text
