"""Joint GRPO and segmentation training, on tiny real LLaVA and Qwen2.5-VL models."""

import sys

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import BitsAndBytesConfig
from trl import GRPOTrainer

from segcompass.modeling_segcompass import SegCompassModel
from segcompass.modeling_segcompass.manifest import findings, listed, unlisted
from segcompass.trainers.grpo_config import SegCompassGRPOConfig
from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
from segcompass.trainers.joint_forward import JointForward
from segcompass.trainers.losses import LossWeights, segmentation_loss
from segcompass.trainers.policy import lora_config
from segcompass.trainers.rewards import mask_reward, mask_scores
from tests.support.grpo import (
    SLOTS,
    force_responses,
    make_trainer,
    rollout,
    scenes,
    script_responses,
    settings,
    weights,
)
from tests.support.tiny import BACKBONES, tiny_mllm, tiny_processor, tiny_segcompass


class Passes:
    """Counts forward passes: of the backbone and of the whole MLLM (with its head), with and without gradients."""

    def __init__(self, **modules):
        self.counts = {}
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self._add(name))

    def _add(self, name):
        key = f"{name} {'train' if torch.is_grad_enabled() else 'no grad'}"
        self.counts[key] = self.counts.get(key, 0) + 1


def half(batch):
    """The batch's first micro-batch (TRL slices the same way after shuffling)."""
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    return unsplit_pixel_values_by_grid(split_tensor_dict(split_pixel_values_by_grid(batch), 2)[0])


