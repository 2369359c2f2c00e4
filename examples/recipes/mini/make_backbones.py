"""Make one of the mini recipe's backbones from nothing: a tiny LLaVA (with tokenizer), or a tiny SAM.

Real backbones come pretrained. These do not. Both vision parts are first taught to see: from each image patch a linear
head predicts the attributes and the centre of the object there (labels the scenes know), and is thrown away. LLaVA is
then taught to talk about scenes: several questions on each image, which is run once for all of them.

    torchrun --nproc_per_node 2 examples/recipes/mini/make_backbones.py image_encoder --output runs/mini/sam --minutes 8
    torchrun --nproc_per_node 2 examples/recipes/mini/make_backbones.py mllm --output runs/mini/mllm --minutes 50

With --grounded WEIGHTS the MLLM of a small model goes on as that of examples/recipes/mini-grounded: scenes of any
aspect, which the MLLM sees as the image encoder does (longest side to 128, padded right and below), answers by look or
by place, and the alignment term.

Repeat the command to resume an interrupted run from its last state, at most two minutes old.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SamVisionConfig,
    SamVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.loaders.masks import encode_mask
from segcompass.loaders.scene_drawing import BOARD, COLOURS, SHAPES, SIZES, choose_size, draw_scene
from segcompass.loaders.scene_questions import KINDS, ask, word_kind
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.trainers.alignment import Alignment, AlignmentTargets, alignment_loss

IMAGE_SIZE, PATCH, SAM_PATCH, WIDTH, SAM_WIDTH, NUM_SLOTS = 128, 16, 8, 192, 96, 4
CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALIGNED_LAYER, ALIGNMENT_WEIGHT, QUESTIONS = 4, 0.3, 3  # of --grounded: the SAE's layer; questions about an image
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def draw(rng, grounded):
    """A training scene: a square one, or of any aspect and with more twins."""
    return draw_scene(rng, "train", choose_size(rng), 0.04) if grounded else draw_scene(rng, "train")


def answers(grounded):
    """How questions are answered."""
    return "fitting" if grounded else "place"


def make_tokenizer(num_scenes=4000):
    """A byte-level BPE tokenizer whose merges come from the scenes' own words; it can encode any text."""
    rng = np.random.default_rng(0)
    scenes = (draw_scene(rng, "train") for _ in range(num_scenes))
    questions = [ask(rng, scene, answers="place") for scene in scenes for _ in range(4)]
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
    words = {word for text in texts for word in text.split()}  # each once: the vocabulary does not hang on the sample
    starts = {question.instruction.split()[0] for question in questions}  # these follow the image, not a space
    tokenizer.train_from_iterator([" " + " ".join(sorted(words)), *sorted(starts)], trainer)
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


def make_processor(tokenizer, grounded=False):
    """The processor. Grounded, the MLLM gets the very pixels that the image encoder gets: SAM's image processor takes
    the longest side to the frame's and pads right and below, so that patches and keys lie on one frame."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    framed = dict(size={"longest_edge": IMAGE_SIZE}, pad_size=size, image_mean=MEAN, image_std=STD)
    squashed = CLIPImageProcessorPil(size=size, do_center_crop=False)
    return SegCompassProcessor(
        image_processor=SamImageProcessorPil(**framed) if grounded else squashed,
        tokenizer=tokenizer,
        encoder_image_processor=SamImageProcessorPil(**framed),
        chat_template=CHAT,
        prompt_template="{instruction}",
        num_slots=NUM_SLOTS,
        max_prompt_length=160,
        patch_size=PATCH,
    )


def grid_waves(side, width):
    """Sines and cosines of a side x side grid's coordinates: (side², width), the start of a position embedding.

    From small random embeddings the towers here did not learn where anything is (dev/log.md).
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
            initializer_range=0.06,  # at a width of 192 the default 0.02 starts too near to nothing
        ),
        initializer_range=0.06,
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


