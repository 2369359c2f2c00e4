"""The stages of the grounded model that no command has: put together, sharpen the masks, read.

    python examples/recipes/mini-grounded/stages.py join --mllm M --weights W --output J
    torchrun --nproc_per_node 2 examples/recipes/mini-grounded/stages.py masks --model J --output E --minutes 15
    python examples/recipes/mini-grounded/stages.py read --model J --sae SAE --masks E/masks.pt --output O
    python examples/recipes/mini-grounded/stages.py ties --model O --states O/states --output T

`masks` is what SAM's own pretraining is: image encoder and mask decoder learn to turn a disturbed, coarse map of one
object into its mask. `read` caches the states of three questions on each of 2,800 scenes, then trains the read-out.
`ties` gives that read-out a map from words to places, which starts at zero, and more weight to places where looks tie,
and teaches it to tell equal things apart.
Repeat a command to resume it.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from segcompass.loaders.scene_questions import word_kind
from segcompass.loaders.scenes import load_scenes
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.grounded_reading import DECODER_CONFIDENCE
from segcompass.trainers.grounded_masks import GroundedMasksConfig, cache_states, train_grounded
from segcompass.trainers.grounded_ties import TiesConfig, learn_ties

sys.path.append(str(Path(__file__).resolve().parents[1] / "mini"))
from make_backbones import IMAGE_SIZE, draw, on_frame, train  # noqa: E402

COARSE = 8  # patches of the MLLM along a side


def join(args):
    """Put the aligned MLLM and the start's image encoder and mask decoder together."""
    processor = SegCompassProcessor.from_pretrained(args.mllm)
    start = SegCompassModel.from_pretrained(args.weights, dtype="float32")
    torch.manual_seed(0)
    model = SegCompassModel.from_backbones(
        str(args.mllm),
        start.image_encoder,
        processor=processor,
        sae_config={"d_in": 192, "d_sae": 1024, "layer": 4, "activation": "topk", "k": 32},
        concept_reading="grounded",
        d_c=128,
        num_concepts=96,
        codebook_heads=4,
        slot_heads=8,
        slot_head_dim=32,
        decoder_mlp_dim=384,
        max_response_length=128,
        grounded_rank=0,  # words and patches share concepts; a map between them overfitted
    )
    model.mask_decoder.load_state_dict(start.mask_decoder.state_dict())
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


class PromptedScenes(IterableDataset):
    """Endless batches of scenes with a disturbed coarse map of one or two of their objects each."""

    def __init__(self, image_processor, seed, batch_size=10):
        self.image_processor, self.seed, self.batch_size = image_processor, seed, batch_size

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        while True:
            scenes = [draw(rng, True) for _ in range(self.batch_size)]
            inputs = self.image_processor([scene.image for scene in scenes], return_tensors="pt")
            pairs = [self.prompted(rng, on_frame(scene.masks)) for scene in scenes]
            maps, masks = (torch.stack(part) for part in zip(*pairs, strict=True))
            yield {
                "pixel_values": inputs["pixel_values"],
                "reshaped_sizes": torch.as_tensor(inputs["reshaped_input_sizes"]),
                "maps": maps,
                "masks": masks,
            }

    @staticmethod
    def prompted(rng, masks):
        """(2, 8, 8) logits of coarse maps and (2, 128, 128) masks, of two objects, or twice of the only one."""
        step = IMAGE_SIZE // COARSE
        cover = nn.functional.avg_pool2d(masks[:, None], step)[:, 0]  # (n, 8, 8)
        chosen = rng.permutation(len(masks))[:2].tolist()
        maps = []
        for index in (chosen * 2)[:2]:
            others = [cover[other] for other in range(len(masks)) if other != index]
            mixed_in = rng.uniform(0, 0.5) * rng.integers(0, 2)
            shape = cover[index] ** rng.uniform(0.4, 1)
            if others:
                shape = shape + mixed_in * torch.stack(others).amax(0) ** 0.7
            uneven = torch.from_numpy(rng.uniform(0.6, 1.4, (COARSE, COARSE)).astype(np.float32))
            noise = torch.from_numpy(0.06 * rng.random((COARSE, COARSE), dtype=np.float32))
            maps.append(-3.5 + rng.uniform(3.5, 9) * (shape * uneven + noise))
        return torch.stack(maps), masks[(chosen * 2)[:2]]


