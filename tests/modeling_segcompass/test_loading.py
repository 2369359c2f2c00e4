"""The keywords of from_pretrained that users rely on, parts kept elsewhere, and PEFT adapters beside the model."""

import ast
import json

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoder
from segcompass.modeling_segcompass.checkpoints import UNQUANTIZED, spare_from_quantization
from segcompass.trainers.optimization import segmentation_modules
from tests.support.scripted import INSTRUCTIONS, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

RESPONSES = ["<think>left of it</think><REF_POS><REF_POS><REF_POS>"] * 2


def masks_of(model, processor):
    """Masks of two questions. Compare them closely, not bit by bit: weights from a file lie otherwise in memory."""
    inputs = processor(images=noise_images()[:2], text=INSTRUCTIONS[:2], response=RESPONSES)
    with torch.no_grad():
        return model.eval()(**inputs).pred_masks


@pytest.fixture(scope="module", params=[*((backbone, "feature") for backbone in BACKBONES), ("llava", "grounded")])
def saved(request, tmp_path_factory):
    """A tiny model's folder, its processor and its masks."""
    backbone, reading = request.param
    folder = tmp_path_factory.mktemp(f"{backbone}-{reading}")
    model, processor = lively_segcompass(backbone, concept_reading=reading)
    model.save_pretrained(folder)
    return folder, processor, masks_of(model, processor)


def test_dtype_auto_is_the_dtype_it_was_saved_in(saved, tmp_path):
    folder, processor, masks = saved
    assert AutoModel.from_pretrained(folder, dtype="auto").dtype == torch.float32
    low = SegCompassModel.from_pretrained(folder, dtype="bfloat16")
    low.save_pretrained(tmp_path)
    again = SegCompassModel.from_pretrained(tmp_path, dtype="auto")
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(masks_of(again, processor), masks_of(low, processor))
    assert SegCompassModel.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


def test_eager_and_sdpa_attention_agree(saved):
    folder, processor, _ = saved
    found = {}
    for name in ("eager", "sdpa"):
        model = SegCompassModel.from_pretrained(folder, attn_implementation=name)
        assert model.mllm.config._attn_implementation == name
        found[name] = masks_of(model, processor)
    scale = found["eager"].abs().max()
    assert (found["eager"] - found["sdpa"]).abs().max() < 1e-4 * scale  # rounding of float32 through ten layers


def test_device_map_auto_gives_the_same_masks(saved):
    folder, processor, masks = saved
    model = SegCompassModel.from_pretrained(folder, device_map="auto")
    torch.testing.assert_close(masks_of(model.to("cpu"), processor), masks)


def test_parts_offloaded_by_device_map_come_back_when_needed_except_what_is_read_without_a_forward(saved, tmp_path):
    folder, processor, masks = saved
    learns = segmentation_modules(SegCompassModel.from_pretrained(folder))
    places = dict.fromkeys(("mllm", "image_encoder", "sae", "image_positions", *learns), "cpu")
    model = SegCompassModel.from_pretrained(
        folder, device_map={**places, "image_encoder": "disk"}, offload_folder=tmp_path
    )
    assert any(weight.is_meta for weight in model.image_encoder.parameters())
    torch.testing.assert_close(masks_of(model, processor), masks)
    with pytest.raises(ValueError, match="device_map left no memory for the SAE"):
        SegCompassModel.from_pretrained(folder, device_map={**places, "sae": "disk"}, offload_folder=tmp_path)
    if "grounded_reading" in learns:
        places["grounded_reading"] = "disk"
        with pytest.raises(ValueError, match="left no memory for the grounded read-out, which cannot be") as refused:
            SegCompassModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
        advice = ast.literal_eval(str(refused.value).partition("such as device_map=")[2].rstrip("."))
        model = SegCompassModel.from_pretrained(folder, device_map=advice, offload_folder=tmp_path)
        torch.testing.assert_close(masks_of(model, processor), masks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BitsAndBytesConfig(load_in_8bit=True),
        lambda: {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda: plain_torchao(),
    ],
    ids=["bitsandbytes", "dict", "torchao"],
)
def test_quantisation_leaves_everything_but_the_mllm_alone(saved, make):
    folder, _, _ = saved
    quantization = spare_from_quantization(spare_from_quantization(make()))  # twice is once
    field = "modules_to_not_convert" if isinstance(quantization, TorchAoConfig) else "llm_int8_skip_modules"
    skipped = getattr(quantization, field)
    assert sorted(skipped) == sorted(UNQUANTIZED)
    model = SegCompassModel.from_pretrained(folder)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, skipped)}
    assert converted and all(name.startswith("mllm.model.") for name in converted)
    spared = {name.split(".")[0] for name in linear} - {name.split(".")[0] for name in converted}
    assert spared >= {"image_encoder", "grounded_reading" if model.grounded else "slot_mapper"}


def plain_torchao():
    """A TorchAoConfig without torchao, which its constructor would ask for: only the list of modules matters here."""
    config = object.__new__(TorchAoConfig)
    config.modules_to_not_convert = None
    return config


