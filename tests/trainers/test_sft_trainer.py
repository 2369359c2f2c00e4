"""The cold start and the SAE on tiny real LLaVA and Qwen2.5-VL models, then save, load, segment."""

import math

import pytest
import torch

from segcompass.loaders import load_scenes
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder
from segcompass.trainers import (
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainerConfig,
)
from segcompass.trainers.activations import ActivationDataset
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.policy import lora_config
from tests.support.tiny import BACKBONES, tiny_segcompass


@pytest.fixture(scope="module")
def rows():
    return list(load_scenes("train", seed=5, num_samples=8, size=64, streaming=True))


def train(model, processor, rows, folder, trainer_kwargs=None, **settings):
    defaults = dict(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    args = SegCompassSFTConfig(**{**defaults, **settings})
    trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=rows, **(trainer_kwargs or {}))
    trainer.train()
    return trainer


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(model, before, prefix):
    return any(
        not torch.equal(value, before[name]) for name, value in model.named_parameters() if name.startswith(prefix)
    )


MODULES = ("query_codebook", "slot_mapper", "mask_decoder")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_supervised_steps_move_what_learns_and_nothing_else_then_the_model_saves_loads_and_segments(
    backbone, rows, tmp_path
):
    model, processor = tiny_segcompass(backbone)
    before = snapshot(model)
    trainer = train(model, processor, rows, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(float(loss)) for loss in losses)
    layers = "mllm.model.language_model.layers"
    for part in (*MODULES, f"{layers}.2", f"{layers}.3", "mllm.lm_head", "mllm.model.language_model.embed_tokens"):
        assert moved(model, before, part), part
    vision = "mllm.model.vision_tower" if backbone == "llava" else "mllm.model.visual"
    for part in ("sae", "image_encoder", "image_positions", vision, f"{layers}.0", f"{layers}.1"):
        assert not moved(model, before, part), part

    trainer.save_model()
    loaded = SegCompassModel.from_pretrained(tmp_path)
    reloaded = SegCompassProcessor.from_pretrained(tmp_path)
    inputs = reloaded(images=rows[0]["image"], text=rows[0]["instruction"])
    outputs, expected = loaded.segment(**inputs, max_new_tokens=5), model.eval().segment(**inputs, max_new_tokens=5)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert torch.allclose(outputs.pred_masks, expected.pred_masks, atol=1e-5)


def test_below_the_sae_only_the_concentration_tokens_rows_learn(rows, tmp_path):
    model, processor = tiny_segcompass("llava")
    before = snapshot(model)["mllm.model.language_model.embed_tokens.weight"]
    train(model, processor, rows, tmp_path, weight_decay=0.0)
    changed = (model.get_input_embeddings().weight != before).any(1).nonzero()[:, 0].tolist()
    assert set(changed) <= {processor.ref_token_id, processor.think_end_id} and processor.ref_token_id in changed


def test_everything_learns_when_the_recipe_says_so(rows, tmp_path):
    model, processor = tiny_segcompass("llava")
    before = snapshot(model)
    train(
        model, processor, rows, tmp_path, train_below_sae_layer=True, train_vision_tower=True, train_image_encoder=True
    )
    for part in ("mllm.model.vision_tower", "image_encoder", "mllm.model.language_model.layers.0", *MODULES):
        assert moved(model, before, part), part
    assert not moved(model, before, "sae")


def test_segmentation_modules_have_their_own_rate(rows, tmp_path):
    model, processor = tiny_segcompass("llava")
    factors = {"query_codebook": 5.0, "slot_mapper": 3.0, "mask_decoder": 2.0}
    multipliers = {f"{part}_lr_multiplier": factor for part, factor in factors.items()}
    arguments = SegCompassSFTConfig(
        output_dir=str(tmp_path), learning_rate=1e-4, use_cpu=True, report_to="none", **multipliers
    )
    optimizer = SegCompassSFTTrainer(model, arguments, processor, train_dataset=rows).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = 1e-4 * factors.get(name.split(".")[0], 1.0)
            assert rates.pop(id(parameter)) == pytest.approx(expected), name
    assert not rates


def test_language_alone_makes_no_mask_computation(rows, tmp_path, monkeypatch):
    model, processor = tiny_segcompass("llava")
    before = snapshot(model)
    monkeypatch.setattr(type(model), "decode_masks", lambda *args, **kwargs: pytest.fail("masks were decoded"))
    train(model, processor, rows, tmp_path, lambda_s=0.0, lambda_c=0.0)
    assert not any(moved(model, before, part) for part in MODULES)
    assert moved(model, before, "mllm.model.language_model.layers.3")


def test_supervised_loss_falls_on_a_few_samples(rows, tmp_path):
    model, processor = tiny_segcompass("llava")
    history = train(model, processor, rows, tmp_path, max_steps=25).state.log_history
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_token_dropout_hides_the_tokens_in_training_only():
    model, processor = tiny_segcompass("llava", token_dropout=1.0)
    row = next(iter(load_scenes("train", seed=5, num_samples=1, size=64, streaming=True)))
    inputs = SegCompassCollator(processor, 4 * model.config.key_grid)([row])
    inputs.pop("mask_targets")
    hidden = model.train()(**inputs).heatmaps
    with torch.no_grad():
        assert torch.allclose(hidden, model(**inputs, query_source="concepts").heatmaps, atol=1e-6)
        assert torch.allclose(model.eval()(**inputs).heatmaps, model.train()(**inputs).heatmaps, atol=1e-6)
    assert not torch.allclose(hidden, model.eval()(**inputs).heatmaps, atol=1e-4)


