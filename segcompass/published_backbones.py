"""The published dimensions of the backbones that the recipes name, so that a plan needs no network and no weights."""

from typing import Any

from transformers import (
    InternVLConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SamVisionConfig,
)

from segcompass.modeling_segcompass.backbone_files import read_config

CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


def _llava(hidden: int, intermediate: int, layers: int, heads: int) -> LlavaConfig:
    text = dict(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return LlavaConfig(vision_config=CLIP, text_config=text, image_token_index=32000, tie_word_embeddings=False)


def _qwen(
    hidden: int, intermediate: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool
) -> Qwen2_5_VLConfig:
    text = dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=128000,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=151655, tie_word_embeddings=tied)


def _qwen3_4b() -> Qwen3VLConfig:
    text = dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=262144,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    )
    vision: dict[str, Any] = dict(
        depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560
    )
    vision |= dict(deepstack_visual_indexes=[5, 11, 17])
    return Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=151655, tie_word_embeddings=True)


def _internvl3_2b() -> InternVLConfig:
    text = dict(
        model_type="qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151674,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    vision: dict[str, Any] = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    vision |= dict(image_size=[448, 448], patch_size=[14, 14])
    return InternVLConfig(text_config=text, vision_config=vision, image_token_id=151667, tie_word_embeddings=False)


def _sam_huge() -> SamVisionConfig:
    return SamVisionConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
        mlp_dim=5120,
    )


PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": lambda: _llava(4096, 11008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": lambda: _llava(5120, 13824, 40, 40),
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: _qwen(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: _qwen(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_4b,
    "OpenGVLab/InternVL3-2B-hf": _internvl3_2b,
    "facebook/sam-vit-huge": _sam_huge,
}


def backbone_configs(mllm: str, image_encoder: str) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Configurations of an MLLM and an image encoder, without weights.

    Args:
        mllm: Hub id (one that is listed here needs no network) or folder.
        image_encoder: the same of the image encoder, or of a model that holds one as its `vision_config`.

    Returns:
        The MLLM's configuration and the image encoder's.

    Raises:
        ValueError: an id that is not listed here and cannot be reached.
    """
    configs = [
        PUBLISHED[name]() if name in PUBLISHED else read_config(name, option)
        for name, option in ((mllm, "mllm"), (image_encoder, "image_encoder"))
    ]
    return configs[0], getattr(configs[1], "vision_config", configs[1])
