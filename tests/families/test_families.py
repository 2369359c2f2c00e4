"""Families of MLLMs, each as tiny random weights in transformers' own class: everything that is done with one.

    pytest tests/families --all-families     # all of them, and prints the table of docs/families.md

Without the option only the families of `conftest.FAST` are tried.
"""

import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from segcompass.loaders import load_scenes
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder
from segcompass.modeling_segcompass.backbone_files import read_mllm
from segcompass.modeling_segcompass.family_check import _embedded
from segcompass.modeling_segcompass.patch_boxes import has_area
from segcompass.trainers import (
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainerConfig,
)
from segcompass.trainers.activations import ActivationDataset
from segcompass.trainers.checks import check_carried_inputs
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.constant_prefix import constant_prefix
from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
from segcompass.trainers.policy import freeze, lora_config
from segcompass.trainers.sft_trainer import response_logits
from tests.support.families import TINY_FAMILIES, tiny_family
from tests.support.grpo import scenes, settings
from tests.support.scripted import Script
from tests.support.tiny import make_sure, tiny_processor

from .conftest import coarse_noise

IMAGES = [coarse_noise(40, 56, 1), coarse_noise(120, 40, 2)]
TEXTS = ["it", "the red one"]
RESPONSE = "<think>a b</think><REF_POS><REF_POS><REF_POS>"
READ_WHOLE = {"aya_vision", "gemma3", "gemma4", "paligemma", "qwen3_5"}
"""Families whose prompts about one image are each read whole: other attention, or another cache than keys, values."""


@pytest.fixture(scope="module")
def parts(family):
    """Model and processor of the family at hand; weights as large as it takes for masks to depend on the input."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = tiny_family(family)
    factors = {"mllm": 2, "image_encoder": 10, "mask_decoder": 1.3}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(factors.get(name.split(".")[0], 1))
    return model, processor


def column(name):
    """A column of the table."""

    def mark(test):
        test.column = name
        return test

    return mark


@pytest.fixture(scope="module")
def rows():
    return list(load_scenes("train", seed=5, num_samples=4, size=64, streaming=True))


@column("processor")
def test_image_tokens_are_as_many_as_the_model_has_features_for(family, parts):
    model, processor = parts
    for image in IMAGES:
        inputs = processor(images=image, text="it")
        count = int((inputs["input_ids"] == processor.image_token_id).sum())
        assert inputs["patch_boxes"].shape == (1, count, 4) and has_area(inputs["patch_boxes"]).any()
        boxes = inputs.pop("patch_boxes")
        assert torch.equal(boxes, processor.patch_boxes(image))
        assert _embedded(model, inputs).shape[:2] == (1, count)


@column("processor")
def test_the_mllms_own_folder_gives_the_same_inputs(family, parts, tmp_path):
    """Settings that only the family's own processor has are read from what it was saved with."""
    model, processor = parts
    model.mllm.config.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    model.backbone.save_processor(processor, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(processor.chat_template)
    sizes = getattr(processor.image_processor, "size", None) if hasattr(processor.image_processor, "merge_size") else {}
    limits = {"min_pixels": sizes.get("shortest_edge"), "max_pixels": sizes.get("longest_edge")}
    read = read_mllm(tmp_path, whole_image=family not in ("llava", "vipllava"), **limits)
    read["tokenizer"] = processor.tokenizer  # classes of some families' tokenizers cut text as theirs, not as this one
    ours = {name: getattr(processor, name) for name in ("num_slots", "prompt_template", "max_prompt_length")}
    again = SegCompassProcessor(encoder_image_processor=processor.encoder_image_processor, **ours, **read)
    for image in IMAGES:
        inputs, expected = again(images=image, text="it"), processor(images=image, text="it")
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@column("forward")
def test_forward_gives_masks(family, parts):
    model, processor = parts
    with torch.no_grad():
        outputs = model(**processor(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2))
    assert outputs.pred_masks.shape == (2, 3, 32, 32) and outputs.pred_masks.isfinite().all()
    assert outputs.slot_mask.all() and outputs.loss.isfinite()


@column("backward")
def test_every_learning_weight_gets_a_finite_gradient(family, parts):
    model, processor = parts
    model.zero_grad()
    freeze(model, train_below_sae_layer=True, train_vision_tower=False)
    outputs = model.train()(**processor(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2))
    (outputs.loss + outputs.pred_masks.mean() + outputs.pred_logits.mean()).backward()
    model.eval()
    block = model.backbone.blocks(model.mllm)[0]
    gradients = [weight.grad for weight in block.parameters() if weight.requires_grad]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())
    model.zero_grad()


