"""The processor: prompts, labels, errors, and masks brought back to the image's own pixels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcompass.modeling_segcompass import SegCompassOutput, SegCompassProcessor, processing_segcompass
from segcompass.modeling_segcompass.processing_segcompass import PROMPT
from tests.support.scripted import IMAGE_SIZES, INSTRUCTIONS, noise_image, noise_images
from tests.support.tiny import BACKBONES, tiny_processor

REASONING = "left of the ring"


@pytest.fixture(scope="module", params=BACKBONES)
def processor(request):
    return tiny_processor(request.param)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [None, []])
def test_no_image_is_refused(processor, images):
    with pytest.raises(ValueError, match="no image was given; pass images="):
        processor(images=images, text="the box")


def test_missing_file_is_refused(processor):
    with pytest.raises(OSError, match=r"image 1 \('nowhere.png'\) cannot be read"):
        processor(images=[noise_image(8, 8), "nowhere.png"], text=["the box", "the box"])


def test_file_that_is_no_image_is_refused(processor, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    with pytest.raises(OSError, match=r"image 0 \(.*notes.png'?\)?.*cannot be read"):
        processor(images=path, text="the box")


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 5)), np.zeros((5, 0, 3), np.uint8)])
def test_empty_image_is_refused(processor, image):
    with pytest.raises(ValueError, match="image 0 is empty .*at least 1x1 pixels"):
        processor(images=image, text="the box")


@pytest.mark.parametrize("text", ["", "   \n"])
def test_empty_instruction_is_refused(processor, text):
    with pytest.raises(ValueError, match="the instruction is .*say what to segment"):
        processor(images=noise_image(8, 8), text=text)


def test_missing_instruction_is_refused(processor):
    with pytest.raises(ValueError, match="1 images but 0 instructions"):
        processor(images=noise_image(8, 8))


def test_prompt_over_the_limit_is_refused(processor):
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, .* the limit is 300: shorten .* or raise"):
        processor(images=noise_image(8, 8), text="box " * 80)


def test_as_many_instructions_as_images_are_needed(processor):
    with pytest.raises(ValueError, match="2 images but 1 instructions; give one instruction per image"):
        processor(images=[noise_image(8, 8)] * 2, text="the box")


def test_as_many_responses_as_prompts_are_needed(processor):
    with pytest.raises(ValueError, match="1 prompts but 2 responses; give one per prompt"):
        processor(images=noise_image(8, 8), text="the box", response=["a", "b"])


def test_instruction_with_the_concentration_token_is_refused(processor):
    with pytest.raises(ValueError, match=r"the instruction contains '<REF_POS>', which is reserved; remove it"):
        processor(images=noise_image(8, 8), text="the <REF_POS> box")


def test_template_with_the_concentration_token_is_refused(processor):
    with pytest.raises(ValueError, match="prompt_template contains '<REF_POS>'; describe the token in words"):
        SegCompassProcessor(
            processor.image_processor,
            processor.tokenizer,
            processor.encoder_image_processor,
            prompt_template="{instruction} <REF_POS>",
        )


def test_a_question_is_asked_on_one_line(processor):
    """With a line break before it the small model knew no word."""
    image = noise_image(40, 60)
    one, other = (processor(images=image, text=text)["input_ids"] for text in ("the red box", " the\nred \t box\n"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 4), (4, 3)])
def test_an_image_of_few_pixels_is_an_image(processor, size):
    """Its places were measured by an array, in which colours could come first or last."""
    inputs = processor(images=noise_image(*size), text="the box")
    assert inputs["original_sizes"].tolist() == [list(size)] and inputs["patch_boxes"].isfinite().all()


def test_image_too_narrow_for_the_frame_is_refused(processor):
    with pytest.raises(ValueError, match=r"row 0 .*: the image is 1 x 200 pixels; the limit is a ratio of 64,.*crop"):
        processor.encoder_inputs(noise_image(200, 1))


# -- prompts and responses ---------------------------------------------------------------------------------------------


def test_prompt_never_contains_the_concentration_token(processor):
    processor.prompt_template, template = PROMPT, processor.prompt_template
    processor.max_prompt_length, limit = 1000, processor.max_prompt_length
    try:
        inputs = processor(images=noise_images(), text=INSTRUCTIONS)
    finally:
        processor.prompt_template, processor.max_prompt_length = template, limit
    assert not (inputs["input_ids"] == processor.ref_token_id).any()
    assert "3 times" in processor.batch_decode(inputs["input_ids"])[0]


def test_inputs_have_the_documented_shapes_and_sizes(processor):
    inputs = processor(images=noise_images(), text=INSTRUCTIONS)
    assert set(processor.model_input_names) == set(inputs)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["encoder_pixel_values"].shape == (4, 3, 32, 32)
    assert inputs["original_sizes"].tolist() == [list(size) for size in IMAGE_SIZES]
    assert inputs["reshaped_input_sizes"].tolist() == [[32, 32], [22, 32], [32, 20], [10, 32]]
    image_tokens = (inputs["input_ids"] == processor.image_token_id).sum(1)
    expected = inputs["image_grid_thw"].prod(-1) // 4 if "image_grid_thw" in inputs else torch.full((4,), 16)
    assert torch.equal(image_tokens, expected)
    assert (inputs["attention_mask"].diff(dim=1) >= 0).all(), "prompts are padded on the left"


@pytest.mark.parametrize("kind", ["pil", "array", "grey array", "path", "path object", "rgba"])
def test_images_may_come_in_any_usual_form(processor, kind, tmp_path):
    image = noise_image(30, 44)
    path = tmp_path / "image.png"
    image.save(path)
    given = {
        "pil": image,
        "array": np.asarray(image),
        "grey array": np.asarray(image)[..., 0],
        "rgba": image.convert("RGBA"),
        "path": str(path),
        "path object": path,
    }[kind]
    inputs = processor(images=given, text="the box")
    assert inputs["original_sizes"].tolist() == [[30, 44]]
    if kind != "grey array":
        assert torch.equal(
            inputs["encoder_pixel_values"], processor(images=image, text="the box")["encoder_pixel_values"]
        )


def test_sam_inputs_can_be_left_out(processor):
    assert "encoder_pixel_values" not in processor(images=noise_image(8, 8), text="the box", image_encoder=False)


def test_finished_prompt_passes_through_unchanged(processor):
    image = noise_image(30, 44)
    text = processor.apply_chat_template(
        processor.build_messages("the box"), tokenize=False, add_generation_prompt=True
    )
    finished = processor(images=image, text=text, return_tensors="pt")
    ours = processor(images=image, text="the box")
    assert torch.equal(finished["input_ids"], ours["input_ids"])
    assert torch.equal(finished["pixel_values"], ours["pixel_values"])
    assert "encoder_pixel_values" not in finished


def test_chat_template_tokenises_the_same_prompt(processor):
    image = noise_image(30, 44)
    messages = processor.build_messages("the box")
    messages[0]["content"][0]["image"] = image
    tokenised = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(tokenised["input_ids"], processor(images=image, text="the box")["input_ids"])


def test_labels_cover_exactly_the_response(processor):
    responses = [processor.format_response(REASONING), "no token", processor.format_response("b"), "<think></think>"]
    prompts = processor(images=noise_images(), text=INSTRUCTIONS)
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=responses)
    start = prompts["input_ids"].shape[1]
    labels, mask = inputs["labels"], inputs["response_mask"]
    assert torch.equal(inputs["input_ids"][:, :start], prompts["input_ids"])
    assert (labels[:, :start] == -100).all() and torch.equal(labels != -100, mask)
    for row, response in enumerate(responses):
        # what a model that wrote this response would have left: its tokens, then the end token
        written = processor.tokenizer(response, add_special_tokens=False).input_ids + [processor.tokenizer.eos_token_id]
        assert labels[row][mask[row]].tolist() == written
        assert inputs["input_ids"][row, start : start + len(written)].tolist() == written
        assert inputs["attention_mask"][row, start:].tolist() == [1] * len(written) + [0] * (
            labels.shape[1] - start - len(written)
        )
        assert processor.tokenizer.decode(written[:-1]) == response
    if "mm_token_type_ids" in inputs:
        assert inputs["mm_token_type_ids"].shape == labels.shape
        assert not inputs["mm_token_type_ids"][:, start:].any()


def test_text_decoded_without_special_tokens_keeps_the_answers_structure(processor):
    response = processor.format_response(REASONING)
    ids = processor.tokenizer(response, add_special_tokens=False).input_ids
    assert processor.batch_decode([ids + [processor.tokenizer.eos_token_id]], skip_special_tokens=True) == [response]
    assert response == f"<think>{REASONING}</think><REF_POS><REF_POS><REF_POS>"


def test_processor_round_trips(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = SegCompassProcessor.from_pretrained(tmp_path)
    for name in ("prompt_template", "num_slots", "max_prompt_length", "patch_size", "ref_token_id", "think_end_id"):
        assert getattr(loaded, name) == getattr(processor, name), name
    images, texts = noise_images(), INSTRUCTIONS
    ours, theirs = processor(images=images, text=texts), loaded(images=images, text=texts)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_padded_before_is_not_saved(processor, tmp_path):
    """Or a resumed training, which has read another number of batches, would save other bytes."""
    processor.save_pretrained(tmp_path / "before")
    processor(images=[noise_image(40, 56)] * 2, text=["the box", "the large box at the left"])
    assert processor.tokenizer.backend_tokenizer.padding is not None, "nothing was padded: the test says nothing"
    processor.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "tokenizer.json").read_bytes() == (tmp_path / "before" / "tokenizer.json").read_bytes()


def test_a_saved_processor_is_the_one_that_is_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == SegCompassProcessor.from_pretrained(tmp_path).to_dict()


def test_input_names_are_those_of_what_comes_back(processor):
    assert set(processor.model_input_names) == set(processor(images=noise_image(30, 44), text="the box"))


def test_padding_is_the_callers_or_the_tokenizers_or_else_as_needed_and_on_the_left(processor, monkeypatch):
    given = dict(images=noise_images()[:2], text=["the box", "the large box"])
    lengths = processor(**given)["attention_mask"].sum(1)
    assert processor(**given)["attention_mask"].shape[1] == lengths.max() > lengths.min()
    wide = {"padding": "max_length", "max_length": 120}
    for inputs in (processor(**given, **wide), processor(**given, text_kwargs=wide)):
        assert inputs["input_ids"].shape == (2, 120) and not inputs["attention_mask"][:, 0].any()
    monkeypatch.setitem(processor.tokenizer.init_kwargs, "padding", "max_length")
    assert processor(**given, max_length=110)["input_ids"].shape == (2, 110)
    numpy = processor(**given, max_length=110, common_kwargs={"return_tensors": "np"})
    assert isinstance(numpy["input_ids"], np.ndarray) and isinstance(numpy["encoder_pixel_values"], np.ndarray)


# -- masks at the image's own size -------------------------------------------------------------------------------------


def outputs_of(masks, logits=None, slot_mask=None):
    masks = torch.as_tensor(masks, dtype=torch.float32)
    shape = masks.shape[:2]
    return SegCompassOutput(
        pred_masks=masks,
        pred_logits=torch.full(shape, 3.0) if logits is None else torch.tensor(logits),
        slot_mask=torch.ones(shape, dtype=torch.bool) if slot_mask is None else torch.tensor(slot_mask),
    )


def bilinear(field, height, width):
    """Bilinear resampling with half-pixel centres and clamped borders, written out in numpy."""
    rows = np.clip((np.arange(height) + 0.5) * field.shape[0] / height - 0.5, 0, None)
    columns = np.clip((np.arange(width) + 0.5) * field.shape[1] / width - 0.5, 0, None)
    top, left = rows.astype(int), columns.astype(int)
    bottom, right = np.minimum(top + 1, field.shape[0] - 1), np.minimum(left + 1, field.shape[1] - 1)
    v, h = (rows - top)[:, None], (columns - left)[None]
    upper = field[top][:, left] * (1 - h) + field[top][:, right] * h
    lower = field[bottom][:, left] * (1 - h) + field[bottom][:, right] * h
    return upper * (1 - v) + lower * v


@pytest.mark.parametrize("size", [(48, 64), (64, 40), (64, 64), (24, 32), (32, 18)])
def test_mask_drawn_on_the_frame_comes_back_pixel_for_pixel(processor, size):
    scale = max(size) // 32
    rows, columns = slice(3, 9), slice(5, 17)
    frame = np.full((32, 32), -1.0)
    frame[rows, columns] = 1.0
    frame[size[0] // scale :] = frame[:, size[1] // scale :] = 9.0  # padding must not leak into the image
    (result,) = processor.post_process_instance_segmentation(outputs_of(frame[None, None]), target_sizes=[size])
    expected = np.zeros(size, bool)
    expected[3 * scale : 9 * scale, 5 * scale : 17 * scale] = True
    assert np.array_equal(result["masks"][0].numpy(), expected)
    assert result["boxes"].tolist() == [[5 * scale, 3 * scale, 17 * scale, 9 * scale]]


@pytest.mark.parametrize("size", [(38, 61), (61, 37), (11, 13), (200, 150)])
@pytest.mark.parametrize("cells", [32, 8])
def test_any_size_agrees_with_an_independent_resampling(processor, size, cells):
    frame = np.random.default_rng(0).standard_normal((cells, cells))
    (logits,) = processor.post_process_masks(torch.tensor(frame, dtype=torch.float32)[None, None], [size])
    inside = processor.encoder_inputs(noise_image(*size))["reshaped_input_sizes"][0].tolist()
    expected = bilinear(bilinear(frame, 32, 32)[: inside[0], : inside[1]], *size)
    np.testing.assert_allclose(logits[0].numpy(), expected, atol=1e-5)


def test_thresholds_choose_slots_and_pixels(processor):
    frame = np.full((1, 3, 32, 32), -9.0)
    frame[:, :, 4:8, 4:8] = 2.0  # probability 0.88
    outputs = outputs_of(frame, [[2.0, 0.0, -2.0]])  # confidences 0.88, 0.5, 0.12
    kept = {
        threshold: processor.post_process_instance_segmentation(outputs, threshold, target_sizes=[(32, 32)])[0]
        for threshold in (0.0, 0.5, 0.6, 1.0)
    }
    assert {threshold: result["slots"].tolist() for threshold, result in kept.items()} == {
        0.0: [0, 1, 2],
        0.5: [0, 1],
        0.6: [0],
        1.0: [],
    }
    torch.testing.assert_close(kept[0.5]["scores"], torch.tensor([2.0, 0.0]).sigmoid())
    strict = processor.post_process_instance_segmentation(outputs, mask_threshold=0.9, target_sizes=[(32, 32)])[0]
    assert len(strict["masks"]) == 0, "a slot whose mask is empty is no instance"


@pytest.mark.parametrize("size", [(38, 61), (61, 37), (11, 13), (200, 150), (1, 40), (900, 700)])
@pytest.mark.parametrize("mask_threshold", [0.5, 0.3, 0.0, 1.0])
def test_masks_made_in_strips_are_the_large_logits_above_the_threshold(processor, monkeypatch, size, mask_threshold):
    monkeypatch.setattr(processing_segcompass, "STRIP", 2000)  # several strips, of which the last is shorter
    outputs = outputs_of(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), [[3.0, -3.0, 3.0]] * 2)
    (logits, _), sizes = processor.post_process_masks(outputs.pred_masks, [size, size]), [size, size]
    result = processor.post_process_instance_segmentation(outputs, 0.5, mask_threshold, sizes)[0]
    expected = logits[[0, 2]].sigmoid() > mask_threshold
    if mask_threshold == 1.0:
        assert len(result["slots"]) == 0 and not expected.any()
        return
    assert result["slots"].tolist() == [0, 2]
    differ = result["masks"] != expected  # but where rounding decides
    assert (logits[[0, 2]].sigmoid()[differ] - mask_threshold).abs().lt(1e-6).all()
    for mask, box in zip(result["masks"].numpy(), result["boxes"].int().tolist(), strict=True):
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_a_large_photograph_costs_little_more_than_its_masks():
    """24 megapixels, 6 slots, in a process of its own, whose peak is its own: 0.144 GB are the masks themselves."""
    script = """
