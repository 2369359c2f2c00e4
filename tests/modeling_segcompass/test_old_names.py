"""Names of earlier versions still load through one table: fields, keywords, weights. Both names at once are refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, SamVisionConfig

from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.grounded_reading import GroundedReading
from segcompass.modeling_segcompass.old_names import (
    EARLIER_DEFAULTS,
    OLD_FIELDS,
    OLD_PARTS,
    OLD_SCALARS,
    with_new_names,
)
from segcompass.trainers.policy import lora_config
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


@pytest.fixture(scope="module")
def scalars(tmp_path_factory):
    """A grounded model, and its folder as an earlier version saved it: with scalars, which FSDP refuses."""
    folder = tmp_path_factory.mktemp("scalars")
    model, _ = tiny_segcompass("llava", concept_reading="grounded")
    with torch.no_grad():
        for place, name in enumerate(OLD_SCALARS):
            model.grounded_reading.get_parameter(name).fill_(place + 0.25)
    assert all(weight.ndim for weight in model.parameters())
    model.save_pretrained(folder)
    as_scalars(folder / "model.safetensors")
    return model, folder


def as_scalars(path, shape=()):
    """Give a file's single numbers another shape, and let the manifest go."""
    weights = load_file(path)
    names = [name for name in weights if name.endswith(OLD_SCALARS) and "grounded_reading" in name]
    assert len(names) == len(OLD_SCALARS) and all(weights[name].numel() == 1 for name in names)
    for name in names:
        number = weights[name].flatten()[0]
        weights[name] = number.expand(shape).clone() if shape else number.clone()
    save_file(weights, path, {"format": "pt"})
    (path.parent / "manifest.json").unlink(missing_ok=True)


class Derived(SegCompassModel):
    """A user's own class, which transformers knows by its name."""


@pytest.mark.parametrize("read", [SegCompassModel, Derived, AutoModel])
def test_numbers_saved_as_scalars_are_read_as_vectors_of_one_in_silence(scalars, read, caplog):
    model, folder = scalars
    with caplog.at_level("WARNING"):
        loaded, info = read.from_pretrained(folder, output_loading_info=True)
        given = SegCompassModel.from_pretrained(
            None, config=model.config, state_dict=load_file(folder / "model.safetensors")
        )
    assert not any(info.values()) and "MISMATCH" not in caplog.text
    for name in OLD_SCALARS:
        for found in (loaded, given):
            assert torch.equal(found.grounded_reading.get_parameter(name), model.grounded_reading.get_parameter(name))


def test_the_small_models_scalars_are_read_as_they_are():
    shipped = SegCompassModel.from_pretrained(MINI).state_dict()
    saved = {name: weight for path in MINI.glob("*.safetensors") for name, weight in load_file(path).items()}
    for name in OLD_SCALARS:
        assert torch.equal(shipped[f"grounded_reading.{name}"], saved[f"grounded_reading.{name}"].reshape(1))


def test_code_of_an_earlier_version_reads_its_scalars_beside_todays(scalars, monkeypatch):
    """Two folders with code of their own, in one process: transformers keeps what is said for a class by its name."""
    model, folder = scalars
    SegCompassModel.from_pretrained(folder)
    build = GroundedReading.__init__

    def of_scalars(self, config):
        build(self, config)
        for name in OLD_SCALARS:
            module, _, last = name.rpartition(".")
            setattr(self.get_submodule(module), last, torch.nn.Parameter(torch.empty(())))

    monkeypatch.setattr(GroundedReading, "__init__", of_scalars)
    loaded = SegCompassModel.from_pretrained(folder)
    assert loaded.grounded_reading.gain.shape == () and loaded.grounded_reading.gain == model.grounded_reading.gain


@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_numbers_of_another_size_are_refused_by_name(scalars, tmp_path, shape):
    folder = shutil.copytree(scalars[1], tmp_path / "wrong")
    as_scalars(folder / "model.safetensors", shape)
    with pytest.raises(
        ValueError, match=r"model.safetensors\) does not match .*mismatched_keys: 7 \(.*grounded_reading"
    ):
        SegCompassModel.from_pretrained(folder)


def test_adapters_of_an_earlier_version_go_on_their_model(tmp_path):
    model, _ = tiny_segcompass("llava", concept_reading="grounded")
    model.save_pretrained(tmp_path / "model")
    adapted = peft.get_peft_model(model, lora_config(model))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name and weight.shape == (1,):
                weight.fill_(0.75)
    adapted.save_pretrained(tmp_path / "adapters")
    as_scalars(tmp_path / "adapters" / "adapter_model.safetensors")
    merged = peft.PeftModel.from_pretrained(
        SegCompassModel.from_pretrained(tmp_path / "model"), tmp_path / "adapters"
    ).merge_and_unload()
    assert all(merged.grounded_reading.get_parameter(name).tolist() == [0.75] for name in OLD_SCALARS)
