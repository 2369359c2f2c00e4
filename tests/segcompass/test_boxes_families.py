"""The boxes route on tiny models of the families that LLaVA-1.5 and Qwen2.5-VL do not stand for."""

import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, PaliGemmaProcessor

from segcompass.boxes_route import BoxesRoute
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.trace_teachers import BackboneTeacher
from tests.support.families import family_mllm, family_processor
from tests.support.promptable import by_transformers, save_promptable
from tests.support.scripted import noise_image

FAMILIES = ("qwen2_vl", "qwen3_vl", "internvl", "paligemma")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Each family's folder as a repository has it, PaliGemma's without a chat template, and a SAM."""
    world = tmp_path_factory.mktemp("families")
    save_promptable("SAM", world / "SAM")
    for name in FAMILIES:
        torch.manual_seed(0)
        processor = family_processor(name)
        mllm = family_mllm(name, processor)
        mllm.save_pretrained(world / name)
        processor.tokenizer.chat_template = None if name == "paligemma" else processor.chat_template
        processor.tokenizer.save_pretrained(world / name)
        backbone_of(mllm).save_processor(processor, world / name)
    return world


def as_said(name, size, box):
    """(what the family says of a box, the box that this is)."""
    full = 1024 if name == "paligemma" else 1000
    said = [round(edge / size[n % 2] * full) for n, edge in enumerate(box)]
    meant = [number * size[n % 2] / full for n, number in enumerate(said)]
    left, top, right, bottom = said
    forms = {
        "qwen2_vl": f"<|box_start|>({left},{top}),({right},{bottom})<|box_end|>",
        "qwen3_vl": "```json\n" + json.dumps([{"bbox_2d": said, "label": "mug"}]) + "\n```",
        "internvl": f"<ref>the mug</ref><box>[{said}]</box>",
        "paligemma": f"<loc{top:04d}><loc{left:04d}><loc{bottom:04d}><loc{right:04d}> mug",
    }
    return forms[name], meant


@pytest.mark.parametrize("size", [(100, 60), (40, 120)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_box_arrives_at_sam_as_that_box(world, says, name, size):
    image = noise_image(size[1], size[0], seed=1)
    text, meant = as_said(name, size, (size[0] // 5, size[1] // 4, size[0] // 2, size[1] - 6))
    mask, _, prompt = by_transformers(world / "SAM", image, meant)
    says(text)
    route = BoxesRoute(str(world / name), str(world / "SAM"))
    given = []
    route.sam.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    outputs, (answer,) = route.segment([image], ["the mug"])
    assert answer.fault is None
    torch.testing.assert_close(given[0]["input_boxes"][0, 0], prompt, atol=1e-4, rtol=0)
    found = route.processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=[(size[1], size[0])])[0]
    assert (found["masks"][0].numpy() == mask).all() and 0 < mask.mean() < 1


def test_paligemma_writes_boxes_and_no_traces(world):
    with pytest.raises(ValueError, match="has no chat template"):
        BackboneTeacher(str(world / "paligemma"))


def test_paligemma_is_asked_in_its_own_processors_words(world, says):
    says("")
    route = BoxesRoute(str(world / "paligemma"), str(world / "SAM"))
    given = []
    generate = route.teacher.mllm.generate
    route.teacher.mllm.generate = lambda **inputs: given.append(inputs) or generate(**inputs)
    image = noise_image(60, 100)
    _, (answer,) = route.segment([image], ["the mug"])
    assert answer.nothing
    tokenizer = AutoTokenizer.from_pretrained(world / "paligemma")
    images = AutoImageProcessor.from_pretrained(world / "paligemma", backend="pil")
    images.image_seq_length = 16
    own = PaliGemmaProcessor(images, tokenizer)(images=image, text="<image>detect the mug", return_tensors="pt")
    ours = route.processor.tokenizer.convert_ids_to_tokens(given[0]["input_ids"][0])
    theirs = tokenizer.convert_ids_to_tokens(own["input_ids"][0])
    assert ours == theirs
    torch.testing.assert_close(given[0]["pixel_values"], own["pixel_values"])
