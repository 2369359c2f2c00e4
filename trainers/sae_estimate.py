"""What training a sparse autoencoder will take, from shapes alone: tokens, steps, disk, memory, hours.

Counts matrix products, two operations a multiply-add. Hours follow from an assumed speed, which the caller names.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText


@dataclass
class SparseAutoencoderEstimate:
    """What `estimate_sae_training` expects; GB are 10^9 bytes."""

    tokens: int
    """Tokens in one pass over the samples."""
    steps: int
    """Optimizer steps of all passes."""
    disk_gb: float
    """Of a cache of all tokens, in 2 bytes a number; streaming takes none."""
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
    mllm_config,
    sae_config,
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
        mllm_config: of a transformers LLaVA or Qwen2.5-VL.
        samples, epochs: rows, and passes over them.
        image_tokens, text_tokens: of a sample, on average, as they reach the SAE (no padding).
        tokens_per_batch, buffer_size: of one process.
        tflops: 10^12 operations a second that one process achieves.
        bf16: bfloat16 autocast for the SAE and bfloat16 MLLM weights; else float32.
    """
    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(mllm_config)
    layer, d_in, d_sae = sae_config.layer, sae_config.d_in, sae_config.d_sae
    length = image_tokens + text_tokens
    tokens = samples * length

    blocks = mllm.get_decoder().layers
    text = mllm_config.get_text_config()
    attention = 4 * length**2 * text.num_attention_heads * blocks[0].self_attn.head_dim
    mllm_flops = layer * (2 * length * _weights(blocks[0]) + attention) + _vision_flops(mllm, image_tokens)

    if sae_config.activation in ("topk", "batchtopk"):
        sae_flops = 2 * d_in * d_sae + 8 * sae_config.k * d_in  # the encoder forward; all else on kept features
        held = 1
    else:
        sae_flops = 10 * d_in * d_sae
        held = 3  # pre-activations, activations, and the gradient of one of them

    number = 2 if bf16 else 4
    memory = 16 * (2 * d_in * d_sae + d_sae + d_in)
    memory += held * number * tokens_per_batch * d_sae
    memory += 2 * 4 * buffer_size * d_in
    memory += number * sum(parameter.numel() for parameter in mllm.parameters())

    per_second = tflops * 1e12 * processes
    training = epochs * tokens * sae_flops / per_second / 3600
    gathering = samples * mllm_flops / per_second / 3600
    return SparseAutoencoderEstimate(
        tokens=tokens,
        steps=max(1, round(epochs * tokens / (tokens_per_batch * processes))),
        disk_gb=2 * d_in * tokens / 1e9,
        memory_gb=memory / 1e9,
        mllm_flops=mllm_flops,
        sae_flops=sae_flops,
        hours=training + epochs * gathering,
        hours_cached=training + gathering,
    )


def _weights(module):
    """Weights that multiply every token: matrices of linear layers."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def _vision_flops(mllm, image_tokens):
    """Operations of vision tower and projector on one image: all blocks, with full attention (Qwen's is windowed)."""
    config = mllm.config.vision_config
    qwen = hasattr(config, "spatial_merge_size")
    patches = image_tokens * (config.spatial_merge_size**2 if qwen else 1)
    tower = mllm.model.visual if qwen else mllm.model.vision_tower
    depth = config.depth if qwen else config.num_hidden_layers
    projector = _weights(tower.merger) if qwen else _weights(mllm.model.multi_modal_projector)
    blocks = _weights(tower) - (projector if qwen else 0)
    patch = sum(
        layer.weight.numel() for layer in tower.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d))
    )
    attention = 4 * patches**2 * config.hidden_size * depth
    return 2 * patches * (blocks + patch) + attention + 2 * image_tokens * projector
