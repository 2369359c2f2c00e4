"""What SegCompassGRPOTrainer leans on inside TRL, so that an upgrade fails here, by name, and not in training."""

import ast
import inspect
import re
import textwrap

import pytest
import torch
import trl
from packaging.version import Version
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, pad, shuffle_sequence_dict, split_tensor_dict

from segcompass.trainers import (
    checkpoints,
    checks,
    grpo_trainer,
    joint_forward,
    optimization,
    reward_masks,
    rollout_rows,
)
from segcompass.trainers.checkpoints import WholeCheckpoints
from segcompass.trainers.grpo_config import SegCompassGRPOConfig
from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
from segcompass.trainers.signed_saves import SignedSaves

OVERRIDDEN = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_run_epoch": ["self", "model", "epoch"],
    "_get_output_dir": ["self", "trial"],
    "_tokenize_prompts": ["self", "prompts"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save": ["self", "output_dir", "state_dict"],
    "create_optimizer": ["self", "model"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "log": ["self", "logs", "start_time"],
    "training_step": ["self", "model", "inputs"],
}
# TRL's and Trainer's private attributes and methods that our files read, write or call, beside those overridden
PRIVATE = {
    grpo_trainer: {
        "_buffered_inputs",
        "_created_lr_scheduler",
        "_metrics",
        "_step",
        "_total_train_tokens",
    },
    reward_masks: {"_tokenizer"},
    checks: set(),
    checkpoints: set(),
    joint_forward: set(),
    optimization: set(),
    rollout_rows: set(),
}
OURS = {
    "_base",
    "_core",
    "_make_reference",
    "_overlays",
    "_response_lengths",
    "_rollout",
    "_supervised_rows",
    "_timed_steps",
    "_timer",
    "_unformatted",
    "_watch_format",
    "_writing",
}
HELPERS = {
    add_fused_lm_head: ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
    disable_gradient_checkpointing: ["model", "gradient_checkpointing_kwargs"],
    pad: ["tensors", "padding_value", "padding_side"],
    prepare_deepspeed: ["model", "accelerator"],
    prepare_fsdp: ["model", "accelerator"],
    GRPOTrainer.get_optimizer_cls_and_kwargs: ["args", "model"],
    GRPOTrainer.get_decay_parameter_names: ["self", "model"],
}


def parameters(function):
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def source(method):
    return textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, method))))


def tree(method):
    return ast.parse(source(method)).body[0]


def method_calls(node, name):
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return [call for call in calls if call.func.attr == name]


def loads(node, name):
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]


def test_trl_is_a_reviewed_version():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), (
        f"TRL {trl.__version__} is not reviewed: read what changed in GRPOTrainer, then move this bound"
    )


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_signature_of_overridden(method):
    expected = OVERRIDDEN[method]
    assert parameters(getattr(GRPOTrainer, method))[: len(expected)] == expected


@pytest.mark.parametrize("helper", HELPERS, ids=lambda helper: helper.__name__)
def test_signature_of_used(helper):
    assert parameters(helper)[: len(HELPERS[helper])] == HELPERS[helper]


@pytest.mark.parametrize("module", PRIVATE, ids=lambda module: module.__name__.split(".")[-1])
def test_every_private_of_trl_is_named_here_and_still_exists(module):
    """In the trainer itself it is `self._x`; the files beside it are handed the trainer and read `trainer._x`."""
    owners = ("self",) if module in (grpo_trainer, checkpoints) else ("trainer", "GRPOTrainer")
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner in owners or owner == "super()":
                used.add(node.attr)
    assert used - set(OVERRIDDEN) - OURS == PRIVATE[module]
    upstream = "".join(inspect.getsource(cls) for cls in GRPOTrainer.__mro__ if cls is not object)
    assert all(re.search(rf"\b(self\.|def ){name}\b", upstream) for name in used - OURS)
    assert not any(re.search(rf"\bself\.{name}\b", upstream) for name in OURS)


def test_nothing_else_of_trl_is_overridden():
    own = {**vars(SignedSaves), **vars(WholeCheckpoints), **vars(SegCompassGRPOTrainer)}
    ours = {name for name, value in own.items() if callable(value) or type(value) is property}
    assert {name for name in ours if hasattr(GRPOTrainer, name)} - {"__init__"} == set(OVERRIDDEN)
    assert not re.search(
        r"self\.(core|image_features|log_mean|mode|scoring_batch_size)\b", inspect.getsource(GRPOTrainer)
    )


