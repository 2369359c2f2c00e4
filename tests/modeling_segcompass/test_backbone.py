"""What a family of MLLMs answers, against the modules and tensors that transformers makes for it."""

import re

import pytest
import torch
from transformers import AutoProcessor, LlavaProcessor

from segcompass.modeling_segcompass import SegCompassProcessor, family_processor
from segcompass.modeling_segcompass.backbone import FAMILIES, GENERIC, Backbone, backbone_of
from segcompass.modeling_segcompass.patch_boxes import has_area
from tests.support.scripted import INSTRUCTIONS, noise_image, noise_images
from tests.support.tiny import BACKBONES, tiny_mllm, tiny_processor, tiny_segcompass

RESPONSES = ["<think>a</think><REF_POS><REF_POS><REF_POS>"] * 4


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    """name, composite, processor and backbone of a family."""
    model, processor = tiny_segcompass(request.param)
    return request.param, model, processor, backbone_of(model)


def test_everything_of_one_family_has_one_backbone(parts):
    name, model, processor, backbone = parts
    assert name in backbone.model_types
    sources = (model.mllm, model.config, model.mllm.config, processor)
    assert all(backbone_of(source) is backbone for source in sources)
    assert model.backbone is processor.backbone is backbone


def test_a_family_that_is_not_listed_gets_the_generic_answers(parts):
    _, model, _, backbone = parts
    unknown = type("Unlisted", (), {"model_type": "unlisted"})()
    assert backbone_of(unknown) is GENERIC
    assert GENERIC.blocks(model.mllm) is backbone.blocks(model.mllm)
    assert GENERIC.vision_tower(model.mllm) is backbone.vision_tower(model.mllm)


class Toy(Backbone):
    """A family that writes its image token in brackets, with LLaVA's parts."""

    model_types = ("toy",)
    image_token = "<|image_pad|>"

    def replace_image_token(self, processor, image_inputs, image_idx):
        return "<|vision_start|>" + 16 * self.image_token + "<|vision_end|>"


def test_a_new_family_is_a_class_and_an_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    of_llava = tiny_processor("llava")
    processor = SegCompassProcessor(
        of_llava.image_processor,
        of_llava.tokenizer,
        of_llava.encoder_image_processor,
        chat_template=of_llava.chat_template.replace("<image>", Toy.image_token),
        prompt_template="{instruction}",
        mllm_type="toy",
    )
    processor.save_pretrained(tmp_path)
    ids = SegCompassProcessor.from_pretrained(tmp_path)(images=noise_image(30, 44), text="it")["input_ids"]
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    place = int((ids[0] == start).nonzero())
    assert (ids[0] == processor.image_token_id).sum() == 16 and ids[0, place + 17] == end


def test_parts_are_the_modules_of_transformers(parts):
    name, model, _, backbone = parts
    core = model.mllm.model
    assert backbone.language_model(model.mllm) is core.language_model
    assert backbone.blocks(model.mllm) is core.language_model.layers
    assert backbone.without_head(model.mllm) is core
    tower = core.vision_tower if name == "llava" else core.visual
    assert backbone.vision_tower(model.mllm) is tower
    assert backbone.projector(model.mllm) is (core.multi_modal_projector if name == "llava" else core.visual.merger)


def test_every_weight_is_language_or_vision(parts):
    _, model, _, backbone = parts
    vision = {name for name, _ in model.mllm.named_parameters() if name.startswith(backbone.vision_names(model.mllm))}
    language = {name for name, _ in model.mllm.named_parameters() if "language_model" in name or "lm_head" in name}
    assert vision and not vision & language
    assert vision | language == {name for name, _ in model.mllm.named_parameters()}


def test_lora_targets_are_the_linear_layers_of_the_language_model(parts):
    _, model, _, backbone = parts
    hit = {name for name, _ in model.named_modules() if re.fullmatch(backbone.lora_targets(model.mllm), name)}
    blocks = [(name, m) for name, m in model.named_modules() if name.startswith("mllm.model.language_model.layers")]
    assert hit == {name for name, module in blocks if isinstance(module, torch.nn.Linear)}


def test_language_models_without_blocks_are_refused():
    class Encoder(torch.nn.Module):
        def get_decoder(self):
            return self

    with pytest.raises(ValueError, match="Encoder has no decoder blocks .*choose an MLLM whose language model"):
        GENERIC.blocks(Encoder())


