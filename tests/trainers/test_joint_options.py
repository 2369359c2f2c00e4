"""Options of joint training and of the cold start: each is honoured, or refused by name before the first step."""

import collections

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments
from trl import GRPOConfig

from segcompass.trainers import (
    SegCompassGRPOTrainer,
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
    grpo_trainer,
)
from segcompass.trainers.checks import check_engine_prompts
from segcompass.trainers.options import GENERATION_OPTIONS, GRPO_OPTIONS, OPTIONS, TRAINER_OPTIONS
from segcompass.trainers.policy import freeze, lora_config
from segcompass.trainers.reward_masks import log_explained_variance
from segcompass.trainers.rewards import mask_scores
from segcompass.trainers.vllm_policy import PolicyEngine
from tests.support import grpo as support
from tests.support.grpo import SLOTS, make_trainer, rollout, scenes, script_responses, settings
from tests.support.tiny import make_sure, tiny_segcompass

# -- what a response earns --------------------------------------------------------------------------------------------


@pytest.fixture
def cut_response(monkeypatch):
    """The second of the four scripted responses never ends."""
    whole = support.scripted_rows

    def cut(processor):
        rows, tokenizer = whole(processor), processor.tokenizer
        rows[1][torch.isin(rows[1], torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id]))] = (
            tokenizer.convert_tokens_to_ids("x")
        )
        return rows

    monkeypatch.setattr(support, "scripted_rows", cut)


def test_a_cut_responses_mask_reward_is_the_same_from_whichever_pass(tmp_path, cut_response):
    passes = {
        "generation": dict(forced=True, beta=0.0),
        "a pass of its own": dict(beta=0.0),
        "old log-probabilities": dict(num_iterations=2, beta=0.0),
        "reference": dict(beta=0.2, reward_mask_source="reference"),
    }
    scores = {}
    for name, changes in passes.items():
        forced = changes.pop("forced", False)
        trainer = make_trainer(tmp_path, scripted=not forced, mask_truncated_completions=True, **changes)
        if forced:
            support.force_responses(trainer.model, trainer.processing_class)
            trainer.generation_config.max_new_tokens = 12
        batch = rollout(trainer)
        assert batch["completion_mask"][1].sum() == 0  # TRL leaves it out of the loss
        scores[name] = batch["mask_scores"]
    right = scores.pop("generation")
    assert right[1] > 0
    for name, value in scores.items():
        torch.testing.assert_close(value, right, atol=1e-5, rtol=1e-4, msg=name)


def test_a_cut_response_is_supervised_but_gives_no_grpo_loss(tmp_path, cut_response):
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, beta=0.0, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["seg/slots_found"] == pytest.approx(SLOTS * 3 / 4)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rewards_of_a_model_with_its_own_adapter_come_from_the_policy(tmp_path, beta):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    make_sure(model)
    script_responses(model, processor)  # no states of generation, as with vLLM
    trainer = SegCompassGRPOTrainer(
        get_peft_model(model, lora_config(model, r=2)),
        args=settings(tmp_path, beta=beta),
        train_dataset=scenes(8),
        processing_class=processor,
    )
    assert ("ref" in trainer.model.peft_config) == (beta > 0)
    for name, parameter in trainer.model.named_parameters():
        if "conf_out" in name and "modules_to_save.default" in name and name.endswith("bias"):
            parameter.data -= 30.0  # the policy is sure of nothing, its frozen copy of everything
    batch = rollout(trainer)
    prompt, response = batch["prompt_mask"], batch["completion_mask"]
    with torch.no_grad():
        outputs = trainer.model(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            attention_mask=torch.cat([prompt, response], 1),
            response_mask=torch.cat([torch.zeros_like(prompt), response], 1).bool(),
            pixel_values=batch["pixel_values"],
            image_embeddings=torch.stack(batch["image_embeddings"]),
            reshaped_input_sizes=batch["reshaped_input_sizes"],
        )
    frame = model.config.frame
    extent = frame.valid_extent(batch["reshaped_input_sizes"], outputs.pred_masks.shape[-1])
    right = mask_scores(outputs, batch["mask_targets"], extent)
    assert batch["mask_scores"].tolist() == pytest.approx(right, abs=1e-5)


def test_rollouts_run_under_the_trainers_autocast(tmp_path):
    trainer = make_trainer(tmp_path, scripted=False, bf16=True, beta=0.0, max_completion_length=3)
    seen = collections.Counter()
    layer = trainer.core.mllm.model.language_model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.update([output.dtype]))
    rollout(trainer)
    assert set(seen) == {torch.bfloat16}


# -- what is logged ---------------------------------------------------------------------------------------------------


