"""The settings of cold start and joint training: one vocabulary, on the command line and in recipes."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import GRPOConfig, TrlParser

from segcompass.trainers import SegCompassGRPOConfig, SegCompassSFTConfig
from segcompass.trainers.losses import LossWeights
from segcompass.trainers.optimization import SEGMENTATION_MODULES, RateMultipliers

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
CONFIGS = {SegCompassSFTConfig: TrainingArguments, SegCompassGRPOConfig: GRPOConfig}
SHARED = [field.name for base in (LossWeights, RateMultipliers) for field in dataclasses.fields(base)]
both_configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


def parse(config, folder, recipe, *options):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder), "use_cpu": True, "bf16": False, **recipe}))
    return TrlParser(config).parse_args_and_config(["--config", str(path), *options])[0]


@both_configs
def test_each_loss_weight_and_rate_is_an_option_of_both_trainers(config, tmp_path):
    assert {"lambda_s", "lambda_c", "lambda_d", "lambda_focal", "lambda_heatmap_dice"} <= set(SHARED)
    for name in SHARED:
        assert getattr(parse(config, tmp_path, {name: 0.25}), name) == 0.25
        assert getattr(parse(config, tmp_path, {}, f"--{name}", "0.5"), name) == 0.5
    weights = config(str(tmp_path), use_cpu=True, bf16=False, lambda_focal=5.0)
    assert isinstance(weights, LossWeights) and weights.lambda_focal == 5.0


def test_both_trainers_weigh_the_terms_alike_and_only_joint_training_has_the_papers_rates(tmp_path):
    cold, joint = (config(str(tmp_path), use_cpu=True, bf16=False) for config in CONFIGS)
    for name in (field.name for field in dataclasses.fields(LossWeights)):
        assert getattr(cold, name) == getattr(joint, name) == getattr(LossWeights(), name)
    assert cold.rate_multipliers() == dict.fromkeys((*SEGMENTATION_MODULES, "grounded_reading"), 1.0)
    papers = {"query_codebook": 25.0, "slot_mapper": 80.0, "mask_decoder": 10.0}
    assert joint.rate_multipliers() == {**papers, "grounded_reading": 80.0}


@both_configs
def test_what_both_configs_share_is_no_field_of_theirs_upstream(config):
    upstream = CONFIGS[config].__dataclass_fields__
    assert not set(SHARED) & set(upstream) and "reward_funcs" not in upstream


@both_configs
def test_helps_are_sentences(config):
    ours = set(config.__annotations__) | set(SHARED)
    for field in dataclasses.fields(config):
        if field.name in ours:
            text = field.metadata["help"]
            assert text[0].isupper() or text.split()[0] in ("AdamW's",), (field.name, text)
            assert text.endswith("."), (field.name, text)


@both_configs
def test_choices_are_shown_and_checked_on_the_command_line(config, tmp_path, capsys):
    choices = {"query_source": "tokens", "training_mode": "seg", "reward_mask_source": "reference"}
    choices = {name: value for name, value in choices.items() if name in config.__dataclass_fields__}
    parser = HfArgumentParser(config)
    for name, value in choices.items():
        assert f"--{name} {{" in parser.format_help().replace("\n", " ")
        assert get_type_hints(config)[name].__args__
        assert getattr(parse(config, tmp_path, {name: value}), name) == value
        with pytest.raises(SystemExit):
            parse(config, tmp_path, {}, f"--{name}", "nonsense")
        assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_rewards_of_a_recipe_are_looked_for_before_anything_is_loaded(tmp_path):
    builtin = "segcompass.trainers.rewards.mask_reward"
    assert parse(SegCompassGRPOConfig, tmp_path, {"reward_funcs": [builtin]}).reward_funcs == [builtin]
    options = ("--reward_funcs", builtin, builtin, "--reward_weights", "1", "2")
    assert parse(SegCompassGRPOConfig, tmp_path, {}, *options).reward_funcs == [builtin, builtin]
    with pytest.raises(ValueError, match="has no function 'no_reward'"):
        parse(SegCompassGRPOConfig, tmp_path, {"reward_funcs": ["segcompass.trainers.rewards.no_reward"]})


def recipes():
    stages = {"sft": SegCompassSFTConfig, "masks": SegCompassSFTConfig, "reason": SegCompassSFTConfig}
    stages["grpo"] = SegCompassGRPOConfig
    found = sorted(RECIPES.glob("*/*.yaml"))
    return [
        pytest.param(path, stages[path.stem], id=f"{path.parent.name}/{path.stem}")
        for path in found
        if path.stem in stages
    ]


@pytest.mark.parametrize(("path", "config"), recipes())
def test_recipes_name_only_what_differs_from_the_defaults(path, config):
    recipe = yaml.safe_load(path.read_text())
    recipe.pop("num_generations", None)  # by which `segcompass plan-memory` knows a GRPO recipe
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if field.name in recipe:
            assert recipe[field.name] != default, f"{field.name} has this value by default"
