"""What joint training does beyond one plain step: trimming, modes, exact resume, the sampler's weights, logs."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from segcompass.modeling_segcompass import SegCompassModel
from segcompass.trainers import checks, grpo_trainer
from segcompass.trainers.checks import check_rollout_policy
from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
from segcompass.trainers.joint_forward import JointForward
from segcompass.trainers.policy import lora_config
from segcompass.trainers.vllm_policy import PolicyEngine, export_policy, policy_engine
from tests.support.grpo import SLOTS, make_trainer, rollout, scenes, script_responses, settings, weights
from tests.support.tiny import BACKBONES, tiny_segcompass

SEGMENTATION = ("query_codebook", "slot_mapper", "mask_decoder")


def micro_batch(trainer, number=0):
    """One micro-batch of a rollout, sliced as TRL slices."""
    batch = split_tensor_dict(split_pixel_values_by_grid(rollout(trainer)), 2)[number]
    return unsplit_pixel_values_by_grid(batch)


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_of_every_row_is_left_out_and_changes_nothing(tmp_path, backbone):
    trainer = make_trainer(tmp_path, backbone, beta=0.2)
    batch = micro_batch(trainer)
    wide = dict(batch)
    for name, pads in {
        "prompt_ids": (5, 0),
        "prompt_mask": (5, 0),
        "completion_ids": (0, 7),
        "completion_mask": (0, 7),
        "ref_per_token_logps": (0, 7),
        "mm_token_type_ids": (5, 7),
    }.items():
        if name in batch:
            wide[name] = torch.nn.functional.pad(batch[name], pads)
    lengths = []
    trainer.core.mllm.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["attention_mask"]), with_kwargs=True
    )
    learning = [p for p in trainer.core.parameters() if p.requires_grad]
    results = []
    for inputs in (batch, wide):
        loss = trainer._compute_loss(trainer.core, inputs)
        results.append((loss.item(), torch.autograd.grad(loss, learning, allow_unused=True)))
    (loss, gradients), (wide_loss, wide_gradients) = results
    assert wide_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, wide_gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert lengths[0].shape == lengths[1].shape
    assert all(mask.any(0)[[0, -1]].all() for mask in lengths)


# -- whose policy ------------------------------------------------------------------------------------------------------


def test_the_policy_that_samples_is_the_policy_that_is_scored(tmp_path):
    """Tokens' log-probabilities, read out of generation after the weights have moved, are the loss's old ones."""
    trainer = make_trainer(
        tmp_path, scripted=False, beta=0.0, num_iterations=2, max_steps=2, max_completion_length=6, temperature=1.0
    )
    generate, sampled = trainer.model.generate, []

    def remember(*args, **kwargs):
        output = generate(*args, **kwargs, return_dict_in_generate=True, output_logits=True)
        new = output.sequences[:, -len(output.logits) :]
        logits = torch.stack(output.logits, 1).float()
        logits[..., trainer.core.config.image_token_id] = -torch.inf  # what generation suppresses, for both
        sampled.append((new, logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]))
        return output.sequences

    trainer.train()
    with torch.no_grad():
        for parameter in trainer.core.mllm.model.language_model.layers[-1].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.model.generate = remember
    batch = rollout(trainer)
    ((ids, expected),) = sampled
    mask = batch["completion_mask"].bool()
    old = batch["old_per_token_logps"]
    assert torch.equal(ids[:, : mask.shape[1]][mask], batch["completion_ids"][mask])
    # the loss's distribution gives the image token its tiny share, the sampler's does not: 1e-1 bounds what that costs
    assert (old - expected[:, : mask.shape[1]])[mask].abs().max() < 0.1
    assert (old - expected[:, : mask.shape[1]])[mask].abs().mean() < 0.05


def test_a_sampler_with_other_weights_is_refused():
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    batch = {"old_per_token_logps": old, "completion_mask": torch.tensor([[1, 1, 0]])}
    check_rollout_policy(batch)
    check_rollout_policy({**batch, "sampling_per_token_logps": old + 0.02})
    with pytest.raises(RuntimeError, match="differ from the trained policy's by 0.500 nats per token"):
        check_rollout_policy({**batch, "sampling_per_token_logps": old - 0.5})


HUB_NAMES = {  # our names -> the Hub checkpoints' (llava-1.5-7b-hf, Qwen2.5-VL-7B-Instruct)
    "llava": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}
KNOWN = {
    "llava": "language_model.model.layers.0.self_attn.q_proj.weight",
    "qwen2_5_vl": "model.layers.0.self_attn.q_proj.weight",
}


def engine_of(model):
    """A PolicyEngine without an engine: what it would send. PEFT's merging and naming are TRL's own."""
    engine = PolicyEngine.__new__(PolicyEngine)
    engine.model, engine.mode, engine.enable_sleep_mode = model, "colocate", False
    engine._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    return engine


def sent(model):
    return {name: value.detach().clone() for name, value in engine_of(model)._iter_named_params()}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_vllm_gets_every_weight_of_the_checkpoint_it_loaded_and_no_other(tmp_path, backbone, adapters):
    model, processor = tiny_segcompass(backbone, num_slots=SLOTS)
    export_policy(model, processor, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        hub = set(file.keys())
    tokens = [model.config.think_end_id, model.config.ref_token_id]
    if adapters:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
        delta = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
        delta.data.add_(1.0)
        head = next(p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name)
        head.data.add_(1.0)
    weights_sent = sent(model)
    renamed = set()
    for name in weights_sent:
        prefix = next((p for p in HUB_NAMES[backbone] if name.startswith(p)), "")
        renamed.add(HUB_NAMES[backbone].get(prefix, "") + name.removeprefix(prefix))
    assert renamed == hub and KNOWN[backbone] in hub
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in ("llava", "qwen2_5_vl")

    # what was sent, loaded into a bare MLLM, is the policy
    bare, _ = tiny_segcompass(backbone, num_slots=SLOTS, seed=1)
    bare.mllm.load_state_dict(weights_sent, strict=False)
    inputs = processor(images=Image.new("RGB", (30, 30), "red"), text="the box", image_encoder=False)
    core = model.get_base_model() if adapters else model
    with torch.no_grad():
        expected = core.eval().mllm(**inputs).logits
        logits = bare.mllm.eval()(**inputs).logits
        inputs["input_ids"][0, -1] = tokens[1]
        expected_ref = core.mllm(**inputs).logits
        logits_ref = bare.mllm(**inputs).logits
    assert torch.allclose(logits, expected, atol=1e-4) and torch.allclose(logits_ref, expected_ref, atol=1e-4)


def test_a_sync_that_leaves_weights_out_is_refused(monkeypatch):
    model, _ = tiny_segcompass("llava")
    engine = engine_of(model)
    plain = PolicyEngine.__mro__[1]._iter_named_params
    monkeypatch.setattr(
        PolicyEngine.__mro__[1], "_iter_named_params", lambda self: (p for p in plain(self) if "lm_head" not in p[0])
    )
    with pytest.raises(RuntimeError, match=r"differing: lm_head.weight"):
        list(engine._iter_named_params())


def test_the_engine_is_built_of_the_exported_policy(tmp_path):
    model, processor = tiny_segcompass("llava")
    args = settings(tmp_path)
    theirs = grpo_trainer.GRPOTrainer.__init__.__globals__
    before = theirs["VLLMGeneration"]
    args.vllm_mode = "colocate"
    with policy_engine(model, processor, args):
        assert theirs["VLLMGeneration"] is PolicyEngine
        assert model.name_or_path == str(tmp_path / "policy")
    assert theirs["VLLMGeneration"] is before and model.name_or_path != str(tmp_path / "policy")
    assert args.generation_kwargs["logit_bias"] == {model.config.image_token_id: -100.0}
    assert (tmp_path / "policy" / "config.json").exists() and (tmp_path / "policy" / "tokenizer.json").exists()


# -- modes and the supervised share -----------------------------------------------------------------------------------


def test_reinforcement_alone_leaves_the_segmentation_modules_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, training_mode="rl", beta=0.2, max_steps=1)
    before = weights(trainer.model)
    decoded = []
    decode = trainer.core.decode_masks
    trainer.core.decode_masks = lambda *a, **k: decoded.append(torch.is_grad_enabled()) or decode(*a, **k)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("mllm.") for name in moved)
    assert decoded and not any(decoded)  # masks are rewarded, and only rewarded
    entry = trainer.state.log_history[0]
    assert "seg/mask_dice" not in entry and entry["rewards/mask_reward/mean"] > 0


def test_supervision_alone_ignores_the_rewards(tmp_path):
    losses = []
    for mode in ("seg", "both"):
        trainer = make_trainer(tmp_path, training_mode=mode, beta=0.2)
        batch = micro_batch(trainer)
        trainer._metrics["train"].clear()
        losses.append(trainer._compute_loss(trainer.core, batch).item())
        parts = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        supervised = parts["seg/heatmap_bce"] + 0.6 * parts["seg/mask_dice"] + 0.2 * parts["seg/conf_bce"]
        assert losses[-1] == pytest.approx(supervised + parts["grpo_loss"] * (mode == "both"), rel=1e-4)
    gradient = [p for name, p in trainer.core.named_parameters() if name.startswith("slot_mapper")]
    assert torch.autograd.grad(trainer._compute_loss(trainer.core, batch), gradient)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_share_of_the_responses_can_be_supervised(tmp_path, backbone):
    trainer = make_trainer(tmp_path, backbone, supervised_fraction=0.5, beta=0.0)
    batch = micro_batch(trainer)
    outputs = {}
    for rows in (None, [1, 3]):
        forward = JointForward(trainer.core, batch, rows=rows)
        images = {n: batch[n] for n in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if n in batch}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : batch["prompt_ids"].shape[1]] = -100
        outputs[rows and len(rows)] = forward(
            input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **images
        )
    assert torch.allclose(outputs[2].pred_masks, outputs[None].pred_masks[[1, 3]], atol=1e-5)
    assert torch.allclose(outputs[2].log_probs, outputs[None].log_probs, atol=1e-5)


def test_the_responses_supervised_are_those_of_the_best_masks(tmp_path):
    losses = {}
    for fraction in (0.5, 0.01, 1.0):
        trainer = make_trainer(tmp_path, supervised_fraction=fraction, beta=0.0)
        batch = micro_batch(trainer)
        assert batch["mask_scores"].shape == (4,)
        batch["mask_scores"] = torch.tensor([0.1, 0.9, 0.8, 0.3])
        losses[fraction] = trainer._compute_loss(trainer.core, batch).item()
        rows = trainer._supervised_rows(batch["mask_scores"])
        assert rows == {0.5: [1, 2], 0.01: [1], 1.0: None}[fraction]
    assert np.isfinite(list(losses.values())).all() and len(set(losses.values())) == 3


def test_token_dropout_is_the_recipes_and_not_left_over_from_the_cold_start(tmp_path):
    for asked in ({}, {"token_dropout": 0.25}):
        trainer = make_trainer(tmp_path, model_config={"token_dropout": 1.0}, beta=0.0, **asked)
        assert trainer.core.config.token_dropout == asked.get("token_dropout", 0.0)


@pytest.mark.parametrize("setting", [{"token_dropout": 0.3}, {"slot_mapper_lr_multiplier": 5.0}], ids=str)
def test_what_only_attention_has_is_refused_for_a_grounded_model(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* is for the attention read-out"):
        make_trainer(tmp_path, model_config={"concept_reading": "grounded"}, beta=0.0, **setting)
    make_trainer(tmp_path, model_config={"concept_reading": "grounded"}, beta=0.0)


# -- exact resume ------------------------------------------------------------------------------------------------------


def brightness(completions, **kwargs):
    """A reward that random responses earn in different measure."""
    return [sum(map(ord, c[0]["content"])) % 97 / 97 for c in completions]


def resumable(folder, **changes):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    return SegCompassGRPOTrainer(
        model,
        reward_funcs=brightness,
        args=settings(
            folder,
            reward_weights=[0.3, 0.7, 1.0],
            max_completion_length=6,
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            num_iterations=2,
            max_steps=6,
            save_strategy="steps",
            save_steps=1,
            **changes,
        ),
        train_dataset=scenes(12),
        processing_class=processor,
    )


def test_a_run_resumes_exactly_within_a_rollout_and_at_its_end(tmp_path):
    """A rollout serves four steps: checkpoint 2 lies within the first, checkpoint 4 at its end."""
    whole = resumable(tmp_path)
    whole.train()
    timed = ("seconds/", "step_time", "train_", "total_flos", "epoch")
    for start in (2, 4):
        again = resumable(tmp_path, seed=42)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        expected = [entry for entry in whole.state.log_history if "loss" in entry and entry["step"] > start]
        got = [entry for entry in again.state.log_history if "loss" in entry and entry["step"] > start]
        assert len(expected) == len(got) == 6 - start
        for one, other in zip(expected, got, strict=True):
            for name, value in one.items():
                if not name.startswith(timed):
                    assert other[name] == value, (start, one["step"], name)
        final = weights(again.model)
        assert all(torch.equal(value, final[name]) for name, value in weights(whole.model).items())


def test_each_checkpoint_is_a_whole_segcompass_folder(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert torch.load(folder / "rollouts_0.pt", weights_only=True)["rollouts"] is None  # all of them were used
    model = SegCompassModel.from_pretrained(folder)
    assert model.config.num_slots == SLOTS and (tmp_path / "README.md").exists()  # the card lies with the run


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs_name_every_term_and_show_the_masks(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.2, max_steps=1, log_completions=True, report_to=["tensorboard"])
    trainer.train()
    entry = trainer.state.log_history[0]
    named = ["loss", "grpo_loss", "kl", "reward", "rewards/format_reward/mean", "rewards/mask_reward/mean"]
    named += ["format_share", "seg/slots_found", "seg/matched_iou", "sae/explained_variance", "clip_ratio/region_mean"]
    named += ["seg/heatmap_bce", "seg/mask_dice", "seg/conf_bce", "completions/mean_length"]
    named += [f"seconds/{phase}" for phase in ("images", "rollout", "scoring", "reference", "update")]
    missing = [name for name in named if not np.isfinite(entry.get(name, np.nan))]
    assert not missing
    assert entry["format_share"] == pytest.approx(3 / 4)
    phases = sum(value for name, value in entry.items() if name.startswith("seconds/"))
    assert phases == pytest.approx(entry["step_time"], rel=0.1)
    pictures = sorted((tmp_path / "completions").glob("overlay_00001_*.png"))
    assert len(pictures) == 4 and Image.open(pictures[0]).size in [(40, 40), (44, 30), (28, 44)]
    assert list((tmp_path / "completions").glob("*.parquet"))


# -- errors before the first step --------------------------------------------------------------------------------------


def trainer_on(tmp_path, rows, dtype=torch.float32, **changes):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    script_responses(model, processor)
    return SegCompassGRPOTrainer(
        model.to(dtype), args=settings(tmp_path, **changes), train_dataset=rows, processing_class=processor
    )


def test_rows_whose_masks_cannot_serve_are_refused(tmp_path):
    rows = scenes(8)
    with pytest.raises(ValueError, match="'sample-2' has masks=None"):
        masks = rows["masks"][:2] + [None] + rows["masks"][3:]
        trainer_on(tmp_path, rows.remove_columns("masks").add_column("masks", masks))
    with pytest.raises(ValueError, match=r"a mask of sample 'sample-1' is \[30, 44\] .* its image is \[30, 45\]"):
        trainer_on(tmp_path, rows.remove_columns("width").add_column("width", [n + (n == 44) for n in rows["width"]]))


def test_weights_of_half_precision_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is trained in torch.bfloat16"):
        trainer_on(tmp_path, scenes(8), dtype=torch.bfloat16)


def test_a_reference_that_cannot_be_copied_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="beta is 0.2, which needs a reference.*pass ref_model="):
        trainer_on(tmp_path, scenes(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_mode": "sft"}, "training_mode is 'sft'; choose one of"),
        ({"supervised_fraction": 0.0}, "choose a share above 0"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"num_generations": 3}, "divisible by"),
        ({"use_vllm": True}, "vLLM is not installed"),
        ({"fp16": True}, "fp16=True needs a GPU's gradient scaler"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)
