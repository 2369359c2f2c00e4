"""Every field of GRPOConfig and TrainingArguments is tried, refused by name, or listed here with the reason.

A field that a new version of TRL or transformers brings is in no list, and the first test names it.
"""

from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from segcompass.trainers import SparseAutoencoderTrainerConfig
from segcompass.trainers.checkpoints import whole_checkpoint
from segcompass.trainers.options import GRPO_OPTIONS, OPTIONS, SAE_OPTIONS
from tests.support import grpo as support
from tests.support.grpo import make_trainer, settings
from tests.trainers import test_trl_options as trl_options

HERE = Path(__file__).parent

ELSEWHERE = {
    "test_checkpoints.py": "save_total_limit",
    "test_grpo_scale.py": "fp16 use_vllm",
    "test_every_option.py": (
        "adam_beta1 adam_beta2 adam_epsilon optim_args dataloader_in_order dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context save_only_model "
        "torch_compile_backend torch_compile_mode use_transformers_paged lr_scheduler_kwargs"
    ),
}
"""{file beside this one: the fields that it tries}."""

NOT_TRIED = {
    "says what transformers logs, and where": (
        "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node "
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id log_multimodal "
        "skip_memory_metrics debug"
    ),
    "TRL counts the tokens of joint training itself, and transformers warns that it cannot": (
        "include_num_input_tokens_seen"
    ),
    "says when transformers evaluates, saves and restores, which does not depend on the model": (
        "eval_delay greater_is_better restore_callback_states_from_checkpoint ignore_data_skip save_on_each_node"
    ),
    "concerns predictions; evaluation here gives losses and rewards": (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics"
    ),
    "switches torch to deterministic algorithms for the whole process": "full_determinism",
    "no influence: a rollout's batches are always whole": "dataloader_drop_last",
    "no influence: no model is loaded by name": "trust_remote_code",
    "no influence: the MLLM's own configuration and the options of generation decide about caches": "use_cache",
    "read by programs around a trainer, never by the trainer": (
        "do_train do_eval do_predict resume_from_checkpoint local_rank"
    ),
    "of no influence without an option that is refused": (
        "liger_kernel_config length_column_name ref_model_mixup_alpha ref_model_sync_steps max_tool_calling_iterations "
        "transformers_continuous_batching_config"
    ),
    "needs the Hub": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "log_completions_hub_repo"
    ),
    "needs several processes or devices; accelerate and DeepSpeed do it": (
        "accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed ds3_gather_for_generation "
        "average_tokens_across_devices"
    ),
    "needs a GPU": "tf32",
    "needs vLLM, which needs a GPU": (
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "vllm_importance_sampling_cap"
    ),
}
"""{why they are not tried: fields}."""


def tried():
    """The fields that test_trl_options.py sets: in its cases, or in all of them."""
    cases = [*trl_options.SAME.values(), *trl_options.TRAINS.values()]
    cases += [case for case, _ in trl_options.REFUSED.values()]
    return {name for case in cases for name in case} | {"output_dir", *trl_options.COMMON, *support.DEFAULTS}


def split(lists):
    return {name for names in lists.values() for name in names.split()}


def test_every_field_is_tried_refused_or_listed_with_a_reason():
    known = {field.name for config in (GRPOConfig, TrainingArguments) for field in fields(config)}
    refused = OPTIONS.keys() | GRPO_OPTIONS.keys()
    listed = tried() | refused | split(ELSEWHERE) | split(NOT_TRIED)
    assert known - listed == set(), "fields that nothing is said of: try them, refuse them or give the reason"
    assert (refused | split(ELSEWHERE) | split(NOT_TRIED)) - known == set(), "these are no fields any more"
    for kinds in ((refused, tried() - {"remove_unused_columns"}), (refused, split(NOT_TRIED))):
        assert kinds[0] & kinds[1] == set()
    assert split(NOT_TRIED) & (tried() | split(ELSEWHERE)) == set()
    for file, names in ELSEWHERE.items():
        text = (HERE / file).read_text()
        assert all(name in text for name in names.split()), file


# -- options of optimizers, loaders and checkpoints, without training --------------------------------------------------


def test_the_optimizer_is_told_what_the_arguments_say(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3, weight_decay=0.25)
    groups = trainer.create_optimizer().param_groups
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.7, 0.8, 1e-3)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    args = trainer.args
    trainer.optimizer, args.optim, args.optim_args = None, "sgd", "momentum=0.5"
    assert {group["momentum"] for group in trainer.create_optimizer().param_groups} == {0.5}
    trainer.optimizer, args.optim, args.optim_args = None, "adamw_torch", "momentum=0.5"
    with pytest.raises(ValueError, match="optim_args='momentum=0.5' changes nothing of optim=adamw_torch"):
        trainer.create_optimizer()
    args.optim_args = None
    trainer.get_optimizer_cls_and_kwargs = lambda args, model: (None, {"params": []})  # as GaLore, not installed here
    with pytest.raises(ValueError, match="makes parameter groups of its own"):
        trainer.create_optimizer()


def test_the_end_of_the_schedule_can_be_said_in_transformers_words(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0, lr_scheduler_kwargs={"min_lr_rate": 0.5}, max_steps=3)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(3, optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * trainer.args.learning_rate)


def test_the_loader_is_told_what_the_arguments_say(tmp_path):
    told = dict(dataloader_num_workers=1, dataloader_prefetch_factor=3, dataloader_persistent_workers=True)
    told |= dict(dataloader_in_order=False, dataloader_multiprocessing_context="spawn")
    trainer = make_trainer(tmp_path, beta=0.0, dataloader_pin_memory=True, **told)
    loader = trainer.get_train_dataloader()
    for name, value in told.items():
        found = getattr(loader, name.removeprefix("dataloader_"))
        assert (found.get_start_method() if hasattr(found, "get_start_method") else found) == value, name
    assert not loader.pin_memory  # transformers: not with use_cpu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(torch_compile_backend="inductor"), "torch_compile=True is not supported"),
        (dict(torch_compile_mode="default"), "torch_compile=True is not supported"),
        (dict(use_transformers_paged=True), "use_transformers_continuous_batching=True is not supported"),
        (dict(data_seed=0), "data_seed=0 is not supported: TRL shuffles rows by seed. Set data_seed=None"),
        (dict(train_sampling_strategy="sequential"), "Set train_sampling_strategy='random'"),
    ],
)
def test_an_option_that_stands_for_a_refused_one_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize("name", SAE_OPTIONS)
def test_what_the_training_of_an_sae_does_not_read_is_refused(tmp_path, name):
    value = {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match=f"{name}=.* is not supported: .* Set {name}="):
        SparseAutoencoderTrainerConfig(str(tmp_path), use_cpu=True, **{name: value.get(name, True)})


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    for asked in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"checkpoint-1 holds weights alone \(save_only_model=True\)"):
            whole_checkpoint(asked, tmp_path)