def on_frame(masks):
    """(n, H, W) bool masks to their share of each pixel of the frame, float (n, 128, 128), 0 in the padding."""
    height, width = Frame(IMAGE_SIZE).reshaped_size(*masks.shape[1:])
    areas = torch.from_numpy(masks)[:, None].float()
    if (height, width) != masks.shape[1:]:
        areas = nn.functional.interpolate(areas, (height, width), mode="bilinear", antialias=True)
    return nn.functional.pad(areas[:, 0], (0, IMAGE_SIZE - width, 0, IMAGE_SIZE - height))


def patch_labels(scene, cells):
    """What each cell of a cells x cells grid shows: attribute classes (0 = background), the object's centre, and the
    outline of that object inside the cell on a 4 x 4 raster."""
    masks = (on_frame(scene.masks) > 0.5).numpy()  # (n, H, W) bool
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
        lookup[i + 1, 3:] = "ABCD".index(item.place[0]) + 1, int(item.place[1])
    sub = step // 4
    fine = masks.reshape(n, cells, 4, sub, cells, 4, sub).mean((3, 6)).transpose(0, 1, 3, 2, 4)  # (n, c, c, 4, 4)
    fine = np.concatenate([np.zeros_like(fine[:1]), fine])
    rows, columns = np.indices(owner.shape)
    return lookup[owner], fine[owner, rows, columns].reshape(cells, cells, 16).astype(np.float32)


class LabelledScenes(IterableDataset):
    """Endless batches of training scenes (as one image processor prepares them) with the labels of their patches."""

    def __init__(self, image_processor, cells, batch_size, seed, grounded=False):
        self.image_processor, self.cells, self.batch_size, self.seed = image_processor, cells, batch_size, seed
        self.grounded = grounded

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        while True:
            scenes = [draw(rng, self.grounded) for _ in range(self.batch_size)]
            inputs = self.image_processor([scene.image for scene in scenes], return_tensors="pt")
            attributes, fine = zip(*(patch_labels(scene, self.cells) for scene in scenes), strict=True)
            labels = {"attributes": np.stack(attributes), "fine": np.stack(fine)}
            yield {
                "pixel_values": inputs["pixel_values"],
                **{name: torch.from_numpy(value).flatten(1, 2) for name, value in labels.items()},
                **self.texts(rng, scenes),
            }

    def texts(self, rng, scenes):
        return {}


class Conversations(LabelledScenes):
    """The same with one question of each kind on every scene (grounded: of three kinds), cut after the image.

    prefix_ids (1, P) are the same for all; input_ids, labels and attention_mask (images x 6, T) are padded right.
    Grounded also `alignment`, whose positions are those of the uncut, unpadded sequences."""

    def __init__(self, processor, align, *args):
        super().__init__(processor.image_processor, *args, grounded=align is not None)
        self.processor, self.align = processor, align

    def texts(self, rng, scenes):
        many = QUESTIONS if self.grounded else len(KINDS)
        kinds = [[KINDS[k] for k in rng.permutation(len(KINDS))[:many]] if self.grounded else KINDS for _ in scenes]
        questions = [
            ask(rng, scene, kind, answers(self.grounded))
            for scene, chosen in zip(scenes, kinds, strict=True)
            for kind in chosen
        ]
        batch = self.processor(
            images=[scene.image for scene in scenes for _ in range(many)],
            text=[question.instruction for question in questions],
            response=[self.processor.format_response(question.reasoning) for question in questions],
            image_encoder=False,
        )
        rows = []
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            ids, labels = ids[mask], labels[mask]
            cut = int((ids == self.processor.image_token_id).nonzero()[-1]) + 1
            prefix = ids[:cut]
            rows.append((ids[cut:], labels[cut:], torch.ones_like(ids[cut:])))
        names, fill = ("input_ids", "labels", "attention_mask"), (0, -100, 0)
        padded = [
            nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=value)
            for part, value in zip(zip(*rows, strict=True), fill, strict=True)
        ]
        texts = {"prefix_ids": prefix[None], **dict(zip(names, padded, strict=True))}
        return {**texts, "alignment": self.aligned(scenes, questions, batch)} if self.grounded else texts

    def aligned(self, scenes, questions, batch):
        """The alignment's targets; each image's patches once, with its first question."""
        many = len(questions) // len(scenes)
        rows = []
        for index, question in enumerate(questions):
            masks = [encode_mask(mask) for mask in scenes[index // many].masks]
            named = [
                {"text": phrase.text, "start": phrase.start, "masks": [masks[thing] for thing in phrase.objects]}
                for phrase in question.phrases
            ]
            height, width = scenes[index // many].image.shape[:2]
            rows.append({"reasoning": question.reasoning, "phrases": named, "height": height, "width": width})
        found = self.align(rows, batch)
        padding = (batch["attention_mask"].cumsum(1) == 0).sum(1)  # (questions,) to the left of each
        once = found.patches[:, 0] % many == 0

        def unpadded(places):
            return torch.stack([places[:, 0], places[:, 1] - padding[places[:, 0]]], 1)

        return Alignment(
            unpadded(found.words), found.meanings, unpadded(found.patches)[once], found.shown[once], found.kinds
        )


SEEING_SHARE = 0.15  # of the minutes for the mllm; the rest is for talking
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, BOARD + 1, BOARD + 1)


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


class Seeing(nn.Module):
    """A vision tower and the head that reads patches off it. `encode`: pixel_values -> (B, cells², width)."""

    def __init__(self, tower, encode, width):
        super().__init__()
        self.tower, self.encode = tower, encode
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(CLASSES) + 16))

    def learning_rates(self):
        return [(self, 1e-3)]

    def forward(self, pixel_values, attributes, fine):
        loss, right = patch_loss(self.head(self.encode(pixel_values)), attributes, fine)
        return loss, {"patches": loss.item(), "patches all right": right}


