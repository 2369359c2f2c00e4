"""TRL's options, one by one, on tiny models.

Those of GRPO itself make the same losses, metrics and weights as TRL's own trainer on the bare MLLM; the others train
jointly. A fast subset always runs; all of them:

    python -m pytest tests/trainers/test_trl_options.py --all-options

What is refused by our own table is in test_joint_options.py. Not tried: what needs a GPU, another package or several
processes (vLLM, liger, DeepSpeed, FSDP, offloaded and quantised caches).
"""

import asyncio
import math

import datasets
import pytest
import torch
from transformers import AutoModelForImageTextToText, EarlyStoppingCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass.trainers.policy import freeze, lora_config
from tests.support import grpo as support
from tests.support.grpo import SLOTS, force_responses, make_trainer, scenes, script_responses, settings, weights
from tests.support.tiny import make_sure, tiny_segcompass


def options(cases, fast):
    """Parameters for pytest, those that are not fast marked to be skipped without --all-options."""
    return [pytest.param(name, id=name, marks=[] if name in fast else pytest.mark.all_options) for name in cases]


@pytest.fixture(autouse=True)
def _only_if_asked(request):
    if request.node.get_closest_marker("all_options") and not request.config.getoption("--all-options"):
        pytest.skip("tried with --all-options")


def length_reward(completions, **kwargs):
    return [len(completion[0]["content"]) / 10 for completion in completions]


# -- the same as TRL's own trainer ------------------------------------------------------------------------------------

SAME = {
    "as it is": {},
    **{f"loss_type={name}": {"loss_type": name} for name in ("bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
    "loss_type=cispo": dict(loss_type="cispo", epsilon_high=5.0),
    "loss_type=luspo": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "num_iterations": dict(num_iterations=2),
    "importance_sampling_level": dict(importance_sampling_level="sequence", num_iterations=2),
    "delta": dict(delta=1.5, num_iterations=2),
    "epsilon_high": dict(epsilon_high=0.28, num_iterations=2),
    "steps_per_generation": dict(steps_per_generation=4),
    "beta": dict(beta=0.2),
    "use_bias_correction_kl": dict(beta=0.2, use_bias_correction_kl=True, num_iterations=2),
    "top_entropy_quantile": dict(top_entropy_quantile=0.3),
    "entropy_coef": dict(entropy_coef=0.1),
    "use_adaptive_entropy": dict(use_adaptive_entropy=True, entropy_target=10.0, entropy_coef=0.01),
    "entropy_coef_delta": dict(
        use_adaptive_entropy=True,
        entropy_target=10.0,
        entropy_coef=0.03,
        entropy_coef_min=0.02,
        entropy_coef_max=0.04,
        entropy_coef_delta=0.02,
    ),
    "sapo_temperature": dict(loss_type="sapo", sapo_temperature_neg=2.0, sapo_temperature_pos=0.5, num_iterations=2),
    "vespo_k": dict(
        loss_type="vespo",
        vespo_k_pos=1.5,
        vespo_lambda_pos=2.5,
        vespo_k_neg=2.5,
        vespo_lambda_neg=1.5,
        num_iterations=2,
    ),
    "off_policy_mask_threshold": dict(off_policy_mask_threshold=0.001, num_iterations=2),
    "mask_truncated_completions": dict(mask_truncated_completions=True, num_iterations=2, beta=0.2),
    "scale_rewards=none": dict(scale_rewards="none"),
    "scale_rewards=batch": dict(scale_rewards="batch"),
    "multi_objective_aggregation": dict(multi_objective_aggregation="normalize_then_sum"),
    "pad_to_multiple_of": dict(pad_to_multiple_of=16),
    "temperature": dict(temperature=0.7, num_iterations=2),
    "gradient_checkpointing": dict(gradient_checkpointing=True),
    "bf16": dict(bf16=True),
    "shuffle_dataset": dict(shuffle_dataset=False),
    "disable_dropout": dict(disable_dropout=True),
}

COMMON = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=24,
    max_steps=3,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    disable_tqdm=True,
    learning_rate=0.05,
    beta=0.0,
    loss_type="grpo",
    use_bias_correction_kl=False,
    max_grad_norm=1.0,
    epsilon=0.2,
    weight_decay=0.0,
    seed=3,
)


def sgd(parameters):
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def cut_the_second(monkeypatch):
    whole = support.scripted_rows

    def cut(processor):
        rows, tokenizer = whole(processor), processor.tokenizer
        ended = torch.isin(rows[1], torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id]))
        rows[1][ended] = tokenizer.convert_tokens_to_ids("x")
        return rows

    monkeypatch.setattr(support, "scripted_rows", cut)