def test_grounded_read_out_trains_with_the_same_terms(rows, tmp_path):
    model, processor = tiny_segcompass("llava", concept_reading="grounded")
    before = snapshot(model)
    trainer = train(model, processor, rows, tmp_path, num_erased_concepts=3, lambda_e=1.0, max_steps=4)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(math.isfinite(entry["loss"]) for entry in logged)
    # nothing is erased while all concepts share a slot
    assert ["seg/still_there" in entry for entry in logged] == [False, False, True, True]
    for part in (
        "grounded_reading.slot_queries",
        "grounded_reading.upsampling",
        "grounded_reading.gain",
        "mask_decoder",
    ):
        assert moved(model, before, part), part
    assert torch.equal(model.grounded_reading.spread, torch.ones(128))  # measured, not learned


@pytest.mark.parametrize("case", ["plain", "adapters", "accumulated epochs", "a trained read-out"])
def test_every_concept_shares_a_new_grounded_slot_in_the_first_half_of_the_steps_alone(rows, tmp_path, case):
    model, processor = tiny_segcompass("llava", concept_reading="grounded")
    chosen, decode = [], type(model).decode_masks

    def counted(core, *args, **kwargs):
        outputs = decode(core, *args, **kwargs)
        chosen.append((core.training and torch.is_grad_enabled(), (outputs.concept_weights > 0).sum(-1).max().item()))
        return outputs

    more, settings = {"eval_dataset": rows}, dict(max_steps=4, eval_strategy="steps", eval_steps=1, eval_masks=True)
    if case == "adapters":
        more["peft_config"] = lora_config(model, r=2)
    elif case == "accumulated epochs":  # 8 rows, 4 a step of two halves
        settings |= dict(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    elif case == "a trained read-out":
        train(model, processor, rows, tmp_path / "before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "decode_masks", counted)
        train(model, processor, rows, tmp_path, more, **settings)
    trained, half = [count for training, count in chosen if training], 4 if case == "accumulated epochs" else 2
    assert len(trained) == 2 * half and max(trained[half:]) <= 5  # three looks and two places
    assert max(trained[:half]) <= 5 if case == "a trained read-out" else min(trained[:half]) > 5
    held_out = [count for training, count in chosen if not training]
    assert held_out and max(held_out) <= 5


@pytest.mark.parametrize(
    "setting",
    [
        {"token_dropout": 0.3},
        {"query_source": "tokens"},
        {"query_codebook_lr_multiplier": 5},
        {"slot_mapper_lr_multiplier": 5},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_only_attention_has_is_refused_for_a_grounded_model(rows, tmp_path, setting):
    model, processor = tiny_segcompass("llava", concept_reading="grounded")
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* is for the attention read-out"):
        train(model, processor, rows, tmp_path, **setting)


def test_rows_without_reasoning_and_another_number_of_slots_are_refused(rows, tmp_path):
    model, processor = tiny_segcompass("llava")
    with pytest.raises(ValueError, match="no reasoning"):
        train(model, processor, [{**rows[0], "reasoning": None}] * 4, tmp_path)
    processor.num_slots = 5
    with pytest.raises(ValueError, match="5 concentration tokens"):
        train(model, processor, rows, tmp_path)


def test_erasure_is_trained_and_logged(rows, tmp_path):
    model, processor = tiny_segcompass("llava")
    before = snapshot(model)
    trainer = train(model, processor, rows, tmp_path, num_erased_concepts=3, lambda_e=1.0)
    plain, same = tiny_segcompass("llava")
    without = train(plain, same, rows, tmp_path / "plain")
    entries = [[entry for entry in t.state.log_history if "loss" in entry] for t in (trainer, without)]
    assert "seg/still_there" in entries[0][0] and "seg/still_there" not in entries[1][0]
    assert entries[0][0]["loss"] > entries[1][0]["loss"], "the erasure loss is added"
    assert moved(model, before, "query_codebook")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sae_trains_on_the_models_own_states_and_goes_back_into_the_model(backbone, rows, tmp_path):
    model, processor = tiny_segcompass(backbone)
    collate = SegCompassCollator(processor)
    batches = [collate(rows[start : start + 4]) for start in (0, 4)]
    states = ActivationDataset(model, batches, model.config.sae_config.layer, batch_size=64, buffer_size=256)
    sae = SparseAutoencoder(model.config.sae_config)
    before = sae.W_dec.detach().clone()
    args = SparseAutoencoderTrainerConfig(
        str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = SparseAutoencoderTrainer(sae, args, train_dataset=states)
    assert math.isfinite(trainer.train().training_loss)
    assert not torch.equal(sae.W_dec, before)
    trainer.save_model()

    model.load_sae(str(tmp_path))
    assert torch.equal(model.sae.W_dec, sae.W_dec)
    assert not any(parameter.requires_grad for parameter in model.sae.parameters())
    batches[0].pop("labels")
    images = processor.encoder_inputs([row["image"] for row in rows[:4]])
    assert model(**batches[0], **images).concept_weights.sum(-1).allclose(torch.ones(4, 3), atol=1e-5)