class Talking(Seeing):
    """A LLaVA that sees and answers: the language loss, plus a little of the patch loss."""

    def __init__(self, mllm, head=None, rates=(3e-4, 3e-4, 1.5e-3)):
        super().__init__(mllm, lambda pixels: torch.stack(mllm.model.get_image_features(pixels).pooler_output), WIDTH)
        self.head, self.rates = head or self.head, rates

    def learning_rates(self):
        core = self.tower.model  # what sees learns slowly here, or it forgets while the language part is still random
        sees, head, speaks = self.rates
        return [
            (core.vision_tower, sees),
            (core.multi_modal_projector, sees),
            (self.head, head),
            (core.language_model, speaks),
        ]

    def forward(self, pixel_values, attributes, fine, prefix_ids, input_ids, labels, attention_mask, alignment=None):
        model, repeats = self.tower.model.language_model, len(input_ids) // len(pixel_values)
        image = self.encode(pixel_values)
        loss, right = patch_loss(self.head(image), attributes, fine)
        start = model.embed_tokens(prefix_ids[:, : -image.shape[1]]).expand(len(image), -1, -1)
        cache = DynamicCache(config=model.config)
        inner = {"output_hidden_states": alignment is not None}
        first = model(
            inputs_embeds=torch.cat([start, image.to(start)], 1), past_key_values=cache, use_cache=True, **inner
        )
        cache.batch_repeat_interleave(repeats)  # differentiable: every question's gradient reaches the image
        mask = torch.cat([attention_mask.new_ones(len(attention_mask), prefix_ids.shape[1]), attention_mask], 1)
        output = model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **inner)
        logits = self.tower.lm_head(output.last_hidden_state[:, :-1]).float().flatten(0, 1)
        language = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        parts = {"language": language.item(), "patches": loss.item(), "patches all right": right}
        total = language + 0.3 * loss
        if alignment is not None:
            before = first.hidden_states[ALIGNED_LAYER].repeat_interleave(repeats, 0)
            aligned = alignment_loss(torch.cat([before, output.hidden_states[ALIGNED_LAYER]], 1), alignment)
            total, parts["alignment"] = total + ALIGNMENT_WEIGHT * aligned, aligned.item()
        return total, parts


def bfloat16_is_faster():
    """Whether this machine computes a layer's step faster in bfloat16: without AVX512-BF16 it is ten times slower."""
    layer, rows = nn.Sequential(nn.Linear(WIDTH, 448), nn.SiLU(), nn.Linear(448, WIDTH)), torch.randn(2048, WIDTH)
    seconds = {}
    for enabled in (True, False, True, False):  # the first round of each is a warm-up
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = layer(rows).square().mean()
        loss.backward()
        seconds[enabled] = time.perf_counter() - begin
    return seconds[True] < seconds[False]


