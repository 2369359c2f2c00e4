"""Training of the grounded read-out and the mask decoder on cached states: MLLM, SAE and image encoder stay frozen.

    cache_states(model, processor, rows, "runs/states")         # one pass of the MLLM over all rows, resumable
    train_grounded(model, "runs/states", "runs/masks.pt", GroundedMasksConfig())

Phase 1 learns on patches alone: which words a slot reads, which concepts they choose. Phase 2 adds the image encoder's
grid and the mask decoder. A batch holds whole images with all their questions, so that one question's words can be
handed to another's slot (`grounded_losses`). Which rows a step sees hangs on seed, phase and step alone, so a resumed
training is the uninterrupted one.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.grounded_reading import DECODER_CONFIDENCE, centred, concept_spread
from segcompass.modeling_segcompass.image_encoder import encoder_of
from segcompass.modeling_segcompass.patch_boxes import boxes_of_tokens, has_area
from segcompass.modeling_segcompass.token_layout import conclusion_mask, gather_positions
from segcompass.modeling_segcompass.whole_files import write_whole

from .alignment import WordKind, any_word
from .collator import SegCompassCollator
from .grounded_losses import (
    confidence_loss,
    hand_over,
    left_over,
    match_patches,
    name_loss,
    patch_loss,
    shared_slots,
    without_looks,
    word_detectors,
)
from .targets import patch_coverage

CHUNK = 60  # rows of one file of the cache
STANDS_OUT = 0.5  # strength above its mean from which a concept stands out on an image
CELLS = 8  # along a side of the frame, to say where a concept is at home
COMMON = 6.0  # how much the start of β holds back what stands out on every image


@dataclass
class GroundedMasksConfig:
    """How the read-out and the mask decoder learn on cached states.

    Example:
        >>> config = GroundedMasksConfig(patch_steps=600, mask_steps=700)
        >>> train_grounded(model, "runs/states", "runs/masks.pt", config)
    """

    patch_steps: int = 700
    """of phase 1; in the first half every concept shares a slot, then the heaviest few."""
    patch_images: int = 16
    """images of a step of phase 1, with all their questions."""
    patch_rate: float = 5e-3
    mask_steps: int = 700
    """of phase 2."""
    mask_images: int = 4
    reading_rate: float = 5e-4
    """of the read-out in phase 2."""
    decoder_rate: float = 5e-4
    guide_rate: float = 2e-3
    """of the map from patches to the image encoder's grid."""
    lambda_hand_over: float = 1.0
    """of the handed-over heatmaps in phase 1."""
    lambda_name: float = 0.0
    """of naming by phrases, in both phases; shared firing of words and patches needs none."""
    lambda_left: float = 0.3
    """of what masks still show without their looks, in phase 2."""
    jitter: float = 0.6
    """in phase 2, each contribution of 60 % of the slots is made weaker by up to this share."""
    held_out: tuple[str, ...] = ()
    """meanings of words that the name term leaves out, to see whether naming is more than what it was taught."""
    save_steps: int = 50
    seed: int = 0