def test_quantised_model_still_segments(saved):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes")
    folder, processor, masks = saved
    model = SegCompassModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    kinds = {type(module).__name__ for module in model.mllm.modules()}
    assert "Linear8bitLt" in kinds
    spared = [model.image_encoder, model.sae, *(getattr(model, name) for name in segmentation_modules(model))]
    assert not any(type(module).__name__ == "Linear8bitLt" for part in spared for module in part.modules())
    low = masks_of(model, processor)
    assert low.isfinite().all() and not torch.equal(low, masks)


# -- parts kept elsewhere --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(saved, tmp_path_factory):
    """The same model with its SAE, SAM encoder and MLLM in folders of their own."""
    folder = saved[0]
    model = SegCompassModel.from_pretrained(folder)
    root = tmp_path_factory.mktemp("apart")
    references = {}
    for part in ("sae", "image_encoder", "mllm"):
        getattr(model, part).save_pretrained(root / part)
        references[part] = {"repo_id": str(root / part), "revision": "main"}
    model.save_pretrained(root / "whole", references=references)
    return root


def test_parts_kept_elsewhere_are_fetched_and_the_masks_are_the_same(saved, apart):
    _, processor, masks = saved
    with safe_open(apart / "whole" / "model.safetensors", "pt") as file:
        assert not {key.split(".")[0] for key in file.keys()} & {"sae", "image_encoder", "mllm"}  # noqa: SIM118
    model, info = SegCompassModel.from_pretrained(apart / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(masks_of(model, processor), masks)
    assert not any(weight.requires_grad for weight in model.sae.parameters())


def test_a_model_fetched_in_parts_is_saved_whole(saved, apart, tmp_path):
    _, processor, masks = saved
    SegCompassModel.from_pretrained(apart / "whole").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("references") is None
    torch.testing.assert_close(masks_of(SegCompassModel.from_pretrained(tmp_path), processor), masks)


def test_bad_references_are_refused(saved, apart, tmp_path):
    model = SegCompassModel.from_pretrained(saved[0])
    for references in ({"decoder": {"repo_id": "a/b", "revision": "main"}}, {"sae": {"repo_id": "a/b"}}):
        with pytest.raises(ValueError, match="name one of .'mllm', 'image_encoder', 'sae'."):
            model.save_pretrained(tmp_path, references=references)
    with pytest.raises(ValueError, match="device_map needs a checkpoint that carries its weights whole"):
        SegCompassModel.from_pretrained(apart / "whole", device_map="auto")


def test_a_configuration_and_a_state_dict_make_a_model_without_a_folder(saved):
    folder, processor, masks = saved
    model = SegCompassModel.from_pretrained(folder)
    again = SegCompassModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    torch.testing.assert_close(masks_of(again, processor), masks)
    with pytest.raises(ValueError, match="the path is None, and so is state_dict; pass a folder or a Hub id"):
        SegCompassModel.from_pretrained(None, config=model.config)
    sae = SparseAutoencoder.from_pretrained(None, config=model.sae.config, state_dict=model.sae.state_dict())
    assert torch.equal(sae.W_dec, model.sae.W_dec)
    lacking = {name: weight for name, weight in model.sae.state_dict().items() if name != "b_enc"}
    with pytest.raises(ValueError, match=r"state_dict does not match this model \(missing_keys: 1 \(b_enc"):
        SparseAutoencoder.from_pretrained(None, config=model.sae.config, state_dict=lacking)


def test_names_of_the_parts_own_checkpoints_are_refused(saved, tmp_path):
    model = SegCompassModel.from_pretrained(saved[0])
    for part in (model, model.sae):
        with pytest.raises(ValueError, match="save_original_format=True asks for the names"):
            part.save_pretrained(tmp_path, save_original_format=True)
    assert not any(tmp_path.iterdir())


# -- adapters --------------------------------------------------------------------------------------------------------


def test_a_peft_adapter_is_saved_beside_and_loaded_again(saved, tmp_path):
    folder, processor, masks = saved
    adapter = peft.LoraConfig(
        target_modules=r"mllm\..*language_model.*\.(q_proj|v_proj)",
        modules_to_save=list(segmentation_modules(SegCompassModel.from_pretrained(folder))),
        r=4,
    )
    model = peft.get_peft_model(SegCompassModel.from_pretrained(folder), adapter)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    trained = masks_of(model, processor)
    assert not torch.equal(trained, masks)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size
    loaded = peft.PeftModel.from_pretrained(SegCompassModel.from_pretrained(folder), tmp_path)
    torch.testing.assert_close(masks_of(loaded, processor), trained, atol=1e-4, rtol=1e-4)  # through a sum of places
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(masks_of(merged, processor), trained, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = SegCompassModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(masks_of(again, processor), masks_of(merged, processor), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("load", [SegCompassModel.from_pretrained, SparseAutoencoder.from_pretrained])
def test_a_name_that_leads_nowhere_is_in_the_error(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("runs/nothere", "nothere"):
        with pytest.raises(OSError, match=f"'{name}'.*"):
            load(name)
    with pytest.raises(OSError, match="'' is no folder here"):
        load("")
