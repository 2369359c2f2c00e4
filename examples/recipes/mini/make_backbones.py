"""Make one of the mini recipe's backbones from nothing: a tiny LLaVA (with tokenizer) or a tiny SAM encoder.

Real backbones come pretrained. These do not, so their vision parts are first taught to see: from each image patch a
linear head predicts the attributes and the centre of the object there (labels the scenes know), and is thrown away.

    python examples/recipes/mini/make_backbones.py mllm --output runs/mini/mllm --minutes 8
    python examples/recipes/mini/make_backbones.py sam --output runs/mini/sam --minutes 20
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SamVisionConfig,
    SamVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from loaders.scenes import COLOURS, SHAPES, SIZES, ask, draw_scene
from modeling_segcompass import SegCompassProcessor

IMAGE_SIZE, PATCH, SAM_PATCH, WIDTH, SAM_WIDTH, NUM_SLOTS = 128, 16, 8, 192, 96, 4
CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def make_tokenizer(num_scenes=4000):
    """A byte-level BPE tokenizer whose merges come from the scenes' own words; it can encode any text."""
    rng = np.random.default_rng(0)
    scenes = (draw_scene(rng, "train") for _ in range(num_scenes))
    questions = [ask(rng, scene) for scene in scenes for _ in range(4)]
    texts = [f"USER: {q.instruction} ASSISTANT: {q.reasoning}" for q in questions]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1021, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        chat_template=CHAT,
        model_max_length=512,
    )


def make_processor(tokenizer):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return SegCompassProcessor(
        image_processor=CLIPImageProcessorPil(size=size, do_center_crop=False),
        tokenizer=tokenizer,
        sam_image_processor=SamImageProcessorPil(
            size={"longest_edge": IMAGE_SIZE}, pad_size=size, image_mean=MEAN, image_std=STD
        ),
        chat_template=CHAT,
        prompt_template="{instruction}",
        num_slots=NUM_SLOTS,
        max_prompt_length=160,
        patch_size=PATCH,
    )


def grid_waves(side, width):
    """Sines and cosines of a side x side grid's coordinates: (side², width), the start of a position embedding.

    From small random embeddings the towers here did not learn where anything is (docs/experiments.md).
    """
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 4, width // 4)
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], -1)