def test_the_loss_uses_the_model_for_one_unchunked_forward():
    method = tree("_compute_loss")
    (call,) = method_calls(method, "_get_per_token_logps_and_entropies")
    (use,) = loads(method, "model")
    assert call.args[0] is use
    assert "batch_size" not in {keyword.arg for keyword in call.keywords}


def test_log_probabilities_only_call_the_model_and_read_three_fields():
    method = tree("_get_per_token_logps_and_entropies")
    (use,) = loads(method, "model")
    (call,) = [n for n in ast.walk(method) if isinstance(n, ast.Call) and n.func is use]
    assert not call.args and {"labels", "fused_lm_head"} <= {keyword.arg for keyword in call.keywords}
    read = [n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute) and loads(n.value, "outputs")]
    assert set(read) == {"log_probs", "entropy", "aux_loss"}
    wanted = {"batch_size", "num_images", "pixel_values", "image_grid_thw", "mm_token_type_ids"}
    assert wanted <= set(parameters(GRPOTrainer._get_per_token_logps_and_entropies))


def test_every_scoring_pass_comes_before_the_rewards_and_names_its_model():
    method = tree("_generate_and_score_completions")
    (rewards,) = method_calls(method, "_calculate_rewards")
    passes = method_calls(method, "_get_per_token_logps_and_entropies")
    assert max(call.lineno for call in passes) < rewards.lineno
    assert {ast.unparse(call.args[0]) for call in passes} == {"self.model", "self.ref_model"}
    assert ast.unparse(rewards) == "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)"


def test_rewards_receive_every_column_of_the_rows():
    assert "reward_kwargs = {key: [example[key] for example in inputs] for key in keys}" in source("_calculate_rewards")


def test_rows_reach_the_rollout_uncollated_and_bring_their_prompt_and_image():
    assert "data_collator=identity" in source("__init__")
    rollout = source("_generate_and_score_completions")
    assert '["prompt"] for x in inputs' in rollout and 'example.get("image")' in rollout


def test_the_batch_keeps_tensors_and_lists_of_a_sample_together():
    batch = {"prompt_ids": torch.arange(8)[:, None], "tensor": torch.arange(8), "list": list(range(8))}
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 2):
        assert part["prompt_ids"][:, 0].tolist() == part["tensor"].tolist() == part["list"]
    buffering = source("_prepare_inputs")
    assert "shuffle_sequence_dict" in buffering and "split_tensor_dict" in buffering


def test_the_loss_arrives_divided_by_the_accumulation_steps():
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert "loss / normalizer" in source("_compute_loss")
    assert "self.current_gradient_accumulation_steps" in source("_compute_loss")


def test_beta_zero_builds_no_reference():
    init = source("__init__")
    assert re.search(r"self\.beta = args\.beta\s+if self\.beta == 0\.0:.*?self\.ref_model = None", init, re.S)


def test_the_fused_head_is_an_attribute_of_the_instance():
    class Config:
        def get_text_config(self):
            return self

    class Model(nn.Module):
        config = Config()

        def forward(self, input_ids=None):
            return input_ids

    model = Model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    assert "forward" in vars(model)
    del model.__dict__["forward"]
    assert model(3) == 3


def test_image_placeholders_in_structured_messages_are_filled():
    text = {"type": "text", "text": "the mug"}
    filled = [{"role": "user", "content": [{"type": "image", "image": "pixels"}, text]}]
    structured = [{"role": "user", "content": [{"type": "image"}, text]}]
    assert prepare_multimodal_messages(structured, images=["pixels"]) == filled
    assert structured == [{"role": "user", "content": [{"type": "image"}, text]}]


def test_settings_that_are_redefined_still_exist():
    inherited = {field for field in SegCompassGRPOConfig.__annotations__ if field in GRPOConfig.__dataclass_fields__}
    assert inherited == {
        "learning_rate",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "num_generations",
        "max_completion_length",
        "beta",
        "epsilon",
        "loss_type",
        "use_bias_correction_kl",
        "scale_rewards",
        "reward_weights",
        "remove_unused_columns",
    }