# -- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_states(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    folder: str | Path,
    word_kind: WordKind = any_word,
    batch_size: int = 12,
) -> None:
    """Store what the masks' training reads of each row, on the reference responses.

    Repeated, it continues after the files that are there.

    Args:
        model: a SegCompassModel with `concept_reading="grounded"`, a trained SAE and a trained image encoder.
        processor: its SegCompassProcessor.
        rows: with `reasoning`, `masks` and, for the name term, `phrases`; questions about one image share `image_id`.
        folder: where the files go.
        word_kind: what the words of phrases say, see `AlignmentTargets`.
        batch_size: rows of one pass.

    Raises:
        ValueError: the model's read-out is not grounded.
    """
    if not model.grounded:
        raise ValueError(
            f"concept_reading is {model.config.concept_reading!r}; only a model built with 'grounded' learns here."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    for number, start in enumerate(range(0, len(rows), CHUNK)):
        path = folder / f"{number:05}.pt"
        if path.exists():
            continue
        part = [rows[index] for index in range(start, min(start + CHUNK, len(rows)))]
        records = []
        for first in range(0, len(part), batch_size):
            records += _records(model, processor, part[first : first + batch_size], word_kind)
        write_whole(path, partial(torch.save, records))


def _records(model, processor, rows, word_kind):
    config, backbone = model.config, backbone_of(model)
    batch = SegCompassCollator(processor, 4 * config.key_grid)(rows)
    targets = batch.pop("mask_targets")
    ids, attention, response = (batch[name] for name in ("input_ids", "attention_mask", "response_mask"))
    with model.reading_states() as recorder:
        backbone.without_head(model.mllm)(**backbone.mllm_inputs(model.mllm, batch), use_cache=False)
        states = recorder.states_of_pass(ids, attention, response)
    keys = encoder_of(model).encode(model.image_encoder, batch["encoder_pixel_values"])
    image = ids == config.image_token_id
    words, word_mask = gather_positions(conclusion_mask(ids, attention, response, config) & ~image)
    boxes = boxes_of_tokens(batch["patch_boxes"], image)  # (B, T, 4)
    shows = has_area(boxes)
    patches, is_patch = gather_positions(shows)  # (B, P)
    boxes = boxes[torch.arange(len(ids))[:, None], patches] * is_patch[..., None]  # (B, P, 4)
    xy, size, on_image = config.frame.place_boxes(boxes, batch["reshaped_input_sizes"])
    usual = model.sae.mean_active_activation.clamp_min(1e-6)
    records = []
    for index, row in enumerate(rows):
        places = words[index][word_mask[index]]
        cover = partial(patch_coverage, height=row["height"], width=row["width"], boxes=boxes[index][is_patch[index]])
        records.append(
            {
                "image": row["image_id"],
                "things": [mask["counts"] for mask in row["masks"]],
                "word_codes": (model.sae.encode(states.z[index, places]) / usual).half().to_sparse(),
                "word_states": states.last_hidden[index, places].half(),
                "patch_codes": (model.sae.encode(states.z[index, shows[index]]) / usual).half().to_sparse(),
                "patch_mask": on_image[index][is_patch[index]],
                "patch_xy": xy[index][is_patch[index]],
                "patch_size": size[index][is_patch[index]],
                "keys": keys[index].half(),
                "reshaped": batch["reshaped_input_sizes"][index],
                "masks": (255 * targets[index]).round().byte(),
                "coverage": cover(row["masks"]),
                **_said(row, cover, word_kind),
            }
        )
    return records


def _said(row, cover, word_kind):
    """The meanings that patches show, and those by which the conclusion names each target."""
    shown: dict[str, Tensor] = {}
    names: list[list[str]] = [[] for _ in row["masks"]]
    reasoning = row["reasoning"].rstrip(" .")
    conclusion = reasoning.rfind(". ") + 1
    for phrase in row.get("phrases") or []:
        owned = (cover(phrase["masks"]) >= 0.5).any(0)
        for word in re.findall(r"[^\W\d_]+|\d", phrase["text"]):
            if (meaning := word_kind(word)) is None:
                continue
            shown[meaning[1]] = shown[meaning[1]] | owned if meaning[1] in shown else owned
            if phrase["start"] >= conclusion:
                for target, mask in enumerate(row["masks"]):
                    if mask["counts"] in {named["counts"] for named in phrase["masks"]}:
                        names[target].append(meaning[1])
    return {"shown": shown, "names": names}


class CachedStates:
    """The rows of a cache in memory, by image.

    Args:
        *folders: where `cache_states` wrote; an image lies in one of them.

    Raises:
        ValueError: a folder has no cache.

    Example:
        >>> cached = CachedStates("runs/states")
        >>> batch = cached.batch(cached.rows_of(torch.tensor([0, 5])))
    """

    def __init__(self, *folders: str | Path):
        self.records: list[dict] = []
        for folder in folders:
            paths = sorted(Path(folder).glob("*.pt"))
            if not paths:
                raise ValueError(f"{folder} holds no cached states; make them with cache_states first.")
            for path in paths:
                self.records += torch.load(path, weights_only=True)
        by_image: dict[str, list[int]] = {}
        for index, record in enumerate(self.records):
            by_image.setdefault(record["image"], []).append(index)
        self.images = list(by_image.values())

    def rows_of(self, images: Tensor) -> list[int]:
        """The rows of some images."""
        return [row for image in images.tolist() for row in self.images[image]]

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Inputs of `GroundedReading` and all that the losses need, of some rows."""
        records = [self.records[row] for row in rows]

        def padded(name, sparse=False):
            parts = [(record[name].to_dense() if sparse else record[name]).float() for record in records]
            return pad_sequence(parts, batch_first=True)

        lengths = torch.tensor([len(record["word_states"]) for record in records])
        word_codes = padded("word_codes", sparse=True)
        patches = max(len(record["patch_mask"]) for record in records)
        return {
            "inputs": {
                "word_codes": word_codes,
                "word_states": padded("word_states"),
                "word_mask": torch.arange(word_codes.shape[1]) < lengths[:, None],
                "patch_codes": padded("patch_codes", sparse=True),
                "patch_mask": padded("patch_mask").bool(),
                "patch_xy": padded("patch_xy"),
            },
            "records": records,
            "coverage": [F.pad(record["coverage"], (0, patches - record["coverage"].shape[-1])) for record in records],
        }

    def spread_and_start(self) -> tuple[Tensor, Tensor]:
        """Of each concept, over how much of the image it is at home (`GroundedReading.spread`), and where β starts.

        What stands out on nearly every image ("something is here") tells no two objects apart, and words fire it too:
        without a start far below 0 every slot chose it, and training did not leave it (dev/log.md).
        """
        total, seen, common = torch.zeros(()), torch.zeros(CELLS**2), torch.zeros(())
        for rows in self.images:
            record = self.records[rows[0]]
            inside = record["patch_mask"]
            maps = centred(record["patch_codes"].to_dense()[None].float(), inside[None])[0]  # (P, d_sae)
            column, line = (record["patch_xy"][inside] * CELLS).long().clamp(0, CELLS - 1).unbind(-1)
            here = F.one_hot(line * CELLS + column, CELLS**2).float()  # (P, cells): grids of any shape meet in one
            total, seen = total + here.mT @ maps[inside], seen + here.sum(0)
            common = common + (maps.amax(0) > STANDS_OUT).float()
        share = common / len(self.images)
        mean = total[seen > 0] / seen[seen > 0, None]
        return concept_spread(mean), COMMON * torch.log((1 - share).clamp_min(0.01))

    def detectors(self, held_out: Sequence[str], images: int = 300) -> tuple[list[str], Tensor]:
        """The words of all phrases, and which concepts say them (`word_detectors`)."""
        first = [self.records[row] for rows in self.images[:images] for row in rows]
        words = sorted({word for record in first for word in record["shown"]})
        if not words:
            d_sae = self.records[0]["patch_codes"].shape[-1]
            return [], torch.zeros(0, d_sae, dtype=torch.bool)
        codes, shown = [], []
        for record in first:
            inside = record["patch_mask"]
            codes.append(record["patch_codes"].to_dense()[inside].float())
            nothing = torch.zeros_like(inside)
            shown.append(torch.stack([record["shown"].get(word, nothing)[inside] for word in words], 1))
        held = [words.index(word) for word in held_out if word in words]
        return words, word_detectors(torch.cat(codes), torch.cat(shown), held)


# -- the training -----------------------------------------------------------------------------------------------------


def train_grounded(
    model: Any, cache: str | Path, state_file: str | Path, config: GroundedMasksConfig
) -> Iterator[dict[str, float]]:
    """Train the read-out (phase 1), then read-out and mask decoder (phase 2); resumes from `state_file`.

    Args:
        model: the SegCompassModel, changed in place.
        cache: where `cache_states` wrote.
        state_file: where the training is kept, written every `save_steps` steps and at the end.
        config: the settings.

    Yields:
        After each step its phase, number and losses.
    """
    cached, path = CachedStates(cache), Path(state_file)
    reading, decoder = model.grounded_reading, model.mask_decoder
    model.requires_grad_(False)
    reading.requires_grad_(True)
    words, detectors = cached.detectors(config.held_out)
    start = torch.load(path, weights_only=True) if path.exists() else {"phase": 0, "step": 0}
    spread, bias = cached.spread_and_start()
    with torch.no_grad():
        reading.spread.copy_(spread)
        reading.concept_bias.copy_(bias)
    for phase, steps in enumerate((config.patch_steps, config.mask_steps)):
        if phase < start["phase"]:
            continue
        decoder.requires_grad_(phase == 1)
        optimizer = _optimizer(model, phase, config)
        step = 0
        if "reading" in start and phase == start["phase"]:
            step = start["step"]
            optimizer.load_state_dict(start["optimizer"])
        if "reading" in start:
            reading.load_state_dict(start["reading"])
            decoder.load_state_dict(start["decoder"])
            start = {"phase": 0}
        while step < steps:
            generator = torch.Generator().manual_seed(hash((config.seed, phase, step)) % 2**31)
            count = min(len(cached.images), config.mask_images if phase else config.patch_images)
            batch = cached.batch(cached.rows_of(torch.randperm(len(cached.images), generator=generator)[:count]))
            with shared_slots(model, phase == 0 and step < steps // 2):
                loss, parts = grounded_loss(model, batch, words, detectors, phase, config, generator)
            rate = min(1.0, (step + 1) / 30) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            step += 1
            if step % config.save_steps == 0 or step == steps:
                _save(path, model, optimizer, phase, step)
            yield {"phase": phase + 1, "step": step, "loss": loss.item(), **parts}


def _optimizer(model, phase, config):
    reading = model.grounded_reading
    if phase == 0:
        groups = [{"params": list(reading.parameters()), "peak": config.patch_rate}]
        return torch.optim.AdamW(groups, lr=config.patch_rate, weight_decay=1e-3)
    guide = list(reading.upsampling.parameters()) + [reading.key_scale, reading.key_shift]
    others = [p for p in reading.parameters() if all(p is not q for q in guide)]
    groups = [
        {"params": others, "peak": config.reading_rate},
        {"params": guide, "peak": config.guide_rate},
        {"params": list(model.mask_decoder.parameters()), "peak": config.decoder_rate},
    ]
    return torch.optim.AdamW(groups, lr=config.reading_rate, weight_decay=0.01)


def _save(path, model, optimizer, phase, step):
    state = {
        "phase": phase,
        "step": step,
        "reading": model.grounded_reading.state_dict(),
        "decoder": model.mask_decoder.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: torch.save(state, part))


def grounded_loss(
    model: Any,
    batch: dict[str, Any],
    words: Sequence[str],
    detectors: Tensor,
    phase: int,
    config: GroundedMasksConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """What a step of a phase learns from.

    Args:
        model: the SegCompassModel.
        batch: from `CachedStates.batch`, whole images with all their questions.
        words: W words, from `CachedStates.detectors`.
        detectors: bool (W, d_sae), the concepts that say them.
        phase: 0 on patches, 1 on masks.
        config: the settings.
        generator: chooses partners, erased slots and jitter.

    Returns:
        The loss, a scalar, and its parts by name.
    """
    reading, inputs, records = model.grounded_reading, batch["inputs"], batch["records"]
    read = reading(**inputs)
    pairs = match_patches(read.heatmaps, read.confidences, batch["coverage"], inputs["patch_mask"])
    samples, weights = pairs.samples, read.weights[pairs.samples, pairs.slots]  # (P,), (P, d_sae)
    inside = inputs["patch_mask"][samples]
    main = patch_loss(read.heatmaps[samples, pairs.slots], pairs.coverage, inside)
    confidence = confidence_loss(read.confidences, pairs)
    things = [records[b]["things"][t] for b, t in zip(samples.tolist(), pairs.targets.tolist(), strict=True)]
    given = hand_over(
        reading, read, pairs, [record["image"] for record in records], things, generator, 10 if phase else 48
    )
    spoken = [records[b]["names"][t] for b, t in zip(samples.tolist(), pairs.targets.tolist(), strict=True)]
    names = torch.tensor([[float(word in said) for word in words] for said in spoken]).view(len(spoken), len(words))
    name = name_loss(weights, (read.maps[samples] > 0).any(1), names, detectors)
    parts = {"patches": main.item(), "confidence": confidence.item(), "name": name.item()}
    if phase == 0:
        heat = _heat(reading, given.weights, read.maps[samples[given.givers]])
        handed = patch_loss(heat, pairs.coverage[given.givers], inside[given.givers])
        loss = main + 0.5 * confidence + config.lambda_hand_over * handed + config.lambda_name * name
        return loss, {**parts, "hand_over": handed.item()}
    if not len(samples):
        return 0.5 * confidence, parts
    erased = torch.randperm(len(samples), generator=generator)[:3]
    shown = torch.cat([_jittered(weights, config, generator), _jittered(given.weights, config, generator)])
    chosen = torch.cat([torch.arange(len(samples)), given.givers, erased])  # each slot's pair
    heatmaps, masks = _masks(
        model, torch.cat([shown, without_looks(reading, weights[erased])]), read.maps, batch, samples[chosen]
    )
    targets = [records[b]["masks"][t] for b, t in zip(samples.tolist(), pairs.targets.tolist(), strict=True)]
    wanted = torch.stack(targets)[chosen].float() / 255  # (n, 4h, 4w)
    kept = len(shown)
    probability, goal = masks[:kept].sigmoid(), wanted[:kept]
    overlap = (probability * goal).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.square().sum((1, 2)) + goal.square().sum((1, 2)) + 1)
    cells = F.avg_pool2d(goal[:, None], goal.shape[-1] // heatmaps.shape[-1])[:, 0]
    left = left_over(masks[kept:].sigmoid(), wanted[kept:])
    loss = (
        0.6 * dice.mean()
        + 0.6 * F.binary_cross_entropy_with_logits(masks[:kept], goal)
        + F.binary_cross_entropy_with_logits(heatmaps[:kept], cells)
        + 0.5 * (main + confidence)
        + config.lambda_left * left
        + config.lambda_name * name
    )
    return loss, {**parts, "dice": dice.mean().item(), "left": left.item()}


def _heat(reading, weights, maps):
    """One slot per row: (n, d_sae) weights and (n, P, d_sae) maps to (n, P) heatmaps."""
    return reading.heat(weights[:, None], maps)[:, 0]


def _jittered(weights, config, generator):
    """Weaker contributions for 60 % of the slots, so that the decoder does not take strength for size."""
    chosen = torch.rand(len(weights), 1, generator=generator) < 0.6
    return weights * (1 - chosen * config.jitter * torch.rand(weights.shape, generator=generator))


def _masks(model, weights, maps, batch, samples):
    """Heatmaps on the image encoder's grid (n, h, w) and mask logits (n, 4h, 4w) of n slots, each on its own image."""
    rows, inputs = [batch["records"][sample] for sample in samples.tolist()], batch["inputs"]
    reading = model.grounded_reading
    keys, reshaped = torch.stack([row["keys"] for row in rows]).float(), torch.stack([row["reshaped"] for row in rows])
    xy, patch_mask = inputs["patch_xy"][samples], inputs["patch_mask"][samples]
    sizes = [row["patch_size"] for row in rows]  # (P, 2) each; padding divides by 1
    size = torch.stack([F.pad(size, (0, 0, 0, xy.shape[1] - len(size)), value=1.0) for size in sizes])
    upsampling = reading.upsampling(keys, xy, size, patch_mask)
    heatmaps = reading.to_keys(_heat(reading, weights, maps[samples])[:, None], upsampling)  # (n, 1, h, w)
    cells = model.config.frame.cell_mask(reshaped, keys.shape[-1])
    positions = model.key_positions(keys.shape[-2:])
    sure = torch.full((len(rows), 1), DECODER_CONFIDENCE)
    return heatmaps[:, 0], model.mask_decoder(keys, positions, heatmaps, sure, cells)[:, 0]
