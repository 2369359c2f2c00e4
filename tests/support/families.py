"""Tiny random models of many families of MLLMs: transformers' own classes and image processors, a few thousand weights.

`tiny_family(name)` makes the processor and the model of one family as a user would, from its parts. Where a family sees
an image in tiles, the tiny one does too, so that an image of 120 x 40 pixels becomes several.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoderConfig

from .tiny import tiny_sam, tiny_tokenizer

IMAGE_PLACE = "{{image}}"
CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    + IMAGE_PLACE
    + "\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SIDE, PATCH = 28, 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


@dataclass(frozen=True)
class TinyFamily:
    """How one family is built."""

    images: tuple[str, str, dict[str, Any]]
    """module, class and settings of its image processor."""
    mllm: Callable[[Callable[[str], int], dict[str, Any]], Any]
    """(token -> id, settings of the language model) -> the MLLM."""
    written: str = "<image>"
    """what stands for an image in the chat template."""
    tokens: dict[str, str] = field(default_factory=dict)
    """attributes of its tokenizer -> tokens."""
    more: tuple[str, ...] = ()
    """other tokens that its tokenizer knows."""
    settings: dict[str, Any] = field(default_factory=dict)
    """of its own processor."""


def _clip(**settings):
    return dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
        **settings,
    )


def _siglip():
    return {**_clip(), "model_type": "siglip_vision_model", "vision_use_head": False}


def _vit(**settings):
    """A vision configuration of the common names."""
    base = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return {**base, "image_size": SIDE, "patch_size": PATCH, **settings}


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MERGING = dict(depth=2, hidden_size=32, num_heads=4, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)


def _qwen_ids(ids):
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: ids(token) for name, token in names.items()}


def _qwen2_vl(ids, text):
    vision = {**MERGING, "embed_dim": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        vision_config=vision, text_config=dict(text, rope_parameters=ROPE), **_qwen_ids(ids)
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(ids, text):
    vision = {**MERGING, "intermediate_size": 64, "window_size": 28, "out_hidden_size": 32}
    vision["fullatt_block_indexes"] = [1]
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=dict(text, rope_parameters=ROPE), **_qwen_ids(ids)
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(ids, text):
    vision = {**MERGING, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        text_config=dict(text, head_dim=8, rope_parameters=dict(ROPE, mrope_interleaved=True)),
        **_qwen_ids(ids),
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen3_5(ids, text):
    vision = {**MERGING, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    rope = dict(ROPE, mrope_interleaved=True, partial_rotary_factor=1.0)
    config = transformers.Qwen3_5Config(
        vision_config=vision, text_config=dict(text, head_dim=8, rope_parameters=rope, **linear), **_qwen_ids(ids)
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def _llava(ids, text):
    config = transformers.LlavaConfig(
        vision_config=_clip(),
        text_config=dict(text, model_type="llama"),
        image_token_index=ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return transformers.LlavaForConditionalGeneration(config)


def _vipllava(ids, text):
    config = transformers.VipLlavaConfig(
        vision_config=_clip(),
        text_config=dict(text, model_type="llama"),
        image_token_index=ids("<image>"),
        vision_feature_layers=[-1, -2],
    )
    return transformers.VipLlavaForConditionalGeneration(config)


def _llava_next(ids, text):
    config = transformers.LlavaNextConfig(
        vision_config=_clip(),
        text_config=dict(text, model_type="llama"),
        image_token_index=ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def _llava_onevision(ids, text):
    config = transformers.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=dict(text, model_type="qwen2"),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _internvl(ids, text):
    config = transformers.InternVLConfig(
        vision_config=_vit(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        text_config=dict(text, model_type="qwen2"),
        image_token_id=ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _idefics(config, model):
    def build(ids, text):
        text = dict(text, model_type="llama")
        return model(config(vision_config=_vit(), text_config=text, image_token_id=ids("<image>"), scale_factor=2))

    return build


def _gemma3(ids, text):
    config = transformers.Gemma3Config(
        vision_config=_siglip(),
        text_config=dict(text, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        tie_word_embeddings=False,
    )
    mllm = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(mllm.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zeros otherwise
    return mllm


def _gemma4(ids, text):
    vision = dict(num_key_value_heads=4, head_dim=8, pooling_kernel_size=2, position_embedding_size=64)
    words = dict(head_dim=8, global_head_dim=8, sliding_window=64, vocab_size_per_layer_input=text["vocab_size"])
    config = transformers.Gemma4Config(
        vision_config=_vit(**vision),
        audio_config=None,
        text_config=dict(text, hidden_size_per_layer_input=8, **words),
        image_token_id=ids("<|image|>"),
        boi_token_id=ids("<|begin_of_image|>"),
        eoi_token_id=ids("<|end_of_image|>"),
        video_token_id=ids("<|video|>"),
        audio_token_id=ids("<unk>"),
        tie_word_embeddings=False,
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def _paligemma(ids, text):
    config = transformers.PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=dict(text, model_type="gemma", head_dim=8),
        image_token_index=ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _glm4v(ids, text):
    rope = dict(ROPE, partial_rotary_factor=1.0)
    names = {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
    names |= {"image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>"}
    names |= {"video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>"}
    config = transformers.Glm4vConfig(
        vision_config={**MERGING, "intermediate_size": 64, "image_size": SIDE, "out_hidden_size": 32},
        text_config=dict(text, rope_parameters=rope),
        **{name: ids(token) for name, token in names.items()},
    )
    return transformers.Glm4vForConditionalGeneration(config)


def _aya_vision(ids, text):
    config = transformers.AyaVisionConfig(
        vision_config=_siglip(),
        text_config=dict(text, model_type="cohere2", head_dim=8, sliding_window=64),
        image_token_index=ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    return transformers.AyaVisionForConditionalGeneration(config)


def _deepseek_vl(ids, text):
    config = transformers.DeepseekVLConfig(
        vision_config=_siglip(), text_config=dict(text, model_type="llama"), image_token_id=ids("<image_placeholder>")
    )
    return transformers.DeepseekVLForConditionalGeneration(config)


SQUARE = {"height": SIDE, "width": SIDE}
CLIP = ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE})
QWEN = (
    "qwen2_vl",
    "Qwen2VLImageProcessorPil",
    dict(min_pixels=SIDE**2, max_pixels=(2 * SIDE) ** 2, patch_size=PATCH, merge_size=2, temporal_patch_size=2),
)
TILES = ("got_ocr2", "GotOcr2ImageProcessorPil", {"size": SQUARE, "min_patches": 1, "max_patches": 6})
SPLIT = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
QWEN_TOKEN = "<|vision_start|><|image_pad|><|vision_end|>"
GLM_TOKENS = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>")
GLM_TOKENS += ("<|end_of_video|>",)
GLM_SIZES = {"shortest_edge": 2 * SIDE**2, "longest_edge": 2 * (2 * SIDE) ** 2}
IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
IDEFICS_TOKENS += tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))

TINY_FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(CLIP, _llava, settings={"patch_size": PATCH}),
    "vipllava": TinyFamily(
        CLIP,
        _vipllava,
        settings={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_next": TinyFamily(
        (
            "llava_next",
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        ),
        _llava_next,
        settings={
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": TinyFamily(
        (
            "llava_onevision",
            "LlavaOnevisionImageProcessorPil",
            {"size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        ),
        _llava_onevision,
        more=("<video>",),
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": TinyFamily(QWEN, _qwen2_vl, QWEN_TOKEN),
    "qwen2_5_vl": TinyFamily(QWEN, _qwen2_5_vl, QWEN_TOKEN),
    "qwen3_vl": TinyFamily(QWEN, _qwen3_vl, QWEN_TOKEN),
    "qwen3_5": TinyFamily(QWEN, _qwen3_5, QWEN_TOKEN),
    "internvl": TinyFamily(
        TILES,
        _internvl,
        "<IMG_CONTEXT>",
        tokens={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        | {"video_token": "<video>"},
        settings={"image_seq_length": 4},
    ),
    "gemma3": TinyFamily(
        ("gemma3", "Gemma3ImageProcessorPil", {"size": SQUARE}),
        _gemma3,
        "<start_of_image>",
        tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        settings={"image_seq_length": 4},
    ),
    "gemma4": TinyFamily(
        ("gemma4", "Gemma4ImageProcessorPil", dict(patch_size=PATCH, pooling_kernel_size=2, max_soft_tokens=70)),
        _gemma4,
        "<|image|>",
        tokens={"image_token": "<|image|>", "boi_token": "<|begin_of_image|>", "eoi_token": "<|end_of_image|>"},
        more=("<|video|>",),
    ),
    "paligemma": TinyFamily(
        ("siglip", "SiglipImageProcessorPil", {"size": SQUARE, "image_seq_length": 16}),
        _paligemma,
    ),
    "smolvlm": TinyFamily(
        ("smolvlm", "SmolVLMImageProcessorPil", SPLIT),
        _idefics(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
        more=IDEFICS_TOKENS,
        settings={"image_seq_len": 4},
    ),
    "idefics3": TinyFamily(
        ("idefics3", "Idefics3ImageProcessorPil", SPLIT),
        _idefics(transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        more=IDEFICS_TOKENS,
        settings={"image_seq_len": 4},
    ),
    "glm4v": TinyFamily(
        (
            "glm4v",
            "Glm4vImageProcessorPil",
            dict(size=GLM_SIZES, patch_size=PATCH, merge_size=2, temporal_patch_size=2),
        ),
        _glm4v,
        "<|begin_of_image|><|image|><|end_of_image|>",
        more=GLM_TOKENS,
    ),
    "aya_vision": TinyFamily(
        TILES,
        _aya_vision,
        more=("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"),
        settings={"img_size": SIDE, "patch_size": PATCH, "downsample_factor": 2},
    ),
    "deepseek_vl": TinyFamily(
        ("deepseek_vl", "DeepseekVLImageProcessorPil", {"size": SQUARE}),
        _deepseek_vl,
        "<image_placeholder>",
        tokens={"image_token": "<image_placeholder>"},
        settings={"num_image_tokens": 16},
    ),
}


def family_tokenizer(family: TinyFamily) -> Any:
    """One token per printable character, and the family's own."""
    plain = tiny_tokenizer("llava")
    plain.add_special_tokens(
        {"additional_special_tokens": [*plain.additional_special_tokens, *family.tokens.values(), *family.more]}
    ) if hasattr(plain, "additional_special_tokens") else plain.add_tokens(
        [*family.tokens.values(), *family.more], special_tokens=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=family.tokens,
    )