def train(
    pupil: Seeing, make_batches: Callable[[list[int]], IterableDataset], minutes: float, state_file: Path
) -> None:
    """Train for some minutes of wall time (all runs together), with as many processes as torchrun started.

    Args:
        pupil: what learns.
        make_batches: seed -> an iterable data set of keyword arguments for `pupil`.
        minutes: how long, of all runs together.
        state_file: where the training is kept between interruptions.
    """
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    pupil.train()
    groups = [{"params": list(part.parameters()), "peak": lr} for part, lr in pupil.learning_rates()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        pupil.load_state_dict(state["pupil"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    parallel = DistributedDataParallel(pupil, find_unused_parameters=True) if distributed.is_initialized() else pupil
    loader = iter(DataLoader(make_batches([7, rank, step]), batch_size=None, num_workers=1))
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", mininterval=5, disable=rank > 0)
    averages, last, saved = {}, time.time(), spent
    lower = bfloat16_is_faster()
    while True:
        clock = torch.tensor(spent, dtype=torch.float64)
        if distributed.is_initialized():
            distributed.broadcast(clock, 0)  # all processes stop at the same step
        progress = clock.item() / (60 * minutes)
        if progress >= 1:
            break
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1 + np.cos(np.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = float(group["peak"] * rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss, parts = parallel(**next(loader))
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        spent, last = spent + time.time() - last, time.time()
        for name, value in parts.items():
            averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
        bar.update(round(spent) - bar.n)
        bar.set_postfix_str(f"step {step}, " + ", ".join(f"{k} {v:.3f}" for k, v in averages.items()), refresh=False)
        if rank == 0 and (spent - saved > 120 or spent >= 60 * minutes):
            saved = spent
            state = {"pupil": pupil.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    bar.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=["mllm", "image_encoder"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--grounded", type=Path, metavar="WEIGHTS", help="a small model whose MLLM goes on")
    args = parser.parse_args()
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    trained = SegCompassProcessor.from_pretrained(args.grounded) if args.grounded else None
    processor = make_processor(trained.tokenizer if trained else make_tokenizer(), args.grounded is not None)
    states = [args.output / "seeing.pt", args.output / "talking.pt"]
    if args.backbone == "mllm":
        model, cells = make_mllm(processor), IMAGE_SIZE // PATCH
        model.set_attn_implementation("eager")  # the fastest on a CPU
        core = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
        if args.grounded:
            model.load_state_dict(SegCompassModel.from_pretrained(args.grounded, dtype="float32").mllm.state_dict())
            talking, minutes = Talking(model, rates=(2.5e-4, 1e-3, 7e-4)), args.minutes
        else:
            seeing = Seeing(
                core, lambda pixels: torch.stack(model.model.get_image_features(pixels).pooler_output), WIDTH
            )
            train(
                seeing,
                lambda seed: LabelledScenes(processor.image_processor, cells, 32, seed),
                SEEING_SHARE * args.minutes,
                states[0],
            )
            talking, minutes = Talking(model, seeing.head), (1 - SEEING_SHARE) * args.minutes
        align = AlignmentTargets(processor, word_kind) if args.grounded else None
        images = 8 if args.grounded else 4
        train(talking, lambda seed: Conversations(processor, align, cells, images, seed), minutes, states[1])
    else:
        model, cells = make_sam(), IMAGE_SIZE // SAM_PATCH
        seeing = Seeing(model, lambda pixels: model(pixels).last_hidden_state.flatten(2).mT, SAM_WIDTH)
        scenes = processor.encoder_image_processor
        train(seeing, lambda seed: LabelledScenes(scenes, cells, 32, seed), args.minutes, states[0])
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return
    print(f"{args.backbone}: {sum(p.numel() for p in model.parameters()):,} parameters")
    model.save_pretrained(args.output)
    if args.backbone == "mllm":
        processor.save_pretrained(args.output)
    for state in states:
        state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