def make_mllm(processor):
    """An untrained LLaVA of transformers' own classes (LLaVA, CLIP tower, Llama), about 4 million parameters."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        ),
        text_config=dict(
            model_type="llama",
            hidden_size=WIDTH,
            intermediate_size=448,
            num_hidden_layers=6,
            num_attention_heads=6,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        tie_word_embeddings=True,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    mllm = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        embeddings = mllm.model.vision_tower.embeddings
        embeddings.position_embedding.weight[1:] = 0.7 * grid_waves(IMAGE_SIZE // PATCH, WIDTH)
    mllm.generation_config.eos_token_id = tokenizer.eos_token_id
    mllm.generation_config.pad_token_id = tokenizer.pad_token_id
    return mllm


def make_sam():
    """An untrained SAM vision encoder, about 0.4 million parameters, keys on a 16 x 16 grid."""
    return SamVisionModel(
        SamVisionConfig(
            hidden_size=SAM_WIDTH,
            output_channels=SAM_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=SAM_PATCH,
            window_size=8,
            global_attn_indexes=[2],
            use_rel_pos=False,
            mlp_dim=2 * SAM_WIDTH,
            initializer_range=0.02,
        )
    )


# -- teaching the vision towers to see -------------------------------------------------------------------------------


def patch_labels(scene, cells):
    """What each cell of a cells x cells grid shows: attribute classes (0 = background), the object's centre, and the
    outline of that object inside the cell on a 4 x 4 raster."""
    masks = scene.masks  # (n, H, W) bool
    n, height, _ = masks.shape
    step = height // cells
    blocks = masks.reshape(n, cells, step, cells, step)
    cover = blocks.mean((2, 4))  # (n, cells, cells)
    owner = np.where(cover.max(0) > 0.15, cover.argmax(0) + 1, 0)
    lookup = np.zeros((n + 1, 5), np.int64)
    for i, item in enumerate(scene.objects):
        lookup[i + 1, :3] = (
            SHAPES.index(item.shape) + 1,
            list(COLOURS).index(item.colour) + 1,
            list(SIZES).index(item.size) + 1,
        )
        lookup[i + 1, 3:] = "ABCDEFGH".index(item.place[0]) + 1, int(item.place[1])
    sub = step // 4
    fine = masks.reshape(n, cells, 4, sub, cells, 4, sub).mean((3, 6)).transpose(0, 1, 3, 2, 4)  # (n, c, c, 4, 4)
    fine = np.concatenate([np.zeros_like(fine[:1]), fine])
    rows, columns = np.indices(owner.shape)
    return lookup[owner], fine[owner, rows, columns].reshape(cells, cells, 16).astype(np.float32)


class LabelledScenes(IterableDataset):
    """Endless batches of training scenes (as one image processor prepares them) with the labels of their patches."""

    def __init__(self, image_processor, cells, batch_size):
        self.image_processor, self.cells, self.batch_size = image_processor, cells, batch_size

    def __iter__(self):
        rng = np.random.default_rng(7)
        while True:
            scenes = [draw_scene(rng, "train") for _ in range(self.batch_size)]
            inputs = self.image_processor([scene.image for scene in scenes], return_tensors="pt")
            attributes, fine = zip(*(patch_labels(scene, self.cells) for scene in scenes), strict=True)
            yield dict(inputs), torch.from_numpy(np.stack(attributes)), torch.from_numpy(np.stack(fine))


CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, 9, 9)


def patch_loss(logits, attributes, fine):
    """logits (B, N, sum(CLASSES) + 16), attributes (B, N, 5), outlines (B, N, 16): loss, share of patches all right."""
    *classes, outline = logits.float().split([*CLASSES, 16], -1)
    loss = nn.functional.binary_cross_entropy_with_logits(outline, fine)
    seen = attributes[..., 0] > 0
    weight = torch.where(seen, 1.0, 0.1)
    for part, target in zip(classes, attributes.unbind(-1), strict=True):
        each = nn.functional.cross_entropy(part.flatten(0, -2), target.flatten(), reduction="none")
        loss = loss + (each * weight.flatten()).sum() / weight.sum()
    right = torch.stack([part.argmax(-1) == t for part, t in zip(classes, attributes.unbind(-1), strict=True)])
    return loss, right.all(0)[seen].float().mean().item()


def teach(tower, features, width, scenes, minutes, lr=1e-3):
    """Train `tower` for some minutes so that a linear head on `features(inputs)` (B, cells², width) sees the labels."""
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(CLASSES) + 16))
    parts = nn.ModuleList([tower, head]).train()
    optimizer = torch.optim.AdamW(parts.parameters(), lr=lr, weight_decay=0.02)
    loader = iter(DataLoader(scenes, batch_size=None, num_workers=1))
    bar, start, step = tqdm(total=round(minutes * 60), unit="s"), time.time(), 0
    while (spent := time.time() - start) < minutes * 60:
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1 + np.cos(np.pi * spent / (minutes * 60))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        inputs, attributes, fine = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(features(inputs))
        loss, right = patch_loss(logits, attributes.flatten(1, 2), fine.flatten(1, 2))
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update(round(time.time() - start) - bar.n)
        if step % 20 == 0:
            seen = step * scenes.batch_size
            bar.set_postfix_str(f"{seen} images, loss {loss.item():.2f}, patches all right {right:.2f}")
    bar.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=["mllm", "sam"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    processor = make_processor(make_tokenizer())
    if args.backbone == "mllm":
        model = make_mllm(processor)
        scenes = LabelledScenes(processor.image_processor, IMAGE_SIZE // PATCH, batch_size=64)

        tower, projector = model.model.vision_tower, model.model.multi_modal_projector

        def features(inputs):
            return torch.stack(model.model.get_image_features(inputs["pixel_values"]).pooler_output)

        teach(nn.ModuleList([tower, projector]), features, WIDTH, scenes, args.minutes)
        processor.save_pretrained(args.output)
    else:
        model = make_sam()
        scenes = LabelledScenes(processor.sam_image_processor, IMAGE_SIZE // SAM_PATCH, batch_size=64)

        def features(inputs):
            return model(inputs["pixel_values"]).last_hidden_state.flatten(2).mT

        teach(model, features, SAM_WIDTH, scenes, args.minutes)
    print(f"{args.backbone}: {sum(p.numel() for p in model.parameters()):,} parameters")
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
