"""What the benchmarks of this folder run on: a LLaVA-shaped model of any size with random weights, and scenes."""

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, SamVisionModel

from segcompass.loaders import load_scenes
from segcompass.modeling_segcompass import (
    SegCompassConfig,
    SegCompassModel,
    SegCompassProcessor,
    SparseAutoencoderConfig,
)

MINI = Path(__file__).resolve().parents[1] / "examples" / "checkpoints" / "mini"


def benchmark_model(hidden=512, layers=8, seed=0, image_side=128, slots=None):
    """A SegCompass model around a LLaVA of the given size (27 M parameters by default), and the embedded processor.

    The image encoders have the embedded model's shapes; the SAE has 8 features a dimension. The MLLM's pictures have
    `image_side` pixels a side, which is (image_side / 16)^2 image tokens: 64, and the 576 of LLaVA-1.5 at 384. The
    embedded processor has 4 slots.
    """
    torch.manual_seed(seed)
    mini = SegCompassConfig.from_pretrained(MINI)
    processor = SegCompassProcessor.from_pretrained(MINI)
    processor.image_processor.size = {"longest_edge": image_side}
    processor.image_processor.pad_size = {"height": image_side, "width": image_side}
    processor.num_slots = slots or processor.num_slots
    processor.max_prompt_length = processor.tokenizer.model_max_length = 4096
    text = mini.mllm_config.text_config.to_dict()
    heads = hidden // 64
    text |= dict(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, head_dim=64)
    text |= dict(num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096)
    text["tie_word_embeddings"] = False
    config = LlavaConfig(
        vision_config=mini.mllm_config.vision_config.to_dict() | {"image_size": image_side},
        text_config=text,
        image_token_index=mini.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    mllm = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    mllm.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    mllm.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    sae = SparseAutoencoderConfig(d_in=hidden, d_sae=8 * hidden, layer=layers // 2)
    model = SegCompassModel.from_backbones(
        mllm,
        SamVisionModel(mini.image_encoder_config),
        processor=processor,
        sae_config=sae,
        d_c=256,
        max_response_length=64,
    )
    return model.eval(), processor


def benchmark_rows(count, seed=0):
    """`count` scenes of the shared schema."""
    return load_scenes(split="train", seed=seed, num_samples=count)


def scripted_ids(model, processor, length, count, seed=0):
    """Well-formed responses, long (count, length): random words in think tags, the concentration tokens, the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = processor.tokenizer.convert_tokens_to_ids
    special = {*model.config.special_token_ids, model.config.think_end_id, model.config.image_token_id, ids("<think>")}
    words = torch.tensor([token for token in range(len(processor.tokenizer)) if token not in special])
    end = [model.config.think_end_id, *[model.config.ref_token_id] * processor.num_slots]
    end.append(processor.tokenizer.eos_token_id)
    rows = []
    for _ in range(count):
        thought = words[torch.randint(len(words), (length - len(end) - 1,), generator=generator)]
        rows.append(torch.cat([torch.tensor([ids("<think>")]), thought, torch.tensor(end)]))
    return torch.stack(rows)