import resource, torch
from types import SimpleNamespace
from tests.support.tiny import tiny_processor
processor = tiny_processor("llava")
masks, row = torch.randn(1, 6, 256, 256), torch.ones(1, 6)
outputs = SimpleNamespace(pred_masks=masks, pred_logits=row, slot_mask=row.bool())
processor.post_process_instance_segmentation(outputs, target_sizes=[(40, 60)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(result,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(4000, 6000)])
assert result["masks"].shape == (6, 4000, 6000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], *sys.path)))}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout) <= 0.25


def test_no_instance_gives_empty_results_of_the_right_shapes(processor):
    frame = np.full((2, 3, 32, 32), 5.0)
    outputs = outputs_of(frame, np.full((2, 3), -4.0).tolist())
    sizes = [(20, 30), (30, 20)]
    for result, size in zip(
        processor.post_process_instance_segmentation(outputs, target_sizes=sizes), sizes, strict=True
    ):
        assert result["masks"].shape == (0, *size) and result["masks"].dtype == torch.bool
        assert result["boxes"].shape == (0, 4) and result["scores"].shape == (0,) and result["slots"].shape == (0,)
    for mask, size in zip(
        processor.post_process_semantic_segmentation(outputs, target_sizes=sizes), sizes, strict=True
    ):
        assert mask.shape == size and mask.dtype == torch.bool and not mask.any()