# -- joint steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "reading"), [(0.2, "feature"), (0.0, "feature"), (0.2, "grounded")])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_joint_steps_move_what_learns_and_nothing_else(tmp_path, backbone, beta, reading):
    trainer = make_trainer(tmp_path, backbone, beta=beta, model_config={"concept_reading": reading})
    model, before = trainer.model, weights(trainer.model)
    vision = model.mllm.model.get_encoder("image")
    counted = Passes(mllm=model.mllm, backbone=model.mllm.model, image_encoder=model.image_encoder)
    reference = Passes(reference=trainer.ref_model) if beta else None
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert np.isfinite([entry["loss"], entry["grad_norm"], entry["grpo_loss"], entry["reward"]]).all()
        assert entry["seg/heatmap_bce"] > 0 and 0 < entry["seg/mask_dice"] <= 1 and entry["seg/conf_bce"] > 0
        assert 0 <= entry["seg/matched_iou"] <= 1 and entry["seg/slots_found"] == pytest.approx(SLOTS * 3 / 4)
        # two clean responses, one with text before <think>, one invalid
        assert entry["rewards/format_reward/mean"] == pytest.approx((1 + 1 + 0.9 + 0) / 4)

    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    upper_block = "mllm.model.language_model.layers.2"
    between = {"feature": ("query_codebook", "slot_mapper"), "grounded": ("grounded_reading",)}
    for group in (*between[reading], "mask_decoder", upper_block, "mllm.lm_head"):
        assert any(name.startswith(group) for name in moved), group
    layers = tuple(f"mllm.model.language_model.layers.{layer}." for layer in range(model.config.sae_config.layer))
    frozen = {id(p) for module in (model.sae, model.image_encoder, vision) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in frozen or name.startswith(layers):
            assert name not in moved
    assert model.get_input_embeddings().weight.requires_grad

    # 2 steps x 2 micro-batches; 2 rollouts x 8 responses in chunks of 4 without a head; 2 images each rollout
    assert counted.counts == {
        "mllm train": 4,
        "backbone train": 4,
        "backbone no grad": 4,
        "image_encoder no grad": 2,
    }
    if beta:
        assert reference.counts == {"reference no grad": 4}


def test_masks_and_old_log_probabilities_share_one_pass(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=2, beta=0.0)
    counted = Passes(mllm=trainer.model.mllm, backbone=trainer.model.mllm.model)
    trainer.train()
    assert counted.counts == {"mllm train": 4, "backbone train": 4, "mllm no grad": 2, "backbone no grad": 2}


def test_sampled_responses_without_concentration_tokens_train_without_masks(tmp_path):
    trainer = make_trainer(tmp_path, scripted=False, beta=0.0, max_steps=1, max_completion_length=4)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert np.isfinite(entry["loss"]) and entry["seg/slots_found"] == 0 and entry["seg/matched_iou"] is None


def test_an_iterable_dataset_and_a_further_reward_work(tmp_path):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    script_responses(model, processor)
    seen = {}

    def brevity(completions, predictions, image, **kwargs):
        seen.update(scores=[prediction.score for prediction in predictions], images=image)
        return [1.0 / len(c[0]["content"]) for c in completions]

    trainer = SegCompassGRPOTrainer(
        model,
        reward_funcs=brevity,
        args=settings(tmp_path, reward_weights=[0.3, 0.7, 0.1], max_steps=1),
        train_dataset=scenes(8).to_iterable_dataset(),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/brevity/mean"] > 0
    assert len(seen["scores"]) == 8 and all(isinstance(image, Image.Image) for image in seen["images"])


TOY_REWARDS = """
seen = []

def short_answer(completions, **kwargs):
    return [1.0 / (1.0 + len(completion[0]["content"])) for completion in completions]

def few_slots(predictions, **kwargs):
    seen.extend(predictions)
    return [1.0 - p.slot_mask.float().mean().item() for p in predictions]
"""


def test_text_and_mask_rewards_are_found_by_their_dotted_paths(tmp_path, monkeypatch):
    (tmp_path / "toy_rewards.py").write_text(TOY_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["toy_rewards.few_slots", "toy_rewards.short_answer"]
    trainer = make_trainer(tmp_path, reward_funcs=names, reward_weights=[2.0, 1.0], max_steps=1, beta=0.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["rewards/few_slots/mean"] == pytest.approx(1 / 4)  # one response of four found no slot
    assert entry["rewards/short_answer/mean"] > 0 and "rewards/mask_reward/mean" not in entry
    assert entry["reward"] == pytest.approx(2 * 1 / 4 + entry["rewards/short_answer/mean"])
    assert "format_share" not in entry  # nothing here knows the format
    predictions = sys.modules.pop("toy_rewards").seen
    assert len(predictions) == 8
    for prediction in predictions:
        side = 4 * trainer.core.config.key_grid
        assert prediction.pred_masks.shape == (SLOTS, side, side) and prediction.targets.shape[1:] == (side, side)
        assert prediction.pred_logits.shape == prediction.slot_mask.shape == (SLOTS,)
        assert prediction.valid_extent.shape == (2,) and 0 <= prediction.score <= 1


def test_rewards_and_weights_of_different_number_are_refused(tmp_path):
    further = ["segcompass.trainers.rewards.mask_reward"]
    with pytest.raises(
        ValueError, match=r"reward_weights is \[0.3, 0.7\], but the rewards are format_reward, mask_re.*"
    ):
        make_trainer(tmp_path, trainer_kwargs={"reward_funcs": further})


def test_evaluation_logs_the_same_terms(tmp_path):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    script_responses(model, processor)
    trainer = SegCompassGRPOTrainer(
        model, args=settings(tmp_path), train_dataset=scenes(8), eval_dataset=scenes(2), processing_class=processor
    )
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and metrics["eval_seg/slots_found"] == pytest.approx(SLOTS * 3 / 4)


def test_a_checkpoint_holds_model_and_processor(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded = SegCompassModel.from_pretrained(tmp_path / "checkpoint-1")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert (tmp_path / "checkpoint-1" / "tokenizer_config.json").exists()
    signed = listed(tmp_path / "checkpoint-1")
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "rollouts_0.pt"} <= set(signed)
    assert findings(tmp_path / "checkpoint-1") == [] and unlisted(tmp_path / "checkpoint-1") == []
    optimizer = tmp_path / "checkpoint-1" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-1 is no whole checkpoint: optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.save_model(tmp_path)
    assert "training_args.bin" in listed(tmp_path) and findings(tmp_path) == []


@pytest.mark.parametrize("reading", ["feature", "grounded"])
def test_resuming_continues_as_if_never_stopped(tmp_path, reading):
    saving = dict(max_steps=3, save_strategy="steps", save_steps=2, rows=12, model_config={"concept_reading": reading})
    whole = make_trainer(tmp_path, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last, again = (trainer.state.log_history[-2] for trainer in (whole, resumed))
    for name in ("step", "loss", "kl", "reward", "learning_rate", "seg/mask_dice"):
        assert again[name] == pytest.approx(last[name], rel=1e-6), name
    for name, value in weights(whole.model).items():
        assert torch.allclose(value, weights(resumed.model)[name], atol=1e-7), name


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_joint_forward_gives_trl_s_log_probabilities_and_the_model_s_masks(tmp_path, backbone):
    trainer = make_trainer(tmp_path, backbone, beta=0.0, temperature=0.7)
    batch = half(rollout(trainer))
    core = trainer.core
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if name in batch}
    kwargs = dict(num_images=batch["num_images"], **images)

    joint = JointForward(core, batch)
    score = GRPOTrainer._get_per_token_logps_and_entropies
    together, _, _ = score(trainer, joint, input_ids, attention_mask, length, **kwargs)
    plain, _, _ = score(trainer, core.mllm, input_ids, attention_mask, length, **kwargs)
    scored = batch["completion_mask"].bool()
    assert torch.allclose(together[scored], plain[scored], atol=1e-5)  # trimmed rows, other summation order

    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-length] = -100
    independent = core(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        image_embeddings=torch.stack(batch["image_embeddings"]),
        reshaped_input_sizes=batch["reshaped_input_sizes"],
        **images,
    )
    logits = independent.logits[:, -length - 1 : -1].float() / 0.7
    expected = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    mask = batch["completion_mask"].bool()
    assert torch.allclose(together[mask], expected[mask], atol=1e-5)
    assert torch.allclose(joint.outputs[0].pred_masks, independent.pred_masks, atol=1e-5)
    assert joint.outputs[0].slot_mask.all(1).tolist() == [True, True, True, False]


def test_joint_gradient_is_the_sum_of_separately_computed_gradients(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.2)
    batch = half(rollout(trainer))
    core = trainer.core
    learning = [p for p in core.parameters() if p.requires_grad]

    joint = torch.autograd.grad(trainer._compute_loss(core, batch), learning, allow_unused=True)
    grpo = torch.autograd.grad(GRPOTrainer._compute_loss(trainer, core.mllm, batch), learning, allow_unused=True)
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    response = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1).bool()
    output = core(
        input_ids=input_ids,
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        pixel_values=batch["pixel_values"],
        response_mask=response,
        image_embeddings=torch.stack(batch["image_embeddings"]),
        reshaped_input_sizes=batch["reshaped_input_sizes"],
    )
    extent = core.config.frame.valid_extent(batch["reshaped_input_sizes"], output.pred_masks.shape[-1])
    weights = LossWeights(lambda_s=1.0, lambda_c=0.2, lambda_d=0.6)
    loss, _ = segmentation_loss(output, batch["mask_targets"], extent, weights)
    segmentation = torch.autograd.grad(loss, learning, allow_unused=True)

    largest = max(gradient.abs().max() for gradient in joint if gradient is not None)
    assert largest > 0
    for whole, *parts in zip(joint, grpo, segmentation, strict=True):
        parts = [part for part in parts if part is not None]
        if whole is None:
            assert not parts
        else:  # float32 sums in another order
            assert torch.allclose(whole, sum(parts), atol=2e-6 * largest)

    core.gradient_checkpointing_enable()
    recomputed = torch.autograd.grad(trainer._compute_loss(core, batch), learning, allow_unused=True)
    for whole, again in zip(joint, recomputed, strict=True):
        assert (whole is None) == (again is None)
        assert whole is None or torch.allclose(whole, again, atol=2e-6 * largest)


def test_the_segmentation_loss_counts_once_under_gradient_accumulation(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0)
    batch = half(rollout(trainer))
    with torch.no_grad():
        trainer.current_gradient_accumulation_steps = 1
        whole = trainer._compute_loss(trainer.core, batch)
        trainer.current_gradient_accumulation_steps = 4
        quarter = trainer._compute_loss(trainer.core, batch)
    assert quarter.item() == pytest.approx(whole.item() / 4, rel=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rewarded_masks_do_not_depend_on_which_pass_decoded_them(tmp_path, backbone):
    """A rebuilt pass, one on TRL's tensors, the old-log-probability pass and the untrained reference all agree."""
    cases = [dict(beta=0.0), dict(beta=0.2), dict(beta=0.0, num_iterations=2)]
    cases.append(dict(beta=0.2, reward_mask_source="reference"))
    scores = []
    for case in cases:
        trainer = make_trainer(tmp_path, backbone, **case)
        kept = []
        trainer.reward_funcs.append(lambda kept=kept, **kwargs: kept.extend(mask_reward(**kwargs)) or kept)
        trainer.reward_func_names.append("keep")
        trainer.reward_processing_classes.append(None)
        trainer.reward_weights = torch.tensor([0.3, 0.7, 0.0])
        batch = rollout(trainer)
        scores.append(kept)
    assert len(scores[0]) == 8 and 0 < max(scores[0]) <= 1
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-5)

    # and they are what the model itself says about those sequences
    output = trainer.core(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        response_mask=torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1).bool(),
        image_embeddings=torch.stack(batch["image_embeddings"]),
        reshaped_input_sizes=batch["reshaped_input_sizes"],
        **{name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if name in batch},
    )
    frame, side = trainer.core.config.frame, output.pred_masks.shape[-1]
    extent = frame.valid_extent(batch["reshaped_input_sizes"], side)
    assert mask_scores(output, batch["mask_targets"], extent) == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("case", [dict(beta=0.0), dict(beta=0.2), dict(beta=0.0, num_iterations=2)], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_generation_leaves_the_states_that_rewarded_masks_are_decoded_from(tmp_path, backbone, case):
    """The same rewards as from a teacher-forced pass, without that pass."""
    rewards = []
    for forced in (False, True):
        trainer = make_trainer(tmp_path, backbone, scripted=not forced, **case)
        if forced:
            length = force_responses(trainer.model, trainer.processing_class)
            counted = Passes(backbone=trainer.core.mllm.model)
        rollout(trainer)
        rewards.append(trainer._metrics["train"]["rewards/mask_reward/mean"])
        assert len(trainer._metrics["train"]["sae/explained_variance"]) == 1
    assert rewards[0][0] > 0 and rewards[1] == pytest.approx(rewards[0], abs=1e-5)
    old_log_probabilities = 2 if "num_iterations" in case else 0  # a pass a micro-batch, as in plain GRPO
    assert counted.counts == {"backbone no grad": length + old_log_probabilities}


def test_reference_masks_come_from_the_frozen_mllm_in_its_own_pass(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.2, reward_mask_source="reference")
    own = trainer.core.mllm
    counted = Passes(backbone=own.model, reference=trainer.ref_model.model)
    states = []
    original = trainer.core.decode_masks
    trainer.core.decode_masks = lambda **kwargs: states.append(kwargs["z"]) or original(**kwargs)
    rollout(trainer)
    assert counted.counts == {"reference no grad": 2} and trainer.core.mllm is own
    first = list(states)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    states.clear()
    rollout(trainer)
    assert len(states) == len(first) and all(map(torch.equal, states, first))


def test_the_reference_is_the_mllm_alone_and_stays_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.2)
    reference, before = trainer.ref_model, weights(trainer.ref_model)
    assert type(reference) is type(trainer.core.mllm)
    assert not {id(p) for p in reference.parameters()} & {id(p) for p in trainer.model.parameters()}
    hooks = [hook for module in reference.modules() for hook in module._forward_hooks.values()]
    assert all(hook.__self__ is trainer.core for hook in hooks if hasattr(hook, "__self__"))
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(reference).items())
    assert trainer.state.log_history[-2]["kl"] > 0


