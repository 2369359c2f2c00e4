"""The blocks below the SAE's layer without gradients where nothing learns: same losses, same gradients, less kept."""

import contextlib

import pytest
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from segcompass.trainers import joint_forward
from segcompass.trainers.constant_prefix import constant_prefix
from segcompass.trainers.policy import freeze
from segcompass.trainers.sft_trainer import SegCompassSFTConfig, SegCompassSFTTrainer
from tests.support.grpo import make_trainer, rollout, scenes
from tests.support.tiny import BACKBONES, tiny_segcompass

from .test_grpo_trainer import half


def batch_of(processor, words=("it", "a red box")):
    """Two rows of different lengths: prompts padded on the left, responses on the right."""
    rows = scenes(2)
    texts = [processor.format_response(word) for word in words]
    return processor(images=list(rows["image"]), text=list(rows["instruction"]), response=texts)


def gradients(loss, model):
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss, learning, allow_unused=True)


def assert_same(ours, whole):
    largest = max(gradient.abs().max() for gradient in whole if gradient is not None)
    assert largest > 0
    for one, other in zip(ours, whole, strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # float32: sums of parts
            torch.testing.assert_close(one, other, atol=2e-6 * float(largest), rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_joint_step_has_the_loss_and_gradients_of_the_whole_pass(tmp_path, monkeypatch, backbone, checkpointing):
    trainer = make_trainer(tmp_path, backbone, beta=0.2)
    batch, core = half(rollout(trainer)), trainer.core
    if checkpointing:
        core.gradient_checkpointing_enable()
    blocks = core.backbone.blocks(core.mllm)
    seen, kept = [], []
    blocks[0].mlp.register_forward_hook(lambda _, args, output: seen.append((output.shape[1], output.requires_grad)))

    def count(tensor):
        kept.append(tensor.numel())
        return tensor

    def step():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = trainer._compute_loss(core, batch)
        saved = sum(kept)
        return loss, gradients(loss, core), saved

    loss, ours, saved = step()
    (columns, without), (rest, with_gradients) = seen[:2]
    assert not without and with_gradients and columns > 3 * rest > 0
    assert "forward" not in vars(blocks[0])
    monkeypatch.setattr(joint_forward, "constant_prefix", lambda *args: contextlib.nullcontext())
    loss_of_whole, whole, saved_of_whole = step()
    assert loss.item() == pytest.approx(loss_of_whole.item(), abs=1e-6)
    assert_same(ours, whole)
    assert saved < (1.01 if checkpointing else 0.9) * saved_of_whole


def test_the_cold_start_has_the_loss_and_gradients_of_the_whole_pass(tmp_path, monkeypatch):
    model, processor = tiny_segcompass("llava", num_slots=3)
    args = SegCompassSFTConfig(str(tmp_path), use_cpu=True, report_to=[], num_erased_concepts=2)
    rows = scenes(4).map(lambda row: {"reasoning": "a box"})
    trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=rows)
    seen = []
    blocks = model.backbone.blocks(model.mllm)
    blocks[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output.requires_grad))
    inputs = trainer._prepare_inputs(trainer.data_collator([rows[0], rows[1]]))
    loss = trainer.compute_loss(model.train(), dict(inputs))
    assert seen == [False, True]
    ours = gradients(loss, model)
    monkeypatch.setattr("segcompass.trainers.sft_trainer.constant_prefix", lambda *args: contextlib.nullcontext())
    whole = trainer.compute_loss(model, dict(inputs))
    assert loss.item() == pytest.approx(whole.item(), abs=1e-6) and seen[2:] == [True]
    assert_same(ours, gradients(whole, model))


def test_only_columns_before_the_first_learned_token_of_any_row_are_constant():
    model, processor = tiny_segcompass("llava", num_slots=3)
    freeze(model.train())
    inputs = batch_of(processor)
    ids = inputs["input_ids"]
    learned = (ids == model.config.think_end_id) | (ids == model.config.ref_token_id)
    first = int(learned.any(0).nonzero()[0])
    with constant_prefix(model, ids) as columns:
        assert columns == first > 10
    for token in (model.config.think_end_id, model.config.ref_token_id):
        early = ids.clone()
        early[1, 4] = token
        with constant_prefix(
            model, early
        ) as columns:  # before its image, which may attend to itself in both directions
            assert columns == 0
        early = ids.clone()
        early[1, first - 3] = token
        with constant_prefix(model, early) as columns:
            assert columns == first - 3
    unwritten = ids.masked_fill(learned, processor.think_id)
    with constant_prefix(model, unwritten) as columns:  # the embeddings stay a part of the pass
        assert columns == ids.shape[1] - 1


def test_where_states_are_not_constant_nothing_changes():
    model, processor = tiny_segcompass("llava", num_slots=3)
    ids = batch_of(processor)["input_ids"]
    blocks = model.backbone.blocks(model.mllm)

    def columns():
        with constant_prefix(model, ids) as found:
            return found

    model.train()
    assert columns() == 0  # nothing was frozen
    freeze(model)
    assert columns() > 0
    with torch.no_grad():
        assert columns() == 0
    freeze(model, train_below_sae_layer=True)
    assert columns() == 0
    freeze(model, train_vision_tower=True)
    assert columns() == 0
    freeze(model)
    blocks[1].mlp.gate_proj.weight.requires_grad_(True)
    assert columns() == 0
    blocks[1].mlp.gate_proj.weight.requires_grad_(False)
    blocks[0].self_attn.attention_dropout = 0.1
    assert columns() == 0
    blocks[0].self_attn.attention_dropout = 0.0
    blocks[0].mlp.router = nn.Linear(2, 2).requires_grad_(False)
    assert columns() == 0
    del blocks[0].mlp.router
    model.config.output_attentions = True
    assert columns() == 0
    model.config.output_attentions = False
    assert columns() > 0
    model.mllm.set_attn_implementation({"text_config": "flex_attention"})
    assert columns() == 0


def test_attention_may_look_at_images_in_both_directions_and_at_padding_not_at_all():
    """The mask that a block is given is cut, whatever it says; a missing one is causal."""
    model, processor = tiny_segcompass("llava", num_slots=3)
    freeze(model.train())
    inputs = batch_of(processor)
    ids, block = inputs["input_ids"], model.backbone.blocks(model.mllm)[0]
    decoder = model.backbone.language_model(model.mllm)
    hidden = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(ids.shape[1])[None]
    angles = decoder.rotary_emb(hidden, position_ids=places)
    causal = create_causal_mask(decoder.config, hidden, inputs["attention_mask"], None, places)
    image = ids == model.config.image_token_id
    both = causal | (image[:, None, :, None] & image[:, None, None])
    for mask in (causal, both, None):
        given = dict(attention_mask=mask, position_embeddings=angles, position_ids=places)
        whole = block(hidden, **given)
        with constant_prefix(model, ids) as columns:
            parts = block(hidden.clone().requires_grad_(), **given)
        assert columns > 0 and parts.requires_grad
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert not torch.equal(block(hidden, **{**given, "attention_mask": both}), block(hidden, **given))
