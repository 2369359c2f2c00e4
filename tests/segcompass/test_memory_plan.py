"""Every recipe's model builds on the meta device at its real dimensions, and the paper's recipes fit into 8 x 80 GB."""

from pathlib import Path

import pytest
import torch
import yaml
from trl import TrlParser

from segcompass import memory_plan
from segcompass.commands import plan_memory, train_grpo, train_sae, train_sft
from segcompass.loaders import load_scenes
from segcompass.modeling_segcompass import SegCompassConfig
from segcompass.trainers import SegCompassGRPOConfig, SegCompassSFTConfig
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.grounded_losses import shared_slots
from segcompass.trainers.optimization import parameter_groups, segmentation_modules
from tests.support.tiny import tiny_segcompass

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"
LARGE = ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b")
MLLM = {"llava-1.5-7b": 7.06e9, "llava-1.5-13b": 13.35e9, "qwen2.5-vl-7b": 8.29e9}  # as published, LM head included


def config_of(name):
    if name == "mini":
        return SegCompassConfig.from_pretrained(ROOT / "examples" / "checkpoints" / "mini")
    return memory_plan.recipe_config(RECIPES / name / "grpo.yaml")


@pytest.mark.parametrize("name", ["mini", *LARGE])
def test_the_model_builds_on_meta_and_its_groups_have_the_papers_rates(name, capsys):
    config = config_of(name)
    model = memory_plan.build(config)
    assert all(p.device.type == "meta" for p in model.parameters())
    counts = memory_plan.count(model)
    for part, (total, learning) in counts.items():
        print(f"{name:<16}{part:<18}{total:>16,}{learning:>16,}")
    assert capsys.readouterr().out.count(name) == len(counts)
    for part in ("image_encoder", "sae", "mllm vision"):
        assert counts[part][1] == 0
    for part in (*segmentation_modules(model), "mllm language"):
        assert counts[part][1] > 0
    if name in MLLM:
        whole = sum(total for part, (total, _) in counts.items() if part.startswith("mllm"))
        assert whole == pytest.approx(MLLM[name], rel=0.01)
        assert counts["sae"][0] == 2 * 65536 * config.sae_config.d_in + 65536 + config.sae_config.d_in
        assert counts["image_encoder"][0] == pytest.approx(637e6, rel=0.01)
    layer = config.sae_config.layer
    for number, block in enumerate(model.mllm.model.language_model.layers, 1):
        assert all(p.requires_grad == (number > layer) for p in block.parameters())
    groups = parameter_groups(model, 2e-6, 0.01, set(), {part: 10 for part in segmentation_modules(model)})
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(part[1] for part in counts.values())


@pytest.mark.parametrize("name", LARGE)
def test_the_papers_recipes_fit_into_eight_gpus(name):
    training = yaml.safe_load((RECIPES / name / "grpo.yaml").read_text())
    config = config_of(name)
    sharded = memory_plan.plan(config, training)
    assert sharded["peak"] < sharded["room"] and sharded["responses"] <= sharded["responses_that_fit"]
    replicated = memory_plan.plan(config, training, strategy="ddp")
    assert replicated["peak"] > replicated["room"]  # a full fine-tune cannot be replicated


def test_adapters_leave_little_to_learn():
    training = yaml.safe_load((RECIPES / "llava-1.5-7b" / "grpo.yaml").read_text())
    config = config_of("llava-1.5-7b")
    full, lora = (memory_plan.plan(config, training, lora_rank=rank) for rank in (0, 16))
    moments = [dict(result["static"])["optimizer states"] for result in (full, lora)]
    assert 0 < moments[1] < moments[0] / 10
    assert dict(lora["static"])["reference MLLM"] == 0
    assert lora["counts"]["mllm head"][1] > 0 and lora["counts"]["sae"][1] == 0


def test_saved_bytes_are_what_autograd_keeps():
    linear = torch.nn.Linear(3, 5)
    x = torch.randn(7, 3, requires_grad=True)
    with memory_plan.SavedBytes(linear) as saved:
        torch.tanh(linear(x))
    assert saved.bytes == 4 * 7 * 3 + 4 * 7 * 5  # the input, and tanh's output; the weight is a parameter