def test_responses_of_one_image_share_its_features_and_targets(tmp_path):
    batch = rollout(make_trainer(tmp_path, beta=0.0))
    assert len({id(e) for e in batch["image_embeddings"]}) == len({id(t) for t in batch["mask_targets"]}) == 2
    assert len(batch["image_embeddings"]) == len(batch["prompt_ids"]) == 8


# -- rates and schedule -----------------------------------------------------------------------------------------------


def test_each_component_has_its_own_rate_and_norms_do_not_decay(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=2e-6)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    factors = {"query_codebook": 25, "slot_mapper": 80, "mask_decoder": 10}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == pytest.approx(2e-6 * factors.get(name.split(".")[0], 1)), name
            if "norm" in name or name.endswith("bias"):
                assert group["weight_decay"] == 0, name
    assert seen == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}


def test_every_rate_falls_without_warm_up_to_a_share(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=2e-6)
    optimizer = trainer.create_optimizer()
    first = [group["lr"] for group in optimizer.param_groups]
    scheduler = trainer.create_scheduler(num_training_steps=10, optimizer=optimizer)
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    # torch's schedule without warm-up begins 1/T along its cosine: (1 - 1/6.7) (1 - cos(pi / 10)) / 2 below the rate
    assert rates[0] == pytest.approx([rate * 0.97918 for rate in first], rel=1e-4)
    assert rates[-1] == pytest.approx([rate / 6.7 for rate in first])
    assert (np.diff(rates, axis=0) < 0).all()
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def test_blocks_below_the_sae_layer_learn_only_when_asked(tmp_path):
    for asked in (False, True):
        model = make_trainer(tmp_path, train_below_sae_layer=asked).model
        blocks = model.mllm.model.language_model.layers
        learns = [all(p.requires_grad for p in block.parameters()) for block in blocks]
        assert learns == [asked, asked, True, True]


