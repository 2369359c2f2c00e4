"""Any family of MLLMs as tiny random weights: its default configuration with every size made small.

For the families that `families.py` does not build by hand. What does not build so is not tried.
"""

from importlib import import_module
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoderConfig
from segcompass.modeling_segcompass.family_processor import model_class, own_processor_class

from .families import CHAT, IMAGE_PLACE, PATCH, SIDE, TinyFamily, family_tokenizer
from .tiny import tiny_sam

SMALL: dict[str, Any] = dict.fromkeys(
    ("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "projector_hidden_size"), 32
)
SMALL |= dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "mlp_dim"), 64)
SMALL |= dict.fromkeys(("shared_expert_intermediate_size", "expert_hidden_dim", "adapter_hidden_size"), 32)
SMALL |= dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4)
SMALL |= dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4)
SMALL |= dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2)
SMALL |= dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1)
SMALL |= dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8)
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "depth": 2, "image_size": SIDE, "patch_size": PATCH}
SMALL |= {"sliding_window": 64, "max_position_embeddings": 1024, "num_position_embeddings": 16, "window_size": SIDE}
SMALL |= {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1], "image_seq_length": 4}
SMALL |= {"mm_tokens_per_image": 4, "hidden_size_per_layer_input": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
SMALL |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "scale_factor": 2}
LARGEST = 20_000_000
TOKENS = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
TOKENS |= {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<ctx>"}
TOKENS |= {"audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}


def _shrink(values: dict[str, Any], text: bool, vocabulary: int) -> dict[str, Any]:
    made = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config"):
            value = _shrink(value, name == "text_config", vocabulary)
        elif name in ("num_hidden_layers", "num_layers", "encoder_layers"):
            value = 4 if text else 2
        elif name == "num_key_value_heads":
            value = 2 if text else 4
        elif name in ("vocab_size", "vocab_size_per_layer_input"):
            value = vocabulary
        elif name == "layer_types" and value:
            value = [*value[:3], value[-1]]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            value = {**value, "mrope_section": [1, 1, 2]}
        elif name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            value = [SMALL[name]] * 2
        elif name in SMALL and value is not None:
            value = SMALL[name]
        elif name == "dtype":
            continue
        made[name] = value
    return made


def shrunk_family(mllm_type: str, num_slots: int = 3) -> tuple[Any, SegCompassProcessor]:
    """A tiny MLLM of a family and its processor.

    Raises:
        Exception: whatever the family says of small sizes.
    """
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(mllm_type)
    name = names["pil"] if isinstance(names, dict) else "Qwen2VLImageProcessorPil"
    images = _image_processor(name)
    tokenizer = family_tokenizer(TinyFamily(("", "", {}), lambda ids, text: None, tokens=TOKENS))
    known = own_processor_class(mllm_type).setting_names()
    own = {"image_seq_length": 4, "image_seq_len": 4, "num_image_tokens": 16, "patch_size": PATCH}
    own |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    settings = {key: value for key, value in own.items() if key in known}
    parts: dict[str, Any] = dict(
        image_processor=images,
        tokenizer=tokenizer,
        encoder_image_processor=SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}),
        prompt_template="{instruction}",
        num_slots=num_slots,
        max_prompt_length=4000,
        mllm_type=mllm_type,
        family_settings=settings,
    )
    written = SegCompassProcessor(chat_template="x", **parts).image_token
    processor = SegCompassProcessor(chat_template=CHAT.replace(IMAGE_PLACE, written), **parts)
    kind = CONFIG_MAPPING[mllm_type]
    values = _shrink(kind().to_dict(), text=False, vocabulary=len(tokenizer) + 8)
    ids = tokenizer.convert_tokens_to_ids
    for key, value in list(values.items()):
        if key.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int):
            values[key] = processor.image_token_id if key.startswith("image_token") else ids("<|vision_start|>")
    values.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.device("meta"):
        count = sum(
            weight.numel() for weight in model_class(mllm_type)._from_config(kind.from_dict(values)).parameters()
        )
    if count > LARGEST:
        raise RuntimeError(f"its default configuration, made small, still has {count:,} weights")
    torch.manual_seed(0)
    mllm = model_class(mllm_type)._from_config(kind.from_dict(values))
    with torch.no_grad():
        for weight in mllm.parameters():
            if weight.dim() > 1 and not weight.any():
                weight.normal_(std=0.1)
    mllm.generation_config.eos_token_id = tokenizer.eos_token_id
    mllm.generation_config.pad_token_id = tokenizer.pad_token_id
    return mllm, processor


def _image_processor(name):
    module = next(
        module for module in (f"transformers.models.{folder}" for folder in _folders()) if hasattr(_pil(module), name)
    )
    made = getattr(_pil(module), name)()
    for key, value in {"patch_size": PATCH, "min_pixels": SIDE**2, "max_pixels": (2 * SIDE) ** 2}.items():
        if isinstance(getattr(made, key, None), int):
            setattr(made, key, value)
    size = dict(made.size or {})
    if "height" in size:
        made.size = type(made.size)(height=SIDE, width=SIDE)
    elif set(size) == {"shortest_edge", "longest_edge"}:
        made.size = type(made.size)(shortest_edge=2 * SIDE**2, longest_edge=2 * (2 * SIDE) ** 2)
    return made


def _folders():
    from pathlib import Path

    import transformers

    return sorted(
        path.parent.name for path in Path(transformers.__file__).parent.glob("models/*/image_processing_pil*")
    )


def _pil(module):
    return import_module(f"{module}.image_processing_pil_{module.rpartition('.')[2]}")


def build_shrunk(mllm_type: str) -> SegCompassModel:
    """A whole model around a shrunk MLLM. Raises ValueError where it cannot serve."""
    mllm, processor = shrunk_family(mllm_type)
    width = mllm.config.get_text_config().hidden_size
    sae = SparseAutoencoderConfig(d_in=width, d_sae=64, layer=2)
    return SegCompassModel.from_backbones(mllm, tiny_sam(), processor=processor, num_concepts=8, sae_config=sae)
