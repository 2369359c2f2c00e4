"""Which of two things that look alike is meant: the last phases of the grounded read-out, on cached states.

    learn_ties(model, [states, states_of_ties], "runs/ties.pt", TiesConfig())

Images that ask for things of which two bear the same words are drawn more often than they come, so that only places can
tell what is meant. First the whole choice of concepts learns, with the losses of `grounded_masks`' phase on patches, so
that looks keep saying what they say; then what chooses places alone (U, V, B, and β at places). The image encoder's
grid and the mask decoder stay as they are. What other orders and losses did is in dev/log.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segcompass.modeling_segcompass.whole_files import write_whole

from .grounded_losses import match_patches, patch_loss
from .grounded_masks import CachedStates, GroundedMasksConfig, grounded_loss


@dataclass
class TiesConfig:
    """How the read-out learns to tell equal things apart.

    Example:
        >>> config = TiesConfig(look_steps=200, place_steps=100)
        >>> for entry in learn_ties(model, ["runs/states", "runs/twins"], "runs/ties.pt", config):
        ...     print(entry["phase"], entry["step"], entry["loss"])
    """

    look_steps: int = 2500
    """of the first phase, in which looks learn too."""
    place_steps: int = 2000
    """of the second, of places alone."""
    images: int = 12
    """of a step, with all their questions."""
    tied_shares: tuple[float, float] = (0.3, 0.8)
    """of them, in [0, 1], in each phase: images that ask for two things of equal names."""
    rates: tuple[float, float] = (1e-3, 3e-3)
    lambda_hand_over: float = 2.0
    """of handed-over heatmaps in the first phase, see `GroundedMasksConfig`; as the next two."""
    lambda_name: float = 0.1
    held_out: tuple[str, ...] = ()
    save_steps: int = 50
    seed: int = 0


def asks_for_twins(names: Sequence[Sequence[str]]) -> bool:
    """Whether two targets bear the same words.

    Args:
        names: of each target, the meanings by which the conclusion names it.

    Returns:
        False also where a target bears none.
    """
    sets = [tuple(sorted(set(said))) for said in names]
    return all(sets) and len(set(sets)) < len(sets)


def learn_ties(
    model: Any, folders: Sequence[str | Path], state_file: str | Path, config: TiesConfig
) -> Iterator[dict[str, float]]:
    """Train the choice of concepts, often where equal things are asked for; resumes from `state_file`.

    Args:
        model: a SegCompassModel with a trained grounded read-out, changed in place.
        folders: where `cache_states` wrote.
        state_file: where the training is kept, written every `save_steps` steps and at the end.
        config: the settings.

    Yields:
        After each step its phase, number and loss.

    Raises:
        ValueError: the read-out is not grounded, no cached image asks for two things of equal names, the map U Vᵀ would
            move looks too, or `state_file` is of a training of another kind, such as one in which only places learned.
    """
    if not model.grounded:
        raise ValueError(
            f"concept_reading is {model.config.concept_reading!r}; only a model built with 'grounded' learns here."
        )
    cached, path, reading = CachedStates(*folders), Path(state_file), model.grounded_reading
    tied = [
        number
        for number, rows in enumerate(cached.images)
        if any(asks_for_twins(cached.records[row]["names"]) for row in rows)
    ]
    if not tied:
        raise ValueError(
            f"no image of {', '.join(map(str, folders))} asks for two things of equal names; cache rows that do, such "
            "as load_scenes(..., twins=0.9)."
        )
    if reading.word_side is not None and not reading.maps_places_only:
        raise ValueError("grounded_map is 'all', and the map would move looks too; build the model with 'places'.")
    words, detectors = cached.detectors(config.held_out)
    losses = GroundedMasksConfig(lambda_hand_over=config.lambda_hand_over, lambda_name=config.lambda_name)
    start: dict[str, Any] = torch.load(path, weights_only=True) if path.exists() else {"phase": 0, "step": 0}
    if "phase" not in start:
        raise ValueError(
            f"{path} is no state of this training, which has two phases (it holds {', '.join(start)}); give another "
            "state_file, or remove this one to begin anew."
        )
    if "reading" in start:
        reading.load_state_dict(start["reading"])
    for phase, steps in enumerate((config.look_steps, config.place_steps)):
        if phase < start["phase"]:
            continue
        learned = _learned(reading, phase)
        model.requires_grad_(False)
        for value in learned:
            value.requires_grad_(True)
        looks = reading.concept_bias.detach().clone()
        optimizer = torch.optim.AdamW(learned, lr=config.rates[phase], weight_decay=1e-3)
        step = 0
        if "optimizer" in start and phase == start["phase"]:
            step = start["step"]
            optimizer.load_state_dict(start["optimizer"])
        while step < steps:
            generator = torch.Generator().manual_seed(hash((config.seed, phase, step)) % 2**31)
            many = round(config.images * config.tied_shares[phase])
            chosen = [tied[place] for place in torch.randint(len(tied), (many,), generator=generator).tolist()]
            chosen += torch.randint(len(cached.images), (config.images - many,), generator=generator).tolist()
            batch = cached.batch(cached.rows_of(torch.tensor(sorted(set(chosen)))))
            if phase == 0:
                loss, _ = grounded_loss(model, batch, words, detectors, 0, losses, generator)
            else:
                loss = _patches(reading, batch)
            rate = config.rates[phase] * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            if phase == 1:
                with torch.no_grad():
                    reading.concept_bias.copy_(torch.where(reading.is_place, reading.concept_bias, looks))
            step += 1
            if step % config.save_steps == 0 or step == steps:
                kept = {"phase": phase, "step": step, "reading": reading.state_dict()}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, partial(torch.save, {**kept, "optimizer": optimizer.state_dict()}))
            yield {"phase": phase + 1, "step": step, "loss": loss.item()}


def _learned(reading, phase):
    """What learns in a phase: the choice of concepts, the heatmap and the confidence, or the choice of places."""
    if phase == 0:
        fixed = ("upsampling.", "key_")  # the image encoder's grid
        return [value for name, value in reading.named_parameters() if not name.startswith(fixed)]
    mapped = [] if reading.word_side is None else [reading.word_side, reading.patch_side]
    return [reading.slot_bias, reading.concept_bias, *mapped]


def _patches(reading, batch):
    """The loss of what matched slots show, on patches."""
    inputs = batch["inputs"]
    read = reading(**inputs)
    pairs = match_patches(read.heatmaps, read.confidences, batch["coverage"], inputs["patch_mask"])
    return patch_loss(read.heatmaps[pairs.samples, pairs.slots], pairs.coverage, inputs["patch_mask"][pairs.samples])