@column("backward")
def test_logits_of_the_responses_alone_give_the_same_loss_and_gradients(family, parts):
    model, processor = parts
    inputs = processor(images=IMAGES, text=TEXTS, response=[RESPONSE, f"<think>{RESPONSE[7:]}"])
    inputs = {name: v for name, v in inputs.items() if name not in ("encoder_pixel_values", "reshaped_input_sizes")}
    learning = list(model.backbone.blocks(model.mllm)[-1].parameters()) + [model.get_output_embeddings().weight]
    labels = inputs["labels"]
    kept = response_logits(model.mllm, labels)
    assert (labels[:, -kept + 1] != -100).any() and 0 < kept < labels.shape[1]  # this family can leave the prompt out
    whole, some = model(**inputs), model(**inputs, logits_to_keep=kept)
    assert some.logits.shape[1] == kept and some.loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)
    expected, found = (torch.autograd.grad(out.loss, learning, allow_unused=True) for out in (whole, some))
    largest = max(gradient.abs().max() for gradient in expected if gradient is not None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5 * float(largest), rtol=1e-4)
    with pytest.raises(ValueError, match=f"has a label at token {labels.shape[1] - kept + 1}, which none"):
        model(**inputs, logits_to_keep=kept - 1)


@column("segment = forward")
def test_segment_is_the_forward_pass_over_what_it_wrote(family, parts):
    model, processor = parts
    prompts = processor(images=IMAGES, text=TEXTS)
    script = Script(processor.tokenizer, [RESPONSE] * 2)
    written = model.segment(**prompts, logits_processor=[script], max_new_tokens=40)
    with torch.no_grad():
        read = model(**processor(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2))
    assert written.slot_mask.all()
    for name in ("pred_masks", "pred_logits", "heatmaps"):
        ours, theirs = getattr(written, name), getattr(read, name)
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max(), name  # float32, sums in another order


@column("batch = single")
def test_a_sample_is_the_same_alone_and_in_a_batch(family, parts):
    model, processor = parts
    with torch.no_grad():
        both = model(**processor(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2))
        for place in (0, 1):
            one = model(**processor(images=IMAGES[place], text=TEXTS[place], response=RESPONSE))
            gap = (both.pred_masks[place] - one.pred_masks[0]).abs().max()
            assert gap <= 1e-3 * one.pred_masks.abs().max()
            assert torch.equal(both.patch_boxes[place, : one.patch_boxes.shape[1]], one.patch_boxes[0])


@column("batch = single")
def test_questions_about_one_image_are_answered_together_as_alone(family, parts):
    """Where the family allows it they read the image once (`shared_prompts.py`)."""
    model, processor = parts
    asked = [(0, "it"), (1, "it"), (0, "the red one"), (0, "which of them stands beside it?"), (1, "a")]
    limits = dict(max_new_tokens=6, min_new_tokens=6)
    passes = []
    hook = model.backbone.blocks(model.mllm)[0].register_forward_hook(lambda m, a, out: passes.append(len(out)))
    inputs = processor(images=[IMAGES[image] for image, _ in asked], text=[text for _, text in asked])
    sequences, states = model.reason(**inputs, **limits)
    hook.remove()
    assert passes == ([2] if family not in READ_WHOLE else []) + [5] * 6
    for row, (image, text) in enumerate(asked):
        alone_ids, alone = model.reason(**processor(images=IMAGES[image], text=text), **limits)
        assert torch.equal(sequences[row, -6:], alone_ids[0, -6:])
        ours = states.rows([row]).trimmed()
        for name in ("z", "last_hidden"):
            one = getattr(alone, name)
            assert (getattr(ours, name) - one).abs().max() <= 1e-3 * one.abs().max(), name


