"""No training goes on from a loss that is no number, and none stops where fp16's gradient scaler leaves a step out."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState

from segcompass.loaders.image_text import image_text
from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.manifest import listed
from segcompass.trainers import (
    SegCompassGRPOConfig,
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainerConfig,
)
from segcompass.trainers.adapter_base import trained_on, weights_of
from segcompass.trainers.collator import ImageTextCollator, SegCompassCollator
from segcompass.trainers.policy import lora_config
from segcompass.trainers.sae_quality import evaluate_sae
from tests.support.grpo import make_trainer, scenes
from tests.support.tiny import tiny_segcompass

LANGUAGE = {"lambda_s": 0.0, "lambda_c": 0.0}
"""Without masks nothing but the loss itself is looked at."""


def cold_start(folder, num_slots=3, **settings):
    model, processor = tiny_segcompass("llava", num_slots=num_slots)
    rows = scenes(8).map(lambda row: {"reasoning": "a box"})
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    args = SegCompassSFTConfig(str(folder), per_device_train_batch_size=2, **{**quiet, **settings})
    return SegCompassSFTTrainer(model, args, processor, train_dataset=rows)


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_cold_start_of_language_alone_stops_at_a_loss_that_is_no_number(tmp_path):
    trainer = cold_start(tmp_path, max_steps=2, **LANGUAGE)
    trainer.model.get_output_embeddings().weight.data[5, 0] = float("nan")
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"the loss is not finite \(loss=nan, language=nan\).*nothing was learned"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_joint_training_stops_at_a_loss_that_is_no_number(tmp_path):
    trainer = make_trainer(tmp_path, training_mode="rl", beta=0.0)
    trainer.core.get_output_embeddings().weight.data[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is not finite \(grpo_loss=nan\)"):
        trainer.train()


def test_the_autoencoder_stops_at_a_loss_that_is_no_number(tmp_path):
    class Data(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))

    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, layer=1))
    args = SparseAutoencoderTrainerConfig(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = SparseAutoencoderTrainer(sae, args, train_dataset=Data())
    start = trainer._start

    def diverged():
        start()
        sae.W_dec.data[3] = 1e30  # its square is no float32

    trainer._start = diverged
    with pytest.raises(ValueError, match=r"the loss is not finite \(mse=(inf|nan)"):
        trainer.train()


def test_fp16s_gradient_scaler_leaves_steps_out_and_training_goes_on(tmp_path, monkeypatch):
    """A real gradient scaler under float16 autocast, its scale far too large at first, as it is after each growth."""
    trainer = cold_start(tmp_path, max_steps=12, learning_rate=1e-3, max_grad_norm=1.0)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")  # accelerate wants a GPU for it
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    seen, step = [], trainer.training_step

    def watched(*args, **kwargs):
        seen.append(weights(trainer))
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(seen, [*seen[1:], weights(trainer)], strict=True)
    ]
    assert moved[0] is False and moved[-1] is True, moved
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (22 - moved.count(False))
    assert all(value.isfinite().all() for value in weights(trainer).values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and all(float(loss) > 0 for loss in losses)


@pytest.mark.parametrize("config", [SegCompassSFTConfig, SegCompassGRPOConfig, SparseAutoencoderTrainerConfig])
def test_float16_without_a_gradient_scaler_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="fp16=True needs a GPU's gradient scaler"):
        config(str(tmp_path), fp16=True, bf16=False, use_cpu=True, report_to=[])


@pytest.mark.parametrize("config", [SegCompassSFTConfig, SegCompassGRPOConfig, SparseAutoencoderTrainerConfig])
def test_pushing_during_training_is_refused(config, tmp_path):
    quiet = {"use_cpu": True, "report_to": []} | ({"bf16": False} if config is SegCompassGRPOConfig else {})
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' uploads.*set hub_strategy='end'"):
            config(str(tmp_path), push_to_hub=True, hub_strategy=strategy, **quiet)
    assert config(str(tmp_path), push_to_hub=True, hub_strategy="end", **quiet).push_to_hub


def test_weights_of_half_precision_are_refused_by_every_trainer(tmp_path):
    """AdamW's small steps would be rounded away: the loss would stand still without a word."""
    model, processor = tiny_segcompass("llava")
    args = SegCompassSFTConfig(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="is trained in torch.bfloat16, which rounds AdamW's small steps away"):
        SegCompassSFTTrainer(model.to(torch.bfloat16), args, processor, train_dataset=scenes(4))
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, layer=1)).half()
    args = SparseAutoencoderTrainerConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="is trained in torch.float16"):
        SparseAutoencoderTrainer(sae, args)


def test_an_autoencoder_is_not_judged_by_what_is_no_number():
    z = torch.randn(9, 8)
    z[4, 2] = float("inf")
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, layer=1))
    with pytest.raises(ValueError, match="batch 1 of the hidden states: 1 of 9 tokens have NaN or infinite"):
        evaluate_sae(sae, [torch.randn(9, 8), z])


@pytest.mark.parametrize("token", ["</s>", "<image>", "<pad>", "<|im_end|>"])
def test_control_tokens_in_a_response_are_refused(token):
    """They would become real ones: an end in the middle, an image without pixels."""
    processor = tiny_segcompass("llava")[1]
    row = {**scenes(1)[0], "reasoning": f"a box{token} on the left"}
    with pytest.raises(ValueError, match=f"row 'sample-0': the response holds {re.escape(repr(token))}"):
        SegCompassCollator(processor, mask_side=32)([row])
    with pytest.raises(ValueError, match="the end token is added by itself"):
        processor(images=row["image"], text="it", response=f"<think>a box</think><REF_POS>{token}")
    skipped = ImageTextCollator(processor, image_text)([row])["skipped"]
    assert dict(skipped) == {"no image or usable text": 1}


def test_the_cold_start_refuses_the_processor_of_another_model(tmp_path):
    """Its concentration token has another id: masks would be trained on nothing."""
    model, processor = tiny_segcompass("llava")
    model.config.ref_token_id += 1
    args = SegCompassSFTConfig(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="id of <REF_POS> is .* load both from one folder"):
        SegCompassSFTTrainer(model, args, processor, train_dataset=scenes(4))


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    """torch's own words, a page of tensors, said neither which folder nor what to do."""
    cold_start(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"checkpoint-1 is of a model of another shape.*another output_dir"):
        cold_start(tmp_path, num_slots=2, max_steps=2).train(str(tmp_path / "checkpoint-1"))


def test_repeating_a_finished_training_says_that_it_makes_no_step(tmp_path, caplog):
    cold_start(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert "is finished" not in caplog.text
    again = cold_start(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=1.0)
    again.train(str(tmp_path / "checkpoint-1"))
    assert "is finished (1 steps), so no step is made, and options that are others now" in caplog.text
    cold_start(tmp_path, max_steps=2, save_strategy="no").train(str(tmp_path / "checkpoint-1"))
    assert caplog.text.count("is finished") == 1


def test_a_checkpoint_notes_what_its_adapters_were_trained_on(tmp_path):
    model, processor = tiny_segcompass("llava")
    model.save_pretrained(tmp_path / "base")
    model = SegCompassModel.from_pretrained(tmp_path / "base")
    rows = scenes(8).map(lambda row: {"reasoning": "a box"})
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "save_steps": 1}
    args = SegCompassSFTConfig(str(tmp_path / "run"), per_device_train_batch_size=2, **quiet)
    trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=rows, peft_config=lora_config(model, r=2))
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert trained_on(folder) == (str(tmp_path / "base"), weights_of(tmp_path / "base"))
        assert "base_model.json" in listed(folder)