class Prompted(nn.Module):
    """Image encoder and mask decoder of a SegCompassModel, which learn masks from coarse maps."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.decoder = model.image_encoder, model.mask_decoder
        self.requires_grad_(True)
        grid = model.config.key_grid
        self.register_buffer("positions", model.key_positions((grid, grid)).detach(), persistent=False)
        self.grid, self.frame = grid, model.config.frame

    def learning_rates(self):
        return [(self.encoder, 4e-4), (self.decoder, 1e-3)]

    def forward(self, pixel_values, reshaped_sizes, maps, masks):
        keys = self.encoder(pixel_values).last_hidden_state
        heat = nn.functional.interpolate(maps, (self.grid, self.grid), mode="bilinear", align_corners=False)
        cells = self.frame.cell_mask(reshaped_sizes, self.grid)
        sure = heat.new_full(heat.shape[:2], DECODER_CONFIDENCE)
        logits = self.decoder(keys, self.positions, heat, sure, cells).float()
        goal = nn.functional.avg_pool2d(masks, IMAGE_SIZE // logits.shape[-1])
        probability = logits.sigmoid()
        overlap = (probability * goal).sum((2, 3))
        dice = 1 - (2 * overlap + 1) / (probability.square().sum((2, 3)) + goal.square().sum((2, 3)) + 1)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, goal)
        whole = ((logits > 0) & (goal > 0.5)).sum((2, 3)) / ((logits > 0) | (goal > 0.5)).sum((2, 3)).clamp_min(1)
        return dice.mean() + 2 * bce, {"dice": dice.mean().item(), "bce": bce.item(), "iou": whole.mean().item()}


def masks(args):
    """Train image encoder and mask decoder on prompts."""
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    model = SegCompassModel.from_pretrained(args.model, dtype="float32")
    processor = SegCompassProcessor.from_pretrained(args.model)
    pupil, state = Prompted(model), args.output / "state.pt"
    train(pupil, lambda seed: PromptedScenes(processor.encoder_image_processor, seed), args.minutes, state)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        torch.save(pupil.state_dict(), args.output / "masks.pt")
        state.unlink(missing_ok=True)


def read(args):
    """Cache states, train the read-out and the mask decoder on them, and save the model."""
    model = SegCompassModel.from_pretrained(args.model, dtype="float32")
    processor = SegCompassProcessor.from_pretrained(args.model)
    model.load_sae(str(args.sae))
    Prompted(model).load_state_dict(torch.load(args.masks, weights_only=True))
    rows = load_scenes("train", 3, 3 * args.scenes, "mixed", answers="fitting", twins=0.04, questions=3)
    cache_states(model, processor, rows, args.output / "states", word_kind)
    config = GroundedMasksConfig(patch_steps=args.patch_steps, mask_steps=args.mask_steps, held_out=("purple", "star"))
    bar = tqdm(total=args.patch_steps + args.mask_steps, mininterval=10)
    for entry in train_grounded(model, args.output / "states", args.output / "state.pt", config):
        bar.n = entry["step"] + (entry["phase"] - 1) * args.patch_steps
        if entry["step"] % 25 == 0:
            bar.set_postfix({name: round(value, 3) for name, value in entry.items()}, refresh=True)
    bar.close()
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


def ties(args):
    """Add the map to places to a trained read-out, train it on equal things, and save the model."""
    trained = SegCompassModel.from_pretrained(args.model, dtype="float32")
    processor = SegCompassProcessor.from_pretrained(args.model)
    rows = load_scenes("train", 14, 3 * args.scenes, "mixed", answers="fitting", twins=0.9, questions=3)
    cache_states(trained, processor, rows, args.output / "states", word_kind)
    config = copy.deepcopy(trained.config)
    config.update({"grounded_rank": 64, "grounded_map": "places", "place_share": 0.2, "tied_place_share": 0.65})
    torch.manual_seed(0)
    model = SegCompassModel(config)
    missing, _ = model.load_state_dict(trained.state_dict(), strict=False)
    if set(missing) != {"grounded_reading.word_side", "grounded_reading.patch_side"}:
        raise ValueError(f"{args.model} lacks {', '.join(missing)}; give the read-out that the stage `read` made.")
    torch.nn.init.normal_(model.grounded_reading.word_side, std=0.03)
    torch.nn.init.zeros_(model.grounded_reading.patch_side)
    settings = TiesConfig(look_steps=args.look_steps, place_steps=args.place_steps, held_out=("purple", "star"))
    bar = tqdm(total=args.look_steps + args.place_steps, mininterval=10)
    for entry in learn_ties(model, [args.states, args.output / "states"], args.output / "state.pt", settings):
        bar.n = entry["step"] + (entry["phase"] - 1) * args.look_steps
        if entry["step"] % 25 == 0:
            bar.set_postfix({name: round(value, 3) for name, value in entry.items()}, refresh=True)
    bar.close()
    # it learned with more for places; with less, equal things are told apart as often, and looks have more of a slot
    model.config.place_share, model.config.tied_place_share = 0.1, 0.55
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    for stage, options in (
        (join, ("mllm", "weights")),
        (masks, ("model",)),
        (read, ("model", "sae", "masks")),
        (ties, ("model", "states")),
    ):
        part = stages.add_parser(stage.__name__, help=stage.__doc__)
        for option in (*options, "output"):
            part.add_argument(f"--{option}", type=Path, required=True)
        part.set_defaults(run=stage)
        if stage is masks:
            part.add_argument("--minutes", type=float, default=15)
        if stage is read:
            part.add_argument("--scenes", type=int, default=2800)
            part.add_argument("--patch-steps", type=int, default=1200)
            part.add_argument("--mask-steps", type=int, default=2200)
        if stage is ties:
            part.add_argument("--scenes", type=int, default=800)
            part.add_argument("--look-steps", type=int, default=TiesConfig.look_steps)
            part.add_argument("--place-steps", type=int, default=TiesConfig.place_steps)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
