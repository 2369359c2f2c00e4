"""The estimate against small real runs: torch counts the operations, gathering the tokens, the tensors their bytes."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, Qwen2_5_VLConfig

from segcompass.loaders.image_text import image_text
from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.trainers.activation_cache import cache_activations
from segcompass.trainers.activations import batch_activations
from segcompass.trainers.collator import ImageTextCollator
from segcompass.trainers.sae_estimate import estimate_sae_training
from tests.support.tiny import BACKBONES, tiny_mllm, tiny_processor

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
SAMPLES = 6


class Rows(list):
    def select(self, indices):
        return Rows(self[index] for index in indices)


@pytest.fixture(scope="module", params=BACKBONES)
def run(request, tmp_path_factory):
    """A real small run (its MLLM, batch, gathered tokens and cache) and what was expected of it."""
    torch.manual_seed(0)
    processor = tiny_processor(request.param)
    mllm = tiny_mllm(request.param, processor).eval()
    text = "find the mug behind the sink " * 4
    rows = Rows({"image": Image.new("RGB", (28, 28), (9 * n, 0, 0)), "text": text} for n in range(SAMPLES))
    collate = ImageTextCollator(processor, image_text)
    inputs = collate(rows[:1])
    image_tokens = int((inputs["input_ids"] == mllm.config.image_token_id).sum())
    text_tokens = inputs["input_ids"].shape[1] - image_tokens
    report = cache_activations(tmp_path_factory.mktemp("cache"), mllm, rows, collate, 2, {}, samples_per_batch=1)
    sae_config = SparseAutoencoderConfig(d_in=32, d_sae=512, layer=2)
    expected = estimate_sae_training(
        mllm.config,
        sae_config,
        samples=SAMPLES,
        epochs=10,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        tokens_per_batch=64,
        buffer_size=128,
        tflops=1e-3,
        bf16=False,
    )
    return mllm, inputs, sae_config, report, expected


def test_tokens_steps_and_disk_are_those_of_a_real_run(run):
    _, _, _, report, expected = run
    assert expected.tokens == report["tokens"]
    assert expected.steps == round(10 * report["tokens"] / 64)
    assert expected.disk_gb * 1e9 == pytest.approx(report["bytes"], rel=0.05)


def test_operations_are_those_torch_counts(run):
    mllm, inputs, sae_config, _, expected = run
    mllm.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    with FlopCounterMode(display=False) as counter:
        batch_activations(mllm, inputs, 2, ())
    assert expected.mllm_flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    sae, z = SparseAutoencoder(sae_config), torch.randn(64, 32)
    with FlopCounterMode(display=False) as counter:
        sae(z).loss.backward()
    assert 64 * expected.sae_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_hours_follow_from_the_operations(run):
    _, _, _, _, expected = run
    gathering, training = SAMPLES * expected.mllm_flops, 10 * expected.tokens * expected.sae_flops
    assert expected.hours * 3600 * 1e9 == pytest.approx(10 * gathering + training)
    assert expected.hours_cached * 3600 * 1e9 == pytest.approx(gathering + training)


def test_memory_is_that_of_weights_gradients_moments_activations_buffer_and_mllm(run):
    mllm, _, sae_config, _, expected = run
    sae = SparseAutoencoder(sae_config)
    optimizer = torch.optim.Adam(sae.parameters())
    sae(torch.randn(64, 32)).loss.backward()
    optimizer.step()
    tensors = [*sae.parameters(), *(parameter.grad for parameter in sae.parameters()), *mllm.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    held += 3 * 64 * 512 * 4 + 2 * 128 * 32 * 4  # a step's activations, the shuffle buffer
    assert expected.memory_gb * 1e9 == pytest.approx(held, rel=0.02)


def backbone(name):
    if name == "qwen2.5-vl-7b":
        text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064)
        text |= dict(num_attention_heads=28, num_key_value_heads=4)
        vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    text = dict(model_type="llama", vocab_size=32064)
    if name == "llava-1.5-13b":
        text |= dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40)
        text |= dict(num_attention_heads=40, num_key_value_heads=40)
    return LlavaConfig(text_config=text)


@pytest.mark.parametrize(("name", "layer"), [("llava-1.5-7b", 16), ("llava-1.5-13b", 16), ("qwen2.5-vl-7b", 13)])
def test_recipes_state_what_the_function_computes(name, layer):
    text = (RECIPES / name / "sae.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["layer"] == layer and recipe["d_sae"] == 65_536
    assert (recipe["learning_rate"], recipe["num_train_epochs"]) == (5e-5, 10)
    config = backbone(name)
    expected = estimate_sae_training(
        config,
        SparseAutoencoderConfig(d_in=config.get_text_config().hidden_size, d_sae=65_536, layer=layer),
        samples=recipe["num_samples"] - recipe["evaluation_samples"],
        epochs=recipe["num_train_epochs"],
        image_tokens=recipe["image_tokens"],
        text_tokens=100,
        tokens_per_batch=recipe["tokens_per_batch"],
        buffer_size=recipe["buffer_size"],
        tflops=300,
        processes=recipe["processes"],
    )
    stated = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for figure in (
        f"{expected.tokens:,} tokens per pass",
        f"{expected.steps:,} steps",
        f"{expected.disk_gb:,.0f} GB of disk",
        f"{expected.memory_gb:.0f} GB of memory per process",
        f"{expected.hours:.1f} h streaming",
        f"{expected.hours_cached:.1f} h with a cache",
    ):
        assert re.search(rf"(?<![\d,.]){re.escape(figure)}", stated), figure
