"""Names of earlier versions still load through one table: fields, keywords, weights. Both names at once are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, SamVisionConfig

from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.old_names import (
    EARLIER_DEFAULTS,
    OLD_FIELDS,
    OLD_PARTS,
    OLD_SCALARS,
    with_new_names,
)
from tests.support.tiny import tiny_segcompass

MINI = Path(__file__).parents[2] / "examples" / "checkpoints" / "mini"
TINY_SAM = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "patch_size": 4, "output_channels": 16}


def test_from_backbones_takes_the_image_encoder_under_its_old_name():
    model, processor = tiny_segcompass("llava")
    fields = dict(processor=processor, d_c=16, decoder_heads=4, codebook_heads=4)
    built = SegCompassModel.from_backbones(model.mllm, sam=model.image_encoder, **fields)
    assert built.image_encoder is model.image_encoder
    with pytest.raises(ValueError, match="both sam= and image_encoder= .*keep image_encoder= only"):
        SegCompassModel.from_backbones(model.mllm, model.image_encoder, sam=model.image_encoder, **fields)
    with pytest.raises(ValueError, match="no image encoder was given; pass image_encoder="):
        SegCompassModel.from_backbones(model.mllm, **fields)


def test_configuration_takes_the_image_encoder_under_its_old_name():
    old, new = SegCompassConfig(sam_config=TINY_SAM), SegCompassConfig(image_encoder_config=TINY_SAM)
    assert isinstance(old.image_encoder_config, SamVisionConfig)
    assert old.to_diff_dict() == new.to_diff_dict() and not hasattr(old, "sam_config")
    with pytest.raises(ValueError, match="both 'sam_config' and 'image_encoder_config'"):
        SegCompassConfig(sam_config=TINY_SAM, image_encoder_config=TINY_SAM)


def test_references_of_earlier_versions_name_todays_parts():
    where = {"repo_id": "a/b", "revision": "main"}
    assert SegCompassConfig(references={"sam": where}).references == {"image_encoder": where}
    assert SegCompassConfig.from_dict({"references": {"sam": where}}).references == {"image_encoder": where}


def test_a_configuration_without_a_read_out_has_the_one_that_was_the_default(tmp_path):
    assert (SegCompassConfig().concept_reading, SegCompassConfig().grounded_rank) == ("grounded", 64)
    for config in (SegCompassConfig(), SegCompassConfig(concept_reading="feature", grounded_rank=0)):
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        loaded = SegCompassConfig.from_pretrained(tmp_path)
        assert {name: written[name] for name in EARLIER_DEFAULTS} == {
            name: getattr(loaded, name) for name in EARLIER_DEFAULTS
        }
        assert loaded.concept_reading == config.concept_reading
    earlier = {name: value for name, value in written.items() if name not in EARLIER_DEFAULTS}
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    readers = (SegCompassConfig.from_pretrained, AutoConfig.from_pretrained, SegCompassConfig.from_json_file)
    for read, path in zip(readers, (tmp_path, tmp_path, tmp_path / "config.json"), strict=True):
        loaded = read(path)
        assert (loaded.concept_reading, loaded.grounded_rank) == ("feature", 0)
    assert SegCompassConfig.from_pretrained(tmp_path, concept_reading="token").concept_reading == "token"


def test_every_old_name_has_a_new_one_that_is_not_old():
    names = OLD_FIELDS | OLD_PARTS
    assert not set(names.values()) & set(names)
    assert with_new_names({"kept": 1, **dict.fromkeys(OLD_FIELDS, 2)}) == {
        "kept": 1,
        **dict.fromkeys(OLD_FIELDS.values(), 2),
    }


def test_folder_of_an_earlier_version_gives_the_same_model(tmp_path):
    model, processor = tiny_segcompass("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json"):
        fields = json.loads((tmp_path / name).read_text())
        old = {new: old for old, new in OLD_FIELDS.items()}
        (tmp_path / name).write_text(json.dumps({old.get(key, key): value for key, value in fields.items()}))
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        key.replace("image_encoder.", "sam.").replace("sae.mean_active_activation", "sae.usual_strength"): value
        for key, value in weights.items()
    }
    assert {key.split(".")[0] for key in old} >= {"sam"} and "sae.usual_strength" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "manifest.json").unlink()  # which earlier versions did not write
    loaded, expected = SegCompassModel.from_pretrained(tmp_path).state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert SegCompassProcessor.from_pretrained(tmp_path).frame == processor.frame


def test_the_embedded_folder_loads(capfd):
    assert SegCompassModel.from_pretrained(MINI).config.frame.side == 128
    processor = SegCompassProcessor.from_pretrained(MINI)
    assert type(processor.encoder_image_processor).__name__ == "SamImageProcessorPil"
    assert "torchvision" not in capfd.readouterr().err


def test_numbers_saved_as_scalars_are_read_as_vectors_of_one_in_silence(tmp_path, caplog):
    """FSDP shards no scalars; the grounded read-out's were scalars in earlier versions, the small model's still are."""
    model, _ = tiny_segcompass("llava", concept_reading="grounded")
    with torch.no_grad():
        for place, name in enumerate(OLD_SCALARS):
            model.grounded_reading.get_parameter(name).fill_(place + 0.25)
    assert all(weight.ndim for weight in model.parameters())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = [f"grounded_reading.{name}" for name in OLD_SCALARS]
    assert all(weights[name].shape == (1,) for name in names)
    earlier = {**weights, **{name: weights[name].reshape(()) for name in names}}
    save_file(earlier, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "manifest.json").unlink()
    with caplog.at_level("WARNING"):
        loaded, info = SegCompassModel.from_pretrained(tmp_path, output_loading_info=True)
        given = SegCompassModel.from_pretrained(None, config=model.config, state_dict=earlier)
    assert not any(info.values()) and "MISMATCH" not in caplog.text
    for name in OLD_SCALARS:
        for read in (loaded, given):
            assert torch.equal(read.grounded_reading.get_parameter(name), model.grounded_reading.get_parameter(name))
    shipped = SegCompassModel.from_pretrained(MINI).state_dict()
    saved = {name: weight for path in MINI.glob("*.safetensors") for name, weight in load_file(path).items()}
    assert all(torch.equal(shipped[name].flatten(), saved[name].flatten()) for name in names)