SMALL_CARDS = ("qwen2.5-vl-3b-24gb", "qwen3-vl-4b-24gb", "internvl3-2b-24gb")
FITS = dict.fromkeys(SMALL_CARDS, ("ddp", 1, 24)) | {"qwen2.5-vl-7b-80gb": ("ddp", 1, 80)}  # the others: 8 of 80 GB
PARSED_BY = {"sae": train_sae, "grpo": train_grpo, "sft": train_sft, "reason": train_sft, "masks": train_sft}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses_and_its_memory_is_planned_and_fits(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, seen = PARSED_BY[path.stem], []
    parse = command.parse_with_recipe

    def parsed(parser, argv):
        seen.append(parse(parser, argv))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parse_with_recipe", parsed)
    options = ["--config", str(path), "--bf16", "false", "--output-dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.main([*options, *(() if path.stem == "sae" else ("--use-cpu", "true"))])
    assert seen[0][1].output_dir == str(tmp_path)
    strategy, gpus, memory = FITS.get(path.parent.name, ("fsdp2", 8, 80))
    choices = ["--recipe", str(path), "--strategy", strategy, "--gpus", str(gpus), "--gpu-memory", str(memory)]
    result = plan_memory.main(choices)
    assert 0 < result["peak"] < result["room"] and ": fits" in capsys.readouterr().out
    header = path.read_text().split("\nmodel")[0].split("\nmllm")[0]
    if not path.parent.name.startswith("mini"):
        assert all(word in header for word in ("# Data:", "# Memory:", "# Hours", "# Success:")), header


def test_four_bits_and_adapters_take_less(tmp_path):
    training = yaml.safe_load((RECIPES / "qwen2.5-vl-3b-24gb" / "sft.yaml").read_text())
    config = memory_plan.recipe_config(RECIPES / "qwen2.5-vl-3b-24gb" / "sft.yaml")
    assert memory_plan.recipe_choices(training) == {"lora_rank": 32, "four_bit": True}
    low, high = (memory_plan.plan(config, training, "ddp", 1, 24, 32, four_bit=packed) for packed in (True, False))
    assert low["peak"] < 24e9 * 0.9 < high["peak"]
    whole = sum(total for part, (total, _) in low["counts"].items() if part.startswith("mllm"))
    assert whole == pytest.approx(3.75e9, rel=0.02)  # as published, the LM head once
    for recipe, published in (("qwen3-vl-4b-24gb", 4.44e9), ("internvl3-2b-24gb", 2.09e9)):
        path = RECIPES / recipe / "sft.yaml"
        counts = memory_plan.plan(memory_plan.recipe_config(path), training, "ddp", 1, 24, 32, four_bit=True)["counts"]
        frozen = sum(total - trained for part, (total, trained) in counts.items() if part.startswith("mllm"))
        assert frozen == pytest.approx(published, rel=0.01), recipe  # without adapters and the copy of an own head
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**training, "use_peft": False}))
    with pytest.raises(ValueError, match="load_in_4bit without use_peft"):
        plan_memory.main(["--recipe", str(path)])


def test_grounded_models_are_planned():
    training = yaml.safe_load((RECIPES / "llava-1.5-7b" / "sft.yaml").read_text())
    config = config_of("llava-1.5-7b")
    plain = memory_plan.plan(config, training)
    config.concept_reading = "grounded"
    grounded = memory_plan.plan(config, training)
    assert grounded["peak"] > plain["peak"] * 0.9 and "grounded_reading" in grounded["counts"]


def test_a_grounded_model_plans_no_less_than_a_step_in_which_every_feature_shares_a_slot_keeps():
    """Of a tiny one, whose numbers are scaled: what `ground` keeps for the backward pass, by features and patches."""
    model, processor = tiny_segcompass("llava", concept_reading="grounded")
    row = next(iter(load_scenes("train", seed=5, num_samples=1, size=64, streaming=True)))
    inputs = SegCompassCollator(processor, 4 * model.config.key_grid)([row])
    inputs.pop("mask_targets")
    kept = {}
    for soft in (False, True):
        with shared_slots(model, soft), memory_plan.SavedBytes(model) as saved:
            model.train()(**inputs)
        kept[soft] = saved.bytes
    features, slots = model.config.sae_config.d_sae, model.config.num_slots
    patches, length = int((inputs["input_ids"] == model.config.image_token_id).sum()), inputs["input_ids"].shape[1]
    assert kept[True] - kept[False] < 4 * features * (5 * patches + 4 * length + 12 * slots)


@pytest.mark.parametrize(
    ("stage", "arguments"), [("sft", SegCompassSFTConfig), ("grpo", SegCompassGRPOConfig)], ids=["sft", "grpo"]
)
@pytest.mark.parametrize("name", LARGE)
def test_the_recipes_parse(name, stage, arguments, monkeypatch, tmp_path):
    recipe = yaml.safe_load((RECIPES / name / f"{stage}.yaml").read_text())
    recipe |= {"bf16": False, "use_cpu": True, "output_dir": str(tmp_path)}  # what this machine can do
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    classes = [{"sft": train_sft.SFTArguments, "grpo": train_grpo.GRPOArguments}[stage], arguments]
    if stage == "grpo":
        from trl import ModelConfig

        classes.append(ModelConfig)
    parsed = TrlParser(classes).parse_args_and_config(["--config", str(path)])
    assert parsed[1].gradient_checkpointing and [each.split("/")[0] for each in parsed[0].dataset] == ["data"] * 4
    if stage == "grpo":
        default = SegCompassGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        for field in ("num_generations", "beta", "epsilon", "learning_rate", "lambda_s", "lambda_c", "lambda_d",
                      "reward_weights", "loss_type", "max_completion_length", "final_div_factor"):  # fmt: skip
            assert getattr(parsed[1], field) == getattr(default, field)
        batch = parsed[1].per_device_train_batch_size * parsed[1].gradient_accumulation_steps
        assert batch == 16  # times 8 processes: 128 responses
