"""What is refused when a model is built of its parts: nothing is accepted and wrong."""

import pickle

import pytest
import torch

from segcompass.modeling_segcompass import SegCompassModel, family_check
from segcompass.modeling_segcompass.backbone import FAMILIES, Backbone
from segcompass.modeling_segcompass.family_check import check_family
from segcompass.modeling_segcompass.family_processor import known_obstacle, own_processor_class
from segcompass.modeling_segcompass.patch_boxes import grid_boxes
from tests.support.families import family_mllm, family_processor, tiny_family
from tests.support.tiny import tiny_mllm, tiny_processor, tiny_sam


def build(mllm, processor):
    return SegCompassModel.from_backbones(mllm, tiny_sam(), processor=processor, num_concepts=8)


class Causal(Backbone):
    """PaliGemma as if its prompt were read from left to right in one pass, and as a whole in generation."""

    model_types = ("paligemma",)

    def prompt_types(self, processor, input_ids):
        return [[0] * len(row) for row in input_ids]


def test_generation_that_leaves_other_states_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "paligemma", Causal())
    processor = family_processor("paligemma")
    mllm = family_mllm("paligemma", processor)
    with torch.no_grad():
        for weight in mllm.parameters():
            weight.mul_(2)
    with pytest.raises(ValueError, match="cannot be used: the states that generation"):
        build(mllm, processor)


class Turned(Backbone):
    """LLaVA as if its patches ran column by column."""

    model_types = ("llava",)
    processor_fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")

    def image_boxes(self, processor, image_inputs, image_idx, size, count, views):
        return grid_boxes(4, 4).view(4, 4, 4).transpose(0, 1).flatten(0, 1)


def test_boxes_that_are_not_where_the_tokens_look_are_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llava", Turned())
    processor = tiny_processor("llava")
    with pytest.raises(ValueError, match="an image token does not show the part of the image that it stands for"):
        build(tiny_mllm("llava", processor), processor)


def test_another_families_processor_is_refused():
    processor = tiny_processor("qwen2_5_vl")
    with pytest.raises(ValueError, match="has image token .*pass the processor of this MLLM"):
        build(tiny_mllm("llava", processor), processor)


def test_an_encoder_decoder_is_refused():
    processor = tiny_processor("llava")
    mllm = tiny_mllm("llava", processor)
    mllm.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is an encoder-decoder"):
        build(mllm, processor)


def test_an_unlisted_family_needs_its_processor_to_be_tried():
    processor = family_processor("internvl")
    with pytest.raises(ValueError, match="must be tried before it is used .internvl.; pass processor="):
        SegCompassModel.from_backbones(family_mllm("internvl", processor), tiny_sam())


def test_a_deep_mllm_in_half_precision_may_round(monkeypatch):
    """Generation and one pass differ by 4 % after 32 blocks in bfloat16: a model of 7 B parameters was refused."""
    torch.manual_seed(0)
    processor, errors, error = tiny_processor("llava"), [], family_check._error
    monkeypatch.setattr(family_check, "_error", lambda *given: errors.append(error(*given)) or errors[-1])
    mllm = tiny_mllm("llava", processor, hidden=64, layers=32)
    with torch.no_grad():
        for weight in mllm.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)  # else the blocks add next to nothing
    build(mllm.to(torch.bfloat16), processor)
    assert len(errors) == 2 and max(errors) > 0.02, "nothing was rounded, so nothing is shown"
    states = torch.ones(1, 4, 8, dtype=torch.bfloat16)
    assert error(states, 1.3 * states, torch.ones(1, 4, dtype=torch.bool)) > family_check._tolerance(states)


def test_trying_leaves_modes_random_numbers_and_weights_alone():
    processor = tiny_processor("llava")
    model = build(tiny_mllm("llava", processor), processor)
    assert all(module.training for module in model.mllm.modules())
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, torch.get_rng_state()
    family_check._TRIED.clear()
    check_family(model, processor)
    assert family_check._TRIED and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(module.training for module in model.mllm.modules())
    assert not any(module._forward_pre_hooks for module in model.mllm.modules())


def test_without_the_processors_boxes_only_a_single_grid_can_be_placed():
    model, processor = tiny_family("internvl")
    inputs = processor(images=torch.zeros(40, 56, 3, dtype=torch.uint8).numpy(), text="it", response="<think>")
    inputs.pop("patch_boxes")
    with pytest.raises(ValueError, match="patch_boxes is missing, and of internvl only the processor can say"):
        model(**inputs)


@pytest.mark.parametrize(
    ("mllm_type", "reason"),
    [
        ("t5gemma2", "encoder-decoder"),
        ("llama4", "for torchvision only"),
        ("blip-2", "does not say which tokens stand for an image"),
        ("bert", "no MLLM"),
        ("glm_ocr", "no processor"),
    ],
)
def test_what_transformers_tables_tell_is_said(mllm_type, reason):
    assert reason in known_obstacle(mllm_type)


def test_several_images_and_videos_are_refused():
    processor = tiny_processor("llava")
    image = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    prompt = processor.apply_chat_template(processor.build_messages("it"), add_generation_prompt=True)
    with pytest.raises(ValueError, match="a prompt holds 2 images; masks are made of one image per prompt"):
        processor(images=[[image, image]], text=[prompt.replace("<image>", "<image><image>")])
    with pytest.raises(ValueError, match="videos are given; .*pass a frame"):
        processor(images=image, text="it", videos=[image])


def test_settings_that_a_family_does_not_have_are_refused():
    with pytest.raises(ValueError, match="InternVLProcessor has no image_seq_len; it has image_seq_length"):
        own_processor_class("internvl").around(None, None, {"image_seq_len": 4})


def test_a_familys_own_processor_can_be_copied_and_sent_to_other_processes():
    processor = family_processor("internvl")
    again = pickle.loads(pickle.dumps(processor))
    image = torch.zeros(40, 56, 3, dtype=torch.uint8).numpy()
    ours, theirs = processor(images=image, text="it"), again(images=image, text="it")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and again.own is not processor.own
    assert again.own.tokenizer is again.tokenizer
