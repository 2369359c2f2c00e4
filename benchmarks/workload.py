"""What the benchmarks of this folder run on: a LLaVA-shaped model of any size with random weights, and scenes."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LogitsProcessor, SamVisionConfig, SamVisionModel

from segcompass.loaders import load_scenes
from segcompass.modeling_segcompass import (
    SegCompassConfig,
    SegCompassModel,
    SegCompassProcessor,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from segcompass.modeling_segcompass.image_encoder import image_processor_of

MINI = Path(__file__).resolve().parents[1] / "examples" / "checkpoints" / "mini"

SAM_H = dict(
    hidden_size=1280,
    mlp_dim=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    global_attn_indexes=[7, 15, 23, 31],
    initializer_range=0.02,  # the class's own leaves nothing of the image
)
"""SAM's ViT-H, of 1024 pixels."""
CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
"""The vision tower of LLaVA-1.5."""


def add_size(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the options of its model's size and place: `sized_model` and `clock_of` read them."""
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="of the model; on a GPU seconds are the clock's, synchronised")
    parser.add_argument("--dtype", default="float32", help="of the MLLM and the image encoder")
    parser.add_argument("--full-encoders", action="store_true", help="CLIP ViT-L and SAM ViT-H in place of tiny ones")
    parser.add_argument("--threads", type=int, help="time by the clock with so many threads")


def sized_model(args: argparse.Namespace, **more) -> tuple[SegCompassModel, SegCompassProcessor]:
    """`benchmark_model` as the options of `add_size` say, and its threads."""
    torch.set_num_threads(args.threads or 1)
    size = dict(device=args.device, dtype=getattr(torch, args.dtype), full_encoders=args.full_encoders)
    return benchmark_model(args.hidden, args.layers, **size, **more)


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """What time is measured with: the processor's seconds, or the clock's with --threads and on a GPU."""
    if args.device == "cpu":
        return time.perf_counter if args.threads else time.process_time

    def after_all_work():
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_all_work


def machine(args: argparse.Namespace) -> dict[str, object]:
    """Where a benchmark ran, for its RESULT."""
    name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "dtype": args.dtype, "threads": torch.get_num_threads(), "torch": torch.__version__}


def benchmark_model(
    hidden=512,
    layers=8,
    seed=0,
    image_side=128,
    slots=None,
    device="cpu",
    dtype=torch.float32,
    full_encoders=False,
):
    """A SegCompass model around a LLaVA of the given size (27 M parameters by default), and the embedded processor.

    The image encoders have the embedded model's shapes, or the published ones' (`full_encoders`); the SAE has 8
    features a dimension. Heads are 64 wide, from a width of 2048 on 128, and the vocabulary then has 32,000 tokens.
    The MLLM's pictures have `image_side` pixels a side, which is (image_side / 16)^2 image tokens: 64, and the 576 of
    LLaVA-1.5 at 384. The embedded processor has 4 slots. MLLM, image encoder and SAE are made on the device.
    """
    torch.manual_seed(seed)
    mini = SegCompassConfig.from_pretrained(MINI)
    processor = SegCompassProcessor.from_pretrained(MINI)
    processor.image_processor.size = {"longest_edge": image_side}
    processor.image_processor.pad_size = {"height": image_side, "width": image_side}
    processor.num_slots = slots or processor.num_slots
    processor.max_prompt_length = processor.tokenizer.model_max_length = 4096
    text = mini.mllm_config.text_config.to_dict()
    width = 128 if hidden >= 2048 else 64
    heads = hidden // width
    text |= dict(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, head_dim=width)
    text |= dict(num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096)
    text["tie_word_embeddings"] = False
    if hidden >= 2048:
        text |= dict(vocab_size=32_000, initializer_range=0.02)
    vision, encoder = mini.mllm_config.vision_config.to_dict() | {"image_size": image_side}, mini.image_encoder_config
    if full_encoders:
        vision, encoder = vision | CLIP_L, SamVisionConfig(**SAM_H)
        processor.encoder_image_processor = image_processor_of(encoder)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=mini.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    sae = SparseAutoencoderConfig(d_in=hidden, d_sae=8 * hidden, layer=layers // 2)
    with torch.device(device):
        made = dict(attn_implementation="sdpa", dtype=dtype)
        mllm = LlavaForConditionalGeneration._from_config(config, **made)
        encoder = SamVisionModel._from_config(encoder, **made)
        autoencoder = SparseAutoencoder(sae)
    mllm.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    mllm.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    whole = SegCompassConfig(
        mllm_config=config,
        image_encoder_config=encoder.config,
        sae_config=sae,
        num_slots=processor.num_slots,
        d_c=256,
        concept_reading="feature",  # what the published figures are of
        max_response_length=64,
        attn_implementation="sdpa",
        **processor.model_tokens(),
    )
    model = SegCompassModel(whole, mllm=mllm, image_encoder=encoder, sae=autoencoder)
    return model.eval().to(device), processor


def benchmark_rows(count, seed=0):
    """`count` scenes of the shared schema."""
    return load_scenes(split="train", seed=seed, num_samples=count)


class Dictation(LogitsProcessor):
    """Makes `generate` write these ids, whatever the model would write, after prompts of one length."""

    def __init__(self, ids):
        self.ids = ids
        self.prompt = None

    def __call__(self, input_ids, scores):
        self.prompt = self.prompt or input_ids.shape[1]
        dictated = torch.full_like(scores, float("-inf"))
        dictated[:, self.ids[input_ids.shape[1] - self.prompt]] = 0
        return dictated


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
