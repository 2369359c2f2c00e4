"""Which of two things that look alike is meant: the last phase of the grounded read-out, on cached states.

    learn_ties(model, [states, states_of_ties], "runs/ties.pt", TiesConfig())

Most of a step's images ask for things of which two bear the same words, so that only places can tell them apart. What
chooses places learns (U, V, B, and β at places); what chooses looks, the image encoder's grid and the mask decoder stay
as they are. With looks free to move, masks got better and their concepts' names worse (dev/log.md).
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
from .grounded_masks import CachedStates


@dataclass
class TiesConfig:
    """How the read-out learns to tell equal things apart.

    Example:
        >>> config = TiesConfig(steps=200)
        >>> for entry in learn_ties(model, ["runs/states", "runs/twins"], "runs/ties.pt", config):
        ...     print(entry["step"], entry["patches"])
    """

    steps: int = 2000
    images: int = 12
    """of a step, with all their questions."""
    tied_share: float = 0.8
    """of them, in [0, 1]: images that ask for two things of equal names."""
    rate: float = 2e-3
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
    """Train the choice of places, mostly where equal things are asked for; resumes from `state_file`.

    Args:
        model: a SegCompassModel with a trained grounded read-out, changed in place.
        folders: where `cache_states` wrote.
        state_file: where the training is kept, written every `save_steps` steps and at the end.
        config: the settings.

    Yields:
        After each step its number and loss.

    Raises:
        ValueError: the read-out is not grounded, no cached image asks for two things of equal names, or the map U Vᵀ
            would move looks too.
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
    model.requires_grad_(False)
    learned = [reading.slot_bias, reading.concept_bias]
    learned += [] if reading.word_side is None else [reading.word_side, reading.patch_side]
    for value in learned:
        value.requires_grad_(True)
    looks = reading.concept_bias.detach().clone()
    optimizer = torch.optim.AdamW(learned, lr=config.rate, weight_decay=1e-3)
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        step = state["step"]
        reading.load_state_dict(state["reading"])
        optimizer.load_state_dict(state["optimizer"])
    while step < config.steps:
        generator = torch.Generator().manual_seed(hash((config.seed, step)) % 2**31)
        many = round(config.images * config.tied_share)
        chosen = [tied[place] for place in torch.randint(len(tied), (many,), generator=generator).tolist()]
        chosen += torch.randint(len(cached.images), (config.images - many,), generator=generator).tolist()
        batch = cached.batch(cached.rows_of(torch.tensor(sorted(set(chosen)))))
        inputs = batch["inputs"]
        read = reading(**inputs)
        pairs = match_patches(read.heatmaps, read.confidences, batch["coverage"], inputs["patch_mask"])
        shown = read.heatmaps[pairs.samples, pairs.slots]  # (n, P)
        patches = patch_loss(shown, pairs.coverage, inputs["patch_mask"][pairs.samples])
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / config.steps)) / 2
        optimizer.zero_grad()
        patches.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        with torch.no_grad():
            reading.concept_bias.copy_(torch.where(reading.is_place, reading.concept_bias, looks))
        step += 1
        if step % config.save_steps == 0 or step == config.steps:
            kept = {"step": step, "reading": reading.state_dict(), "optimizer": optimizer.state_dict()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, partial(torch.save, kept))
        yield {"step": step, "patches": patches.item()}
