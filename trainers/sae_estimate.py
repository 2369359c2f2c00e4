"""What training a sparse autoencoder will take, from shapes alone: tokens, steps, disk, memory, hours.

Counts matrix products, two operations per multiply-add. Hours follow from an assumed speed, which the caller names.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.configuration_segcompass import SparseAutoencoderConfig
from segcompass.modeling_segcompass.sae_activations import SAE_ACTIVATIONS


@dataclass
class SparseAutoencoderEstimate:
    """What `estimate_sae_training` expects; GB are 10^9 bytes."""

    tokens: int
    """Tokens in one pass over the samples."""
    steps: int
    """Optimizer steps of all passes."""
    disk_gb: float
    """Of a cache of all tokens, with 2 bytes per number; streaming takes none."""
    memory_gb: float
    """Of one process: SAE with gradients and Adam's moments, one step's activations, shuffle buffer, MLLM weights."""
    mllm_flops: float
    """Operations of the MLLM up to layer L on one sample."""
    sae_flops: float
    """Operations of one training step of the SAE on one token."""
    hours: float
    """Of all passes on all processes, streaming: the MLLM runs anew in every pass."""
    hours_cached: float
    """The same with a cache: the MLLM runs once."""


def estimate_sae_training(
    mllm_config: PreTrainedConfig,
    sae_config: SparseAutoencoderConfig,
    samples: int,
    epochs: float,
    image_tokens: int,
    text_tokens: int,
    tokens_per_batch: int,
    buffer_size: int,
    tflops: float,
    processes: int = 1,
    bf16: bool = True,
) -> SparseAutoencoderEstimate:
    """Estimate from the shapes of the MLLM (built without weights) and of the SAE.

    Args:
        mllm_config: configuration of the MLLM.
        sae_config: configuration of the SAE.
        samples: rows of the data.
        epochs: passes over them.
        image_tokens: image tokens per sample, on average.
        text_tokens: other tokens per sample, on average, as they reach the SAE (no padding).
        tokens_per_batch: tokens in one step of one process.
        buffer_size: tokens that one process mixes with one another.
        tflops: 10^12 operations per second that one process achieves.
        processes: how many train together.
        bf16: bfloat16 autocast for the SAE and bfloat16 MLLM weights; else float32.

    Returns:
        SparseAutoencoderEstimate.
    """
    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(mllm_config)
    layer, d_in, d_sae = sae_config.layer, sae_config.d_in, sae_config.d_sae
    length = image_tokens + text_tokens
    tokens = samples * length

    blocks = backbone_of(mllm).blocks(mllm)
    heads = mllm_config.get_text_config().num_attention_heads
    mllm_flops = layer * _block_flops(blocks[0], heads, length) + _vision_flops(mllm, image_tokens)
    cost = SAE_ACTIVATIONS[sae_config.activation].training_cost(sae_config)

    number = 2 if bf16 else 4
    memory = 16 * (2 * d_in * d_sae + d_sae + d_in)
    memory += cost.arrays * number * tokens_per_batch * d_sae
    memory += 2 * 4 * buffer_size * d_in
    memory += number * sum(parameter.numel() for parameter in mllm.parameters())

    per_second = tflops * 1e12 * processes
    training = epochs * tokens * cost.flops / per_second / 3600
    gathering = samples * mllm_flops / per_second / 3600
    return SparseAutoencoderEstimate(
        tokens=tokens,
        steps=max(1, round(epochs * tokens / (tokens_per_batch * processes))),
        disk_gb=2 * d_in * tokens / 1e9,
        memory_gb=memory / 1e9,
        mllm_flops=mllm_flops,
        sae_flops=cost.flops,
        hours=training + epochs * gathering,
        hours_cached=training + gathering,
    )


def _weights(module):
    """Weights that multiply every token: matrices of linear layers."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def _block_flops(block, heads, length):
    """Operations of one decoder block on `length` tokens."""
    return 2 * length * _weights(block) + 4 * length**2 * heads * block.self_attn.head_dim


def _vision_flops(mllm, image_tokens):
    """Operations of vision tower and projector on one image: all blocks, with full attention (Qwen's is windowed)."""
    backbone = backbone_of(mllm)
    tower, projector = backbone.vision_tower(mllm), backbone.projector(mllm)
    patches = image_tokens * backbone.patches_per_token(mllm.config)
    projection = 0 if projector is None else _weights(projector)
    inside = any(module is projector for module in tower.modules())
    blocks = _weights(tower) - (projection if inside else 0)
    patch = sum(
        layer.weight.numel() for layer in tower.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d))
    )
    attention = 4 * patches**2 * mllm.config.vision_config.hidden_size * backbone.vision_depth(mllm.config)
    return 2 * patches * (blocks + patch) + attention + 2 * image_tokens * projection