@column("save/load")
def test_saved_parts_give_the_same_masks(family, parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reloaded = SegCompassModel.from_pretrained(tmp_path), SegCompassProcessor.from_pretrained(tmp_path)
    inputs = processor(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2)
    same = reloaded(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2)
    assert set(inputs) == set(same) and all(torch.equal(inputs[name], same[name]) for name in inputs)
    with torch.no_grad():
        ours, theirs = model(**inputs).pred_masks, again(**same).pred_masks
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()  # the same numbers, at other places in memory


@column("LoRA step")
def test_a_step_with_adapters_moves_them_alone(family, parts):
    _, processor = parts
    model, _ = tiny_family(family)
    layers = [m for block in model.backbone.blocks(model.mllm) for m in block.modules()]
    adapted = get_peft_model(model, lora_config(model, r=2))
    hit = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert 0 < len(hit) <= len(linear)
    optimizer = torch.optim.SGD([w for w in adapted.parameters() if w.requires_grad], lr=1.0)
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    inputs = processor(images=IMAGES, text=TEXTS, response=[RESPONSE] * 2)
    outputs = adapted.train()(**inputs)
    (outputs.loss + outputs.pred_masks.mean()).backward()
    optimizer.step()
    moved = {name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_B" in name for name in moved)
    kept = ("lora_", "modules_to_save", "trainable_tokens")
    assert all(any(part in name for part in kept) for name in moved), sorted(moved)[:3]


@column("SFT step")
def test_a_step_of_the_cold_start_moves_what_learns(family, rows, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = tiny_family(family)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    options = dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2)
    options |= dict(report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1)
    trainer = SegCompassSFTTrainer(model, SegCompassSFTConfig(**options), processor, train_dataset=rows)
    assert math.isfinite(trainer.train().training_loss)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    blocks = {id(weight) for block in model.backbone.blocks(model.mllm)[2:] for weight in block.parameters()}
    assert any(id(weight) in blocks for name, weight in model.named_parameters() if name in moved)
    vision = tuple(f"mllm.{name}" for name in model.backbone.vision_names(model.mllm))
    assert not any(name.startswith(("sae", "image_encoder", *vision)) for name in moved), sorted(moved)[:3]


def test_columns_without_gradients_change_neither_masks_nor_gradients(family, rows):
    """Families whose blocks are of another kind are left as they are; those named take part."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = tiny_family(family)
    freeze(model.train())
    inputs = SegCompassCollator(processor, mask_side=4 * model.config.key_grid)(rows[:2])
    inputs = {name: value for name, value in inputs.items() if name != "mask_targets"}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    results = []
    for spared in (constant_prefix(model, inputs["input_ids"]), nullcontext(0)):
        with spared as columns:
            output = model(**inputs, use_cache=False)
        loss = output.loss + output.pred_masks.mean() + output.heatmaps.mean()
        results.append((columns, loss.detach(), torch.autograd.grad(loss, learning, allow_unused=True)))
    (columns, loss, ours), (_, whole_loss, whole) = results
    assert columns > 0 or family not in ("llava", "qwen2_5_vl", "internvl", "qwen3_vl")
    torch.testing.assert_close(loss, whole_loss, atol=1e-6, rtol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in whole if gradient is not None)
    for one, other in zip(ours, whole, strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # float32: sums of parts
            torch.testing.assert_close(one, other, atol=5e-6 * largest, rtol=1e-4)


@column("SAE step")
def test_the_sae_learns_from_the_models_states(family, parts, rows, tmp_path):
    model, processor = parts
    batch = SegCompassCollator(processor)(rows)
    states = ActivationDataset(model, [batch], model.config.sae_config.layer, batch_size=32, buffer_size=64)
    sae = SparseAutoencoder(model.config.sae_config)
    before = sae.W_dec.detach().clone()
    options = dict(max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True)
    args = SparseAutoencoderTrainerConfig(str(tmp_path), save_strategy="no", **options)
    assert math.isfinite(SparseAutoencoderTrainer(sae, args, train_dataset=states).train().training_loss)
    assert not torch.equal(sae.W_dec, before)


@column("GRPO step")
def test_a_joint_step_scores_its_own_responses_and_moves_the_policy(family, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = tiny_family(family)
    make_sure(model)
    texts = [RESPONSE, RESPONSE.replace("a b", "c"), "<think>no", f"x{RESPONSE}"]
    generate = model.generate

    def force(input_ids, **kwargs):
        script = Script(processor.tokenizer, texts * (len(input_ids) // 4))
        return generate(input_ids=input_ids, **{**kwargs, "logits_processor": [script]})

    model.generate = force
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    changes = dict(max_steps=1, gradient_accumulation_steps=1, max_completion_length=48)
    trainer = SegCompassGRPOTrainer(
        model, args=settings(tmp_path, **changes), train_dataset=scenes(4), processing_class=processor
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert math.isfinite(losses[0]["loss"]) and losses[0]["rewards/mask_reward/mean"] >= 0
    ratio = losses[0].get("sampling/importance_sampling_ratio/mean", 1.0)
    assert ratio == pytest.approx(1, abs=1e-3)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(re.search(r"layers\.3\.", name) for name in moved)


@column("patches in place")
@pytest.mark.parametrize("size", [(40, 56), (120, 40)], ids="{0[0]}x{0[1]}".format)
def test_the_token_whose_pixels_changed_is_the_one_that_stands_there(family, parts, size):
    """Paint one patch after another. What changes at the decoder's input, with the vision tower's attention off, are
    the tokens whose boxes hold painted pixels; and what `explain` shows there are their boxes."""
    model, processor = parts
    image = coarse_noise(*size, seed=3)
    height, width = size
    boxes = processor.patch_boxes(image)[0]
    shown = has_area(boxes)
    places = shown.nonzero()[:, 0].tolist()
    places = places[:: max(1, len(places) // 10)]
    painted, edges = [image], []
    scale = np.array([width, height, width, height])
    for place in places:
        left, top, right, bottom = np.rint(boxes[place].numpy() * scale).astype(int).clip(0, scale)
        if right <= left or bottom <= top:
            continue  # a patch of padding
        pixels = np.array(image)
        pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
        painted.append(Image.fromarray(pixels))
        edges.append((place, left, top, right, bottom))
    assert len(edges) >= 3
    inputs = processor(images=painted, text=["it"] * len(painted))
    inputs.pop("patch_boxes")
    embedded = _embedded(model, inputs).detach()
    change = (embedded[1:] - embedded[:1]).norm(dim=-1).numpy()  # (n, P)
    corners = boxes.numpy() * scale
    area = np.maximum((corners[:, 2:] - corners[:, :2]).prod(1), 1e-9)
    for changed, (place, left, top, right, bottom) in zip(change, edges, strict=True):
        across = np.minimum(corners[:, 2], right) - np.maximum(corners[:, 0], left)
        down = np.minimum(corners[:, 3], bottom) - np.maximum(corners[:, 1], top)
        shared = np.where((across > 0) & (down > 0), across * down, 0)
        covered = shared / np.minimum(
            area, (right - left) * (bottom - top)
        )  # of the smaller: a picture of all has large patches
        assert changed[place] > 0.2 * changed.max(), f"token {place}"
        most = int(changed.argmax())
        assert covered[most] > 0.2, f"painted token {place}, changed most: {most}"
        strong = changed > 0.5 * changed.max()
        reach = 1.0 * max((corners[place, 2:] - corners[place, :2]).max(), 1)  # resizing mixes neighbours
        assert ((across > -reach) & (down > -reach))[strong].all(), f"token {place} changed tokens far away"
        assert not changed[~shown.numpy()].any(), "a token that shows nothing changed"

    with torch.no_grad():
        outputs = model(**processor(images=image, text="it", response=RESPONSE))
    explanation = model.explain(outputs, slot=0, processor=processor)
    assert np.allclose(explanation.patch_boxes, boxes[shown].numpy())
    hits = [hit for concept in explanation.concepts for hit in concept.patches]
    assert hits and all(hit.box == tuple(explanation.patch_boxes[hit.number].tolist()) for hit in hits)


def test_inputs_that_trl_would_lose_are_refused():
    processor = tiny_processor("llava")
    make = processor.image_processor.preprocess
    processor.image_processor.preprocess = (
        lambda *images, **options: {  # an input that the MLLM takes, and TRL does not
            **make(*images, **options),
            "position_ids": [[1]],
        }
    )
    with pytest.raises(
        ValueError, match="need position_ids, which TRL does not hand on from the rollout; train it with"
    ):
        check_carried_inputs(processor)


def test_every_family_of_the_table_is_built_here():
    assert len(TINY_FAMILIES) >= 16