def test_missing_concentration_token_gives_no_mask(processor):
    outputs = outputs_of(np.full((1, 3, 32, 32), 5.0), slot_mask=[[True, False, False]])
    (result,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(32, 32)])
    assert result["slots"].tolist() == [0]


def test_semantic_mask_is_the_union_of_the_instances(processor):
    frame = np.full((1, 3, 32, 32), -5.0)
    frame[0, 0, :8], frame[0, 1, :, :8], frame[0, 2] = 5.0, 5.0, 5.0
    (mask,) = processor.post_process_semantic_segmentation(
        outputs_of(frame, [[3.0, 3.0, -3.0]]), target_sizes=torch.tensor([[32, 32]])
    )
    expected = np.zeros((32, 32), bool)
    expected[:8] = expected[:, :8] = True
    assert np.array_equal(mask.numpy(), expected)


def test_bad_post_processing_arguments_are_refused(processor):
    outputs = outputs_of(np.zeros((2, 3, 32, 32)))
    with pytest.raises(ValueError, match="target_sizes is None; pass inputs"):
        processor.post_process_instance_segmentation(outputs)
    with pytest.raises(ValueError, match="2 predictions but 1 target sizes"):
        processor.post_process_instance_segmentation(outputs, target_sizes=[(8, 8)])
    with pytest.raises(ValueError, match="threshold is 50; it is a probability"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(8, 8)] * 2, threshold=50)
    for wrong in ((8, float("inf")), (8, float("nan")), (8, 7.5), ("8", 8), (8, None), (8,), 8, None):
        with pytest.raises(ValueError, match="a target size is .* whole pixels"):
            processor.post_process_instance_segmentation(outputs, target_sizes=[(8, 8), wrong])


def test_target_sizes_of_another_shape_than_the_images_are_refused(processor):
    """Such as those of a photograph before it was turned upright: its masks would come back stretched."""
    outputs = outputs_of(np.zeros((2, 3, 32, 32)))
    outputs.reshaped_input_sizes = torch.tensor([[32, 32], [21, 32]])
    for sizes in ([(40, 40), (800, 1200)], [(7, 7), (2, 3)], [(1000, 1001), (667, 1000)]):
        assert len(processor.post_process_instance_segmentation(outputs, target_sizes=sizes)) == 2
    with pytest.raises(ValueError, match=r"target size 1 is \(1200, 800\) .* the shape of \(21, 32\).*original_sizes"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 40), (1200, 800)])


def test_sizes_from_the_mllms_own_image_processor_are_no_inputs_of_the_mllm():
    embedded = Path(__file__).parents[2] / "examples" / "checkpoints" / "mini"  # SAM's image processor for the MLLM too
    processor = SegCompassProcessor.from_pretrained(embedded)
    messages = processor.build_messages("the box")
    finished = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[noise_image(40, 56)], text=[finished], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    without = processor(images=[noise_image(40, 56)], text=["the box"], image_encoder=False)
    assert set(without) - {"patch_boxes"} == set(inputs)