def family_processor(name: str, num_slots: int = 3) -> SegCompassProcessor:
    """The processor of a tiny family, made of its parts."""
    family = TINY_FAMILIES[name]
    module, kind, settings = family.images
    images = getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), kind)(**settings)
    own = dict(family.settings)
    named = {"patch_size": own.pop("patch_size")} if name == "llava" else {}
    return SegCompassProcessor(
        image_processor=images,
        tokenizer=family_tokenizer(family),
        encoder_image_processor=SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}),
        chat_template=CHAT.replace(IMAGE_PLACE, family.written),
        prompt_template="{instruction}",
        num_slots=num_slots,
        max_prompt_length=700,
        mllm_type=name,
        family_settings=own,
        **named,
    )


def family_mllm(name: str, processor: SegCompassProcessor, hidden: int = 32, layers: int = 4) -> Any:
    """The MLLM of a tiny family, with random weights."""
    tokenizer = processor.tokenizer
    text = dict(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    mllm = TINY_FAMILIES[name].mllm(tokenizer.convert_tokens_to_ids, text)
    mllm.generation_config.eos_token_id = tokenizer.eos_token_id
    mllm.generation_config.pad_token_id = tokenizer.pad_token_id
    return mllm


def tiny_family(name: str, seed: int = 0, **config: Any) -> tuple[SegCompassModel, SegCompassProcessor]:
    """A whole tiny SegCompass model of a family, and its processor. Same seed, same weights."""
    torch.manual_seed(seed)
    processor = family_processor(name)
    defaults = dict(
        sae_config=SparseAutoencoderConfig(d_in=32, d_sae=128, layer=2),
        d_c=16,
        num_concepts=24,
        codebook_heads=4,
        slot_heads=4,
        slot_head_dim=8,
        decoder_heads=4,
        decoder_mlp_dim=32,
        max_response_length=24,
    )
    mllm, encoder = family_mllm(name, processor), tiny_sam()
    model = SegCompassModel.from_backbones(mllm, encoder, processor=processor, **{**defaults, **config})
    return model.eval(), processor