def test_the_papers_settings_are_the_defaults(tmp_path):
    args = SegCompassGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.num_generations, args.beta, args.epsilon, args.loss_type) == (8, 0.2, 0.2, "grpo")
    assert (args.lambda_s, args.lambda_c, args.lambda_d, args.reward_weights) == (1.0, 0.2, 0.6, [0.3, 0.7])
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm, args.final_div_factor) == (2e-6, 0.01, 1.0, 6.7)
    assert not args.use_bias_correction_kl and args.scale_rewards == "group" and args.max_completion_length == 2000


# -- PEFT -------------------------------------------------------------------------------------------------------------


def lora(reading="feature", **changes):
    model, _ = tiny_segcompass("llava", num_slots=SLOTS, concept_reading=reading)
    return lora_config(model, r=2, **changes)


@pytest.mark.parametrize(
    ("reading", "factors"),
    [
        ("feature", {"query_codebook": 25, "slot_mapper": 80, "mask_decoder": 10}),
        ("grounded", {"grounded_reading": 80, "mask_decoder": 10}),
    ],
)
def test_adapters_train_with_the_segmentation_modules(tmp_path, reading, factors):
    adapters, chosen = {"peft_config": lora(reading)}, {"concept_reading": reading}
    trainer = make_trainer(tmp_path, trainer_kwargs=adapters, model_config=chosen, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    for part in ("lora_B", *factors, "lm_head", "trainable_tokens_delta"):
        assert any(part in name for name in moved), part
    assert not any("original_module" in name or ".sae." in name or "base_layer" in name for name in moved)
    assert trainer.ref_model is None and trainer.beta == 0.2
    rates = {round(group["initial_lr"] / 1e-3) for group in trainer.optimizer.param_groups}
    assert rates == {1, *factors.values()}


def test_adapters_that_leave_the_segmentation_frozen_are_refused(tmp_path):
    with pytest.raises(ValueError, match="slot_mapper would not learn; add modules_to_save"):
        config = lora(modules_to_save=["query_codebook", "mask_decoder", "lm_head"])
        make_trainer(tmp_path, trainer_kwargs={"peft_config": config})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_token_indices": None}, "row of embed_tokens would not learn"),
        ({"modules_to_save": ["query_codebook", "slot_mapper", "mask_decoder"]}, "row of lm_head would not learn"),
    ],
)
def test_adapters_that_leave_the_concentration_token_frozen_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, trainer_kwargs={"peft_config": lora(**changes)})