@pytest.mark.parametrize("name", options(SAME, {"num_iterations", "mask_truncated_completions"}))
@pytest.mark.parametrize("backbone", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.all_options)])
def test_rl_alone_is_trls_own_training_of_the_bare_mllm(tmp_path, monkeypatch, backbone, name):
    if name == "mask_truncated_completions":
        cut_the_second(monkeypatch)
    common = {**COMMON, **SAME[name]}
    model, processor = tiny_segcompass(backbone, num_slots=SLOTS)
    model.mllm.save_pretrained(tmp_path / "mllm")
    attention = model.mllm.config._attn_implementation
    plain = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "mllm", dtype=torch.float32, attn_implementation=attention
    )
    start = weights(plain)
    script_responses(model, processor)
    script_responses(plain, processor)
    freeze(model)
    learns = {n.removeprefix("mllm."): p.requires_grad for n, p in model.named_parameters() if n.startswith("mllm.")}
    ours = SegCompassGRPOTrainer(
        model,
        reward_funcs=[length_reward],
        args=SegCompassGRPOConfig(str(tmp_path / "ours"), training_mode="rl", reward_weights=[0.0, 0.0, 1.0], **common),
        train_dataset=scenes(8),
        processing_class=processor,
        optimizers=sgd(p for n, p in model.named_parameters() if n.startswith("mllm.")),
    )
    ours.train()

    for parameter_name, parameter in plain.named_parameters():
        parameter.requires_grad_(learns[parameter_name])
    tokens = torch.tensor([model.config.think_end_id, model.config.ref_token_id])
    plain.get_input_embeddings().register_forward_hook(  # policy.freeze's rule, written again
        lambda module, args, output: torch.where(torch.isin(args[0], tokens)[..., None], output, output.detach())
    )
    rows = scenes(8).map(
        lambda row: {"prompt": [{"role": "user", "content": processor.prompt_text(row["instruction"])}]}
    )
    theirs = GRPOTrainer(
        plain,
        reward_funcs=[length_reward],
        args=GRPOConfig(str(tmp_path / "theirs"), **common),
        train_dataset=rows,
        processing_class=processor,
        optimizers=sgd(plain.parameters()),
    )
    theirs.train()

    own, reference = ([e for e in t.state.log_history if "loss" in e] for t in (ours, theirs))
    unlike = ("time", "reward", "learning_rate", "num_tokens")
    names = [key for key in reference[0] if key in own[0] and not any(part in key for part in unlike)]
    assert {"loss", "grad_norm", "entropy"} <= set(names)
    for ours_now, theirs_now in zip(own, reference, strict=True):
        for key in names:
            if isinstance(theirs_now.get(key), float):  # some only in the step of a rollout
                assert ours_now[key] == pytest.approx(theirs_now[key], rel=2e-3, abs=2e-6), key
    trained, wanted = weights(ours.core.mllm), weights(theirs.model)
    tolerance = 2e-4 if common["bf16"] else 1e-5
    assert max((trained[key] - value).abs().max().item() for key, value in wanted.items()) < tolerance
    assert any((start[key] - value).abs().max().item() > 10 * tolerance for key, value in wanted.items())


# -- joint training ---------------------------------------------------------------------------------------------------


async def slow_reward(completions, **kwargs):
    await asyncio.sleep(0)
    return length_reward(completions)


def no_reward(completions, **kwargs):
    return [None] * len(completions)


