"""Tiny real models with random weights: the transformers classes users have, a few thousand parameters each."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SamVisionConfig,
    SamVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoderConfig
from segcompass.modeling_segcompass.image_encoder import image_processor_of

BACKBONES = ("llava", "qwen2_5_vl")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
SPECIAL += ["<|vision_end|>", "<|im_start|>", "<|im_end|>"]
CHAT = {
    "llava": (
        "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "qwen2_5_vl": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def tiny_tokenizer(backbone):
    """One token per printable character, spaces included, so any text can be encoded."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        padding_side="left",
        chat_template=CHAT[backbone],
    )


def tiny_processor(backbone, num_slots=3):
    if backbone == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    else:
        images = Qwen2VLImageProcessorPil(
            min_pixels=28 * 28, max_pixels=56 * 56, patch_size=7, merge_size=2, temporal_patch_size=2
        )
    return SegCompassProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(backbone),
        encoder_image_processor=SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}),
        chat_template=CHAT[backbone],
        prompt_template="{instruction}",
        num_slots=num_slots,
        max_prompt_length=300,
        patch_size=7,
    )


def tiny_mllm(backbone, processor, hidden=32, layers=4):
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
    ids = tokenizer.convert_tokens_to_ids
    if backbone == "llava":
        config = LlavaConfig(
            vision_config=dict(
                model_type="clip_vision_model",
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=28,
                patch_size=7,
                projection_dim=32,
            ),
            text_config=dict(model_type="llama", **text),
            image_token_index=ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        mllm = LlavaForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        rope["mrope_section"] = [hidden // 32, hidden // 32, hidden // 16]
        config = Qwen2_5_VLConfig(
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=64,
                num_heads=4,
                patch_size=7,
                spatial_merge_size=2,
                temporal_patch_size=2,
                window_size=28,
                out_hidden_size=hidden,
                fullatt_block_indexes=[1],
            ),
            text_config=dict(rope_parameters=rope, **text),
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )
        mllm = Qwen2_5_VLForConditionalGeneration(config)
    mllm.generation_config.eos_token_id = tokenizer.eos_token_id
    mllm.generation_config.pad_token_id = tokenizer.pad_token_id
    return mllm


def tiny_sam():
    """SAM's vision encoder with a frame of 32 pixels and a grid of 8 x 8 keys."""
    return SamVisionModel(
        SamVisionConfig(
            hidden_size=16,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=32,
            initializer_range=0.02,  # the class's own 1e-10 leaves features of 1e-22, the same for every image
        )
    )


def tiny_segcompass(backbone, seed=0, num_slots=3, image_encoder=None, concept_reading="feature", **config):
    """A whole tiny SegCompass model on a real backbone class, and its processor. Same seed, same weights.

    Its read-out is the paper's unless another is named: it has more parts that can go wrong between MLLM and masks.
    """
    torch.manual_seed(seed)
    processor = tiny_processor(backbone, num_slots)
    if image_encoder is not None:
        processor.encoder_image_processor = image_processor_of(image_encoder)
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
        concept_reading=concept_reading,
        grounded_rank=8,
    )
    sam = image_encoder or tiny_sam()  # before the MLLM, so that a seed keeps giving the same weights
    model = SegCompassModel.from_backbones(
        tiny_mllm(backbone, processor), sam, processor=processor, **{**defaults, **config}
    )
    return model.eval(), processor


def make_sure(model):
    """Raise all confidences: untrained slots are unsure, and unsure slots earn no mask reward."""
    bias = model.grounded_reading.confidence_bias if model.grounded else model.slot_mapper.conf_out.bias
    bias.data += 3.0