def test_explained_variance_counts_the_tokens_that_concepts_come_from(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0)
    logged = []
    trainer.log_mean = lambda name, value: logged.append(value) if name == "sae/explained_variance" else None
    z = torch.randn(2, 40, trainer.core.sae.config.d_in)
    may_fire = torch.ones(2, 40, dtype=torch.bool)
    may_fire[:, :3] = False

    def explained(z):
        residual = z - trainer.core.sae.decode(trainer.core.sae.encode(z))
        return (1 - residual.var(0, correction=0).sum() / z.var(0, correction=0).sum()).item()

    right = explained(z[:, 3:].flatten(0, 1))
    z[:, 0] = 1000.0 * torch.randn(z.shape[-1])  # a sink
    z[:, 1:3] = 0.0  # padding
    log_explained_variance(trainer, z, may_fire)
    assert logged == [pytest.approx(right, rel=1e-4)]
    log_explained_variance(trainer, z, torch.zeros_like(may_fire))
    assert len(logged) == 1


def test_the_cold_starts_log_holds_no_evaluation(tmp_path):
    rows = scenes(4).map(lambda row: {"reasoning": "a box"})
    other = rows.map(lambda row: {"reasoning": "zzzz @@@@ zq " * 6})
    logs = []
    for name, evaluation in (("with", other), ("without", None)):
        model, processor = tiny_segcompass("llava", num_slots=SLOTS)
        args = SegCompassSFTConfig(
            str(tmp_path / name),
            max_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            logging_steps=2,
            learning_rate=0.0,
            eval_strategy="no" if evaluation is None else "steps",
            eval_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=rows, eval_dataset=evaluation)
        trainer.train()
        logs.append([entry["language"] for entry in trainer.state.log_history if "language" in entry])
    assert logs[0] == logs[1] and len(logs[0]) == 1


def test_a_format_that_is_never_met_is_warned_about_once_with_what_to_do(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(grpo_trainer, "UNFORMATTED_ROLLOUTS", 2)
    make_trainer(tmp_path / "never", scripted=False, beta=0.0, max_steps=3, max_completion_length=2).train()
    warnings = [record.getMessage() for record in caplog.records if "had the format" in record.getMessage()]
    assert len(warnings) == 1
    assert "first 2 rollouts" in warnings[0] and "segcompass train sft" in warnings[0]
    assert "max_completion_length=2: 100%" in warnings[0]
    caplog.clear()
    make_trainer(tmp_path / "some", beta=0.0, max_steps=3).train()
    assert "had the format" not in caplog.text


# -- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_moves_no_row_that_is_frozen(tmp_path, tied):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    script_responses(model, processor)
    args = settings(tmp_path, beta=0.0, weight_decay=0.5, learning_rate=1e-2)
    trainer = SegCompassGRPOTrainer(model, args=args, train_dataset=scenes(8), processing_class=processor)
    embeddings, config = trainer.core.get_input_embeddings().weight, trainer.core.config
    assert (trainer.core.get_output_embeddings().weight is embeddings) == tied
    before = embeddings.detach().clone()
    trainer.train()
    moved = (embeddings.detach() != before).any(1).nonzero()[:, 0].tolist()
    free = {config.think_end_id, config.ref_token_id} | ({config.think_id} if tied else set())
    assert moved and set(moved) <= free


def test_what_was_frozen_is_free_again_in_the_next_stage():
    model, processor = tiny_segcompass("llava")
    image = scenes(1)[0]["image"]
    inputs = processor(images=image, text="the box", response="<think>a</think><REF_POS>", image_encoder=False)
    present = set(inputs["input_ids"].unique().tolist()) - {processor.image_token_id}
    learned = {}
    for below in (False, True, False):
        freeze(model, train_below_sae_layer=below)
        model.zero_grad()
        model.train()
        model(**inputs).loss.backward()
        rows = model.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
        learned.setdefault(below, []).append(set(rows))
    tokens = {model.config.think_end_id, model.config.ref_token_id}
    assert learned[False][0] == learned[False][1] <= tokens
    assert learned[True][0] - tokens and len(learned[True][0]) >= len(present) - 2


# -- schedule ---------------------------------------------------------------------------------------------------------


def rates(folder, **changes):
    trainer = make_trainer(folder, beta=0.0, max_steps=4, **changes)
    trainer.create_optimizer()
    scheduler, values = trainer.create_scheduler(4), []
    for _ in range(4):
        values.append(trainer.optimizer.param_groups[0]["lr"] / trainer.args.learning_rate)
        trainer.optimizer.step()
        scheduler.step() if len(values) < 4 else None
    return values


def test_another_schedule_and_warm_up_are_followed(tmp_path):
    assert rates(tmp_path, lr_scheduler_type="constant") == [1.0] * 4
    assert rates(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=2) == [0.0, 0.5, 1.0, 1.0]
    assert rates(tmp_path, warmup_steps=2)[:3] == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="warmup_steps=2 is not followed by lr_scheduler_type='constant'"):
        settings(tmp_path, lr_scheduler_type="constant", warmup_steps=2)
    assert rates(tmp_path)[0] > 0.85 and rates(tmp_path)[-1] == pytest.approx(1 / 6.7)
    with pytest.raises(ValueError, match="final_div_factor=3.0 is the end of"):
        settings(tmp_path, lr_scheduler_type="linear", final_div_factor=3.0)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {**OPTIONS, **GRPO_OPTIONS})
