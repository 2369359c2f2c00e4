"""Processors of plain MLLMs and a plain SAM, whose files lie as in their repositories on the Hub."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoderConfig
from segcompass.modeling_segcompass.tokens import PROBE, THINK
from tests.support.hub_world import LLAVA, QWEN, QWEN_TIED, SAM, VIEW, make_world
from tests.support.scripted import noise_image

MLLMS = (LLAVA, QWEN, QWEN_TIED)
SMALL = dict(d_c=16, num_concepts=24, codebook_heads=4, slot_heads=4, slot_head_dim=8, decoder_heads=4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    make_world(folder)
    return folder


def processor_of(hub, mllm, **settings):
    return SegCompassProcessor.from_backbones(hub / mllm, hub / SAM, **settings)


@pytest.mark.parametrize("mllm", MLLMS)
def test_a_plain_mllm_and_a_plain_sam_make_a_processor_that_finds_every_token(hub, mllm):
    processor = processor_of(hub, mllm)
    tokenizer, response = processor.tokenizer, processor.format_response(PROBE)
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert [ids.count(n) for n in (processor.think_id, processor.think_end_id, processor.ref_token_id)] == [1, 1, 6]
    assert tokenizer.decode(ids).replace(f"{THINK} ", THINK) == response  # Llama's writes a space before a word
    for part in (processor.image_processor, processor.encoder_image_processor):
        assert type(part).__name__.endswith("Pil")  # no torchvision
    assert processor.frame.side == 64  # SAM's side comes from its configuration


@pytest.mark.parametrize("mllm", MLLMS)
def test_a_model_of_both_answers_on_a_wide_image_and_its_new_rows_are_the_mean(hub, mllm):
    processor = processor_of(hub, mllm)
    sae = SparseAutoencoderConfig(d_in=64, d_sae=64, layer=2)
    model = SegCompassModel.from_backbones(
        str(hub / mllm), str(hub / SAM), processor=processor, sae_config=sae, **SMALL
    ).eval()
    inputs = processor(images=noise_image(60, 100), text="the red box", response=processor.format_response("it"))
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.slot_mask.sum() == 6 and outputs.pred_masks.isfinite().all()
    known = len(processor.tokenizer)
    ours = processor.tokenizer.convert_tokens_to_ids(processor.new_tokens)
    others = [number for number in range(known) if number not in ours]
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert part.weight.shape[0] > known  # a padded vocabulary stays as it was
        torch.testing.assert_close(part.weight[ours], part.weight[others].mean(0).expand(3, -1))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (mllm == QWEN_TIED)
    assert model.config.image_view == ("frame" if mllm == LLAVA else "whole")


def test_llava_sees_the_edges_of_a_photograph_unless_the_centre_is_asked_for(hub):
    plain = np.full((480, 640, 3), 127, np.uint8)
    edges = plain.copy()
    edges[100:400, :60], edges[100:400, -60:] = (255, 0, 0), (0, 0, 255)
    for whole, seen in ((True, True), (False, False)):
        processor = processor_of(hub, LLAVA, whole_image=whole)
        pixels = [processor(images=Image.fromarray(each), text="it")["pixel_values"] for each in (plain, edges)]
        assert pixels[0].shape[-2:] == (VIEW, VIEW)
        assert (not torch.equal(*pixels)) == seen
        if whole:  # the mean colour below the image, as SAM's padding lies
            assert (pixels[0][..., VIEW * 3 // 4 :, :] == 0).all() and (pixels[0][..., : VIEW * 3 // 4, :] != 0).all()


def test_qwens_prompt_stays_within_the_papers_pixels_unless_others_are_asked_for(hub):
    photograph, stamp = noise_image(3000, 4000), noise_image(20, 20)
    processor = processor_of(hub, QWEN)
    most, least = (processor(images=image, text="it")["image_grid_thw"][0].prod() for image in (photograph, stamp))
    assert 800 * 4 < most <= 900 * 4 and least == 4 * 4
    few = processor_of(hub, QWEN, min_pixels=784, max_pixels=12_544)
    assert few(images=photograph, text="it")["image_grid_thw"][0].prod() <= 16 * 4


@pytest.mark.parametrize("mllm", [LLAVA, QWEN])
def test_a_saved_processor_keeps_what_the_mllm_saw(hub, mllm, tmp_path):
    image = noise_image(60, 100)
    for number, whole in enumerate((True, False)):
        processor = processor_of(hub, mllm, whole_image=whole)
        processor.save_pretrained(tmp_path / str(number))
        again = SegCompassProcessor.from_pretrained(tmp_path / str(number))
        inputs, expected = again(images=image, text="it"), processor(images=image, text="it")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        taken = SegCompassProcessor.from_backbones(tmp_path / str(number), "not read")
        assert torch.equal(taken(images=image, text="it")["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match="num_slots cannot be set: .* was saved with a SegCompassProcessor"):
        SegCompassProcessor.from_backbones(tmp_path / "0", hub / SAM, num_slots=4)


def test_what_is_no_mllm_or_no_image_encoder_is_refused_by_name(hub, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "llama")
    for mllm, encoder, message in (
        (hub / SAM, hub / SAM, f"mllm=.*{SAM}.* is of type 'sam' and cannot be used: it is no MLLM"),
        (tmp_path / "llama", hub / SAM, "mllm=.*llama.* is of type 'llama' and cannot be used: it is no MLLM"),
        (hub / LLAVA, hub / QWEN, f"image_encoder=.*{QWEN}.* is of type 'qwen2_5_vl', which is no image encoder"),
        ("nobody/nothing", hub / SAM, "mllm='nobody/nothing' is no folder or Hub id of a model"),
        (hub / LLAVA, tmp_path / "none", "image_encoder=.*none.* cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            SegCompassProcessor.from_backbones(mllm, encoder)
    with pytest.raises(ValueError, match="min_pixels=4 and max_pixels=None were given, but CLIPImageProcessorPil"):
        processor_of(hub, LLAVA, min_pixels=4)
    with pytest.raises(ValueError, match="min_pixels is 784 and max_pixels 28"):
        processor_of(hub, QWEN, min_pixels=784, max_pixels=28)


def test_a_folder_that_lacks_files_is_refused_by_what_it_lacks(hub, tmp_path):
    make_world(tmp_path, [LLAVA])
    (tmp_path / LLAVA / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        SegCompassProcessor.from_backbones(tmp_path / LLAVA, hub / SAM)
    (tmp_path / LLAVA / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor that can be read"):
        SegCompassProcessor.from_backbones(tmp_path / LLAVA, hub / SAM)


def test_the_embedding_of_think_is_known_to_the_configuration(hub):
    processor = processor_of(hub, LLAVA)
    assert processor.model_tokens()["think_id"] == processor.tokenizer.convert_tokens_to_ids(THINK)
    assert json.dumps(processor.model_tokens())