def test_image_token_stands_as_often_as_the_model_has_features(parts):
    _, model, processor, backbone = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS)
    assert processor.image_token == {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>"}[parts[0]]
    with torch.no_grad():
        features = model.mllm.get_image_features(
            **{name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        ).pooler_output
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [len(image.flatten(0, -2)) for image in features]
    per_token = backbone.patches_per_token(model.config.mllm_config)
    assert per_token == (1 if "image_grid_thw" not in inputs else processor.image_processor.merge_size**2)


def test_patch_grid_covers_the_image_tokens_in_the_images_aspect(parts):
    name, model, processor, backbone = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS)
    grid = backbone.patch_grid(model.config.mllm_config, inputs["input_ids"], inputs)
    assert grid.prod(1).tolist() == (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    if name == "llava":
        assert grid.tolist() == [[4, 4]] * 4
    else:
        assert torch.equal(grid, inputs["image_grid_thw"][:, 1:] // processor.image_processor.merge_size)


def test_boxes_of_the_processor_are_those_of_the_grid_over_what_the_mllm_sees(parts):
    name, model, processor, backbone = parts
    images = noise_images()
    inputs = processor(images=images, text=INSTRUCTIONS)
    seen = backbone.seen_boxes(model.config.mllm_config, inputs["input_ids"], inputs)
    for image, boxes, whole in zip(images, inputs["patch_boxes"], seen, strict=True):
        short = min(image.size)
        crop = torch.tensor([short / image.size[0], short / image.size[1]] if name == "llava" else [1.0, 1.0])
        expected = (1 - crop).repeat(2) / 2 + whole * crop.repeat(2)
        shown = has_area(whole)
        torch.testing.assert_close(boxes[shown], expected[shown])
        assert torch.equal(shown, has_area(boxes))


def test_samples_can_be_chosen_from_the_inputs(parts):
    _, model, processor, backbone = parts
    images = [noise_image(30, 44, 1), noise_image(44, 28, 2), noise_image(20, 64, 3)]
    inputs = processor(images=images, text=["the box"] * 3, response=RESPONSES[:3])
    rows = [2, 0, 2]
    chosen = backbone.select_rows(inputs, rows, processor.image_token_id)
    again = processor(images=[images[row] for row in rows], text=["the box"] * 3, response=RESPONSES[:3])
    assert torch.equal(chosen["pixel_values"], again["pixel_values"])
    with torch.no_grad():
        ours = model.mllm(**backbone.mllm_inputs(model.mllm, chosen)).logits
        theirs = model.mllm(**backbone.mllm_inputs(model.mllm, inputs)).logits
    torch.testing.assert_close(ours, theirs[rows], atol=1e-5, rtol=1e-5)


def test_tokens_can_be_cut_and_text_appended(parts):
    _, _, processor, backbone = parts
    inputs = dict(processor(images=noise_images(), text=INSTRUCTIONS))
    length = inputs["input_ids"].shape[1]
    cut = backbone.select_tokens(inputs, slice(2, 7))
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (4, 5)
    assert cut["pixel_values"] is inputs["pixel_values"]
    backbone.append_text(inputs, 3)
    if processor.token_types is not None:
        assert inputs["mm_token_type_ids"].shape == (4, length + 3) and not inputs["mm_token_type_ids"][:, -3:].any()
    else:
        assert inputs.keys() == cut.keys()


def test_a_family_whose_processor_does_not_say_its_image_tokens_is_refused(monkeypatch):
    monkeypatch.delattr(LlavaProcessor, "replace_image_token")  # as in a transformers that is older than this family's
    monkeypatch.setattr(family_processor, "transformers_version", "5.14.1")
    with pytest.raises(ValueError, match="'llava' cannot be used: .* does not say .* transformers>=5.15.* of 5.14.1"):
        tiny_processor("llava")


@pytest.mark.parametrize("name", BACKBONES)
def test_saved_processor_is_the_familys_own(name, tmp_path):
    processor = tiny_processor(name)
    mllm = tiny_mllm(name, processor)
    mllm.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    backbone_of(mllm).save_processor(processor, tmp_path)
    if name == "llava":
        own = AutoProcessor.from_pretrained(tmp_path)
        for field in backbone_of(mllm).processor_fields:
            assert getattr(own, field) == getattr(processor, field)
    else:  # its own processor wants torchvision for videos
        assert (tmp_path / "preprocessor_config.json").exists()