def column_reward(completions, instruction, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("instructions", list(instruction))
    log_metric("answers", 1.0)
    return [float(len(text)) + trainer_state.global_step for text in instruction]


REWARDS = [0.3, 0.7, 1.0]
SAMPLED = dict(scripted=False, max_completion_length=4)
TRAINS = {
    **{f"loss_type={n}": dict(loss_type=n) for n in ("bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")},
    "mask_truncated_completions": dict(mask_truncated_completions=True),
    "steps_per_generation": dict(steps_per_generation=4, forced=True, max_steps=2),
    "generation_batch_size": dict(generation_batch_size=16, max_steps=2),
    "num_generations above the batch": dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, num_generations=8
    ),
    "pad_to_multiple_of": dict(pad_to_multiple_of=16, forced=True),
    "pad_to_multiple_of, Qwen": dict(pad_to_multiple_of=16, forced=True, backbone="qwen2_5_vl"),
    "reward_weights=None": dict(reward_weights=None),
    "async reward": dict(reward_funcs=[slow_reward], reward_weights=REWARDS),
    "reward of None": dict(reward_funcs=[no_reward], reward_weights=REWARDS),
    "reward of columns": dict(reward_funcs=[column_reward], reward_weights=REWARDS, log_completions=True),
    "log_unique_prompts": dict(log_completions=True, log_unique_prompts=True, num_completions_to_print=1),
    "gradient_checkpointing": dict(gradient_checkpointing=True, forced=True),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "activation_checkpointing": dict(
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}, forced=True
    ),
    "bf16": dict(bf16=True, forced=True),
    "cache_implementation=static": dict(cache_implementation="static", **SAMPLED),
    "cache_implementation=dynamic": dict(cache_implementation="dynamic", **SAMPLED),
    "prefill_chunk_size": dict(generation_kwargs={"prefill_chunk_size": 8}, **SAMPLED),
    "max_new_tokens": dict(generation_kwargs={"max_new_tokens": 3}, **SAMPLED),
    "sampling": dict(top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.1, temperature=0.9, **SAMPLED),
    **{f"optim={name}": dict(optim=name) for name in ("adafactor", "sgd", "adamw_torch")},
    "lr_scheduler_type": dict(lr_scheduler_type="constant_with_warmup", warmup_steps=1, max_steps=2),
    "neftune_noise_alpha": dict(neftune_noise_alpha=5.0),
    "dataloader_num_workers": dict(dataloader_num_workers=1),
    "max_grad_norm=0": dict(max_grad_norm=0.0),
    "supervised_fraction": dict(supervised_fraction=0.5, top_entropy_quantile=0.5, num_iterations=2),
    "off_policy_mask_threshold": dict(off_policy_mask_threshold=0.01, num_iterations=2),
    "use_adaptive_entropy": dict(use_adaptive_entropy=True, entropy_target=10.0, entropy_coef=0.01),
    "num_train_epochs": dict(max_steps=-1, num_train_epochs=1),
    "torch_empty_cache_steps": dict(torch_empty_cache_steps=1),
    "iterable": dict(train=lambda: scenes(8).to_iterable_dataset()),
    "evaluation of several": dict(
        evals=lambda: datasets.DatasetDict(a=scenes(4), b=scenes(4)), eval_strategy="steps", eval_steps=1
    ),
    "eval_on_start": dict(evals=lambda: scenes(4), eval_strategy="steps", eval_steps=1, eval_on_start=True),
    "num_generations_eval": dict(
        evals=lambda: scenes(4), eval_strategy="steps", eval_steps=1, num_generations_eval=1, **SAMPLED
    ),
    "load_best_model_at_end": dict(
        evals=lambda: scenes(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        callbacks=[EarlyStoppingCallback(3)],
        max_steps=2,
    ),
    "callbacks": dict(callbacks=[TrainerCallback()]),
}


@pytest.mark.parametrize("name", options(TRAINS, {"loss_type=dapo", "reward of columns", "bf16"}))
def test_an_option_trains_jointly(tmp_path, name):
    case = {"max_steps": 1, "beta": 0.0, **TRAINS[name]}
    taken = {key: case.pop(key, None) for key in ("backbone", "forced", "reward_funcs", "train", "evals", "callbacks")}
    scripted = case.pop("scripted", True) and not taken["forced"]
    model, processor = tiny_segcompass(taken["backbone"] or "llava", num_slots=SLOTS)
    make_sure(model)
    if taken["forced"]:
        force_responses(model, processor)
    elif scripted:
        script_responses(model, processor)
    trainer = SegCompassGRPOTrainer(
        model,
        reward_funcs=taken["reward_funcs"],
        args=settings(tmp_path, **case),
        train_dataset=taken["train"]() if taken["train"] else scenes(8),
        eval_dataset=taken["evals"]() if taken["evals"] else None,
        processing_class=processor,
        callbacks=taken["callbacks"],
    )
    before = weights(trainer.core)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries and all(math.isfinite(entry["loss"]) for entry in entries)
    moved = {key.split(".")[0] for key, value in weights(trainer.core).items() if not torch.equal(value, before[key])}
    parts = {"mllm", "query_codebook", "slot_mapper", "mask_decoder"}
    assert moved == parts if scripted or taken["forced"] else moved <= parts


ADAPTERS = {"LoRA": {}, "DoRA, rsLoRA": dict(use_dora=True, use_rslora=True)}


@pytest.mark.parametrize("name", options(ADAPTERS, ()))
def test_adapters_train_jointly(tmp_path, name):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    script_responses(model, processor)
    trainer = SegCompassGRPOTrainer(
        model,
        args=settings(tmp_path, gradient_checkpointing=True, num_iterations=2, max_steps=1),
        train_dataset=scenes(8),
        processing_class=processor,
        peft_config=lora_config(model, **ADAPTERS[name]),
    )
    before = weights(trainer.model)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    after = weights(trainer.model)
    assert any("lora_" in key and not torch.equal(value, before[key]) for key, value in after.items())


# -- refused by TRL or transformers -----------------------------------------------------------------------------------

REFUSED = {
    "loss_type": (dict(loss_type="nonsense"), "nonsense"),
    "num_generations=1": (dict(num_generations=1, per_device_train_batch_size=1), "at least 2 generations"),
    "reward_weights": (dict(reward_weights=[0.3]), "reward_weights is"),
    "optim": (dict(optim="nonsense"), "nonsense"),
    "lr_scheduler_type": (dict(lr_scheduler_type="nonsense"), "nonsense"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_others_refuse_is_refused_before_the_first_step(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trainer = make_trainer(tmp_path, beta=0.0, max_steps=1, **changes)
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