def test_an_option_that_cannot_be_honoured_is_refused_by_name(tmp_path, name):
    value = {
        "label_smoothing_factor": 0.1,
        "model_init_kwargs": {"dtype": "float32"},
        "router_aux_loss_coef": 0.01,
        "chat_template_kwargs": {"enable_thinking": False},
        "train_sampling_strategy": "sequential",
        "data_seed": 0,
        "label_names": ["masks"],
        "optim_target_modules": ["q_proj"],
    }.get(name, True)
    with pytest.raises(ValueError, match=f"{name}="):
        settings(tmp_path, **{name: value})
    if name in OPTIONS:
        with pytest.raises(ValueError, match=f"{name}="):
            SegCompassSFTConfig(str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("name", GENERATION_OPTIONS)
def test_a_way_of_generating_that_the_trainer_cannot_take_is_refused_by_name(tmp_path, name):
    value = True if name == "return_dict_in_generate" else 3
    with pytest.raises(ValueError, match=f"generation_kwargs sets {name}="):
        settings(tmp_path, generation_kwargs={name: value})
    settings(tmp_path, generation_kwargs={name: GENERATION_OPTIONS[name][0][-1]})


@pytest.mark.parametrize("name", TRAINER_OPTIONS)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}="):
        make_trainer(tmp_path, trainer_kwargs={name: [print]})


def test_a_path_another_config_and_several_splits_are_refused(tmp_path):
    model, processor = tiny_segcompass("llava", num_slots=SLOTS)
    rows, splits = scenes(8), datasets.DatasetDict(train=scenes(8))
    ours, sft = settings(tmp_path), SegCompassSFTConfig(str(tmp_path), use_cpu=True)
    for given, message in (
        (("runs/sft", ours, rows), "model is 'runs/sft', a path; pass a SegCompassModel"),
        ((model, GRPOConfig(str(tmp_path), use_cpu=True), rows), "args is GRPOConfig; pass a SegCompassGRPOConfig"),
        ((model, ours, splits), r"the splits 'train'; pass one of them, such as dataset\['train'\]"),
    ):
        with pytest.raises(TypeError, match=message):
            SegCompassGRPOTrainer(given[0], args=given[1], train_dataset=given[2], processing_class=processor)
    for given, message in (
        (("runs/sft", sft, rows), "model is 'runs/sft', a path; pass a SegCompassModel"),
        ((model, TrainingArguments(str(tmp_path), use_cpu=True), rows), "args is TrainingArguments; pass a SegC"),
        ((model, sft, splits), "the splits 'train'; pass one of them"),
    ):
        with pytest.raises(TypeError, match=message):
            SegCompassSFTTrainer(given[0], given[1], processor, train_dataset=given[2])


def test_a_prompt_longer_than_the_processor_allows_names_its_sample(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0)
    row = {**scenes(1)[0], "instruction": "a" * 400}
    with pytest.raises(ValueError, match=r"sample 'sample-0': the prompt has \d+ tokens, .*; the limit is 300"):
        trainer._generate_and_score_completions([row] * 4)


# -- an engine that reads another prompt ------------------------------------------------------------------------------


def test_an_engine_that_expands_image_tokens_otherwise_is_caught(monkeypatch):
    model, _ = tiny_segcompass("llava", num_slots=SLOTS)
    image = model.config.image_token_id
    sent = [[1, image, image, image, 9], [1, image, image, image, 8]]

    class Engine(PolicyEngine):  # real vLLM needs a GPU: its place is taken below TRL's class
        def __init__(self, reads):
            self.model, self.reads = model, reads

    def generate(self, prompts, images=None, num_generations=1, profiler=None):
        return self.reads(prompts), [[5]] * len(prompts), [[[0.0]]] * len(prompts), None

    monkeypatch.setattr(PolicyEngine.__mro__[1], "generate", generate)
    assert Engine(lambda prompts: prompts).generate(sent, num_generations=2)[1] == [[5], [5]]
    for reads, message in (
        (lambda prompts: [prompts[0], [1] + [image] * 9 + [8]], "prompt 1 has 5 tokens, 3 .* read 11, 9 of the image"),
        (lambda prompts: [[1, image, 9], prompts[1]], "prompt 0 has 5 tokens, 3 of them of the image; vLLM read 3, 1"),
        (lambda prompts: prompts[:1], "was sent 2 prompts and answers to 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            Engine(reads).generate(sent, num_generations=2)
    check_engine_prompts(sent, [tuple(ids) for ids in sent], image)