def test_rows_of_the_head_alone_are_refused(tmp_path):
    config = lora(
        modules_to_save=["query_codebook", "slot_mapper", "mask_decoder"],
        trainable_token_indices={"embed_tokens": [3], "lm_head": [3]},
    )
    with pytest.raises(ValueError, match="which sampling uses and the log-probabilities do not"):
        make_trainer(tmp_path, trainer_kwargs={"peft_config": config})


def test_reference_masks_are_refused_with_adapters(tmp_path):
    with pytest.raises(ValueError, match="reward_mask_source='policy'"):
        make_trainer(tmp_path, reward_mask_source="reference", trainer_kwargs={"peft_config": lora()})


@pytest.fixture
def quantized(tmp_path):
    """A tiny Qwen2.5-VL composite whose MLLM is loaded in 4 bits, its weights as saved, its processor."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: pip install -e '.[test]'")
    model, processor = tiny_segcompass("qwen2_5_vl", num_slots=SLOTS)
    model.save_pretrained(tmp_path / "model")
    settings_of_qlora = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    low = type(model).from_pretrained(tmp_path / "model", dtype="float32", quantization_config=settings_of_qlora)
    script_responses(low, processor)
    return low, dict(model.named_parameters()), processor


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_train_beside_a_quantised_mllm(tmp_path, quantized, wrapped):
    model, saved, processor = quantized
    config = lora_config(model, r=2)
    kwargs = {"processing_class": processor, "train_dataset": scenes(8), "args": settings(tmp_path, max_steps=1)}
    if wrapped:
        trainer = SegCompassGRPOTrainer(get_peft_model(model, config), **kwargs)
    else:
        trainer = SegCompassGRPOTrainer(model, peft_config=config, **kwargs)
    before = weights(trainer.model)
    learning = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learning.values()} == {torch.float32}
    copied = [name for name in learning if ".modules_to_save." in name]
    for name in copied:  # to the last bit: not by way of bfloat16
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(before[name], saved[plain]), name
    rows = next(before[name] for name in learning if "trainable_tokens_delta" in name)
    embeddings = saved["mllm.model.language_model.embed_tokens.weight"]
    assert torch.equal(rows, embeddings[[model.config.think_end_id, model.config.ref_token_id]])
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    for part in ("lora_B", "query_codebook", "slot_mapper", "mask_decoder", "lm_head", "trainable_tokens_delta"):
        assert any(part in name for name in moved), part
    assert moved <= set(learning) and any(value.dtype == torch.uint8 for value in before.values())


def test_a_quantised_mllm_without_adapters_is_refused(tmp_path, quantized):
    model, _, processor = quantized
    with pytest.raises(ValueError, match="is quantised.*pass peft_config"):
        SegCompassGRPOTrainer(model, args=settings(tmp_path), train_dataset=scenes(8), processing_class=processor)


# -- errors before the first step -------------------------------------------------------------------------------------


def test_a_processor_with_another_number_of_slots_is_refused(tmp_path):
    model, _ = tiny_segcompass("llava", num_slots=SLOTS)
    processor = tiny_processor("llava", num_slots=4)
    with pytest.raises(ValueError, match="asks for 4 concentration tokens, but the model has 3 slots"):
        SegCompassGRPOTrainer(model, args=settings(tmp_path), train_dataset=scenes(8), processing_class=processor)


def test_a_processor_with_other_token_ids_is_refused(tmp_path):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    model.config.ref_token_id -= 1
    with pytest.raises(ValueError, match="processor's id of <REF_POS>"):
        SegCompassGRPOTrainer(model, args=settings(tmp_path), train_dataset=scenes(8), processing_class=processor)


def test_a_concentration_token_that_decoding_strips_is_refused(tmp_path):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<REF_POS>"]})
    with pytest.raises(ValueError, match="special token of this tokenizer"):
        SegCompassGRPOTrainer(model, args=settings(tmp_path), train_dataset=scenes(8), processing_class=processor)


def test_rows_without_masks_are_refused(tmp_path):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    rows = scenes(8).remove_columns(["masks"])
    with pytest.raises(ValueError, match="train_dataset has no column masks"):
        SegCompassGRPOTrainer(model, args=settings(tmp_path), train_dataset=rows, processing_class=processor)


def test_fewer_rows_than_one_generation_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has 1 rows, but one generation batch needs 2 prompts"):
        make_trainer(tmp_path, rows=1)


def test_a_bare_mllm_is_refused(tmp_path):
    processor = tiny_processor("llava")
    with pytest.raises(TypeError, match="pass a SegCompassModel"):
        SegCompassGRPOTrainer(tiny_mllm("llava", processor), args=settings(tmp_path), processing_class=processor)


def test_an_image_of_another_size_than_its_row_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    row = {**scenes(1)[0], "height": 41}
    with pytest.raises(ValueError, match=r"'sample-0' has .width, height. \(40, 40\).*\(40, 41\)"):
        trainer._generate_and_score_completions([row] * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_mask_source": "rollout"}, "choose one of"),
        ({"reward_mask_source": "reference", "beta": 0.0}, "set beta above 0"),
        ({"sync_ref_model": True}, "sync_ref_model=True is not supported"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True is not supported"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_the_model_is_looked_for_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    """Looking for it in its wrappers takes milliseconds, and a step asks eleven times."""
    trainer = make_trainer(tmp_path, beta=0.0)
    looked, unwrap = [], trainer.accelerator.unwrap_model
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda model: looked.append(model) or unwrap(model))
    assert trainer.core is trainer.model and trainer.core is trainer.core and len(looked) <= 1
    trainer.model = get_peft_model(trainer.model, lora())
    assert trainer.core is trainer.model.get_base_model() and looked[-1] is trainer.model
