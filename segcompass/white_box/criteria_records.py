"""The criteria of `criteria` over images of which the truth is known: records of each, from which they are summed up.

The model writes its own reasoning, greedily; the masks that are examined are those that are right. What is true of an
image comes from `image_truth`, labels from `concept_labels`, and those from other images than the examined.
"""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import torch

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.states import ReasoningStates
from segcompass.modeling_segcompass.token_layout import find_slots

from .concept_access import reading_of
from .criteria import SHOWS, Labels, Truth, measure_slot
from .decoding import decode, overlap, single_sample
from .image_truth import Truths, patch_cover
from .steered_reasoning import measure_steered_reasoning

CONFIDENT = 0.5
STEERED = 100
"""Of so many first rows the response is written again under steering, six times each."""


@torch.no_grad()
def measure_images(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    rows: list[dict[str, Any]],
    numbers: list[int],
    truths: Truths,
    seed: int,
    labels: Labels,
    means: Any,
) -> Iterator[dict[str, Any]]:
    """Measure one batch of rows.

    Args:
        model: in evaluation mode.
        processor: the model's.
        rows: of the data set.
        numbers: of the rows.
        truths: of the data set.
        seed: of the random concepts.
        labels: from other rows.
        means: what the reading's class gathered.

    Yields:
        One record per row, of types that JSON knows: `sample_id`; `objects`, how many there are; `slots`, what
        `measure_slot` says of each right mask (None for nan), with its `slot` and `heaviest` concept; `twins`, of each
        target whose name another object has too, whether a right mask shows it; `asked`, whether there are two
        questions about the image; `moves`, of each ordered pair of questions whose own masks were right; `steered`, of
        each response that was written again, see `measure_steered_reasoning`.
    """
    reading_class = reading_of(model)
    truth_of = [truths.of(row) for row in rows]
    inputs = processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows])
    _, states = model.reason(**inputs.to(model.device))
    asked = [(place, truth.questions) for place, truth in enumerate(truth_of) if truth.questions]
    moves: dict[int, list[dict[str, float]]] = {}
    if asked:
        images = [rows[place]["image"] for place, _ in asked for _ in range(2)]
        inputs = processor(images=images, text=[text for _, pair in asked for _, text in pair])
        _, answers = model.reason(**inputs.to(model.device))
        for number, (place, pair) in enumerate(asked):
            both = [single_sample(answers, 2 * number + side) for side in (0, 1)]
            masks = _on_frame(model, truth_of[place].masks)
            moves[place] = interchange(model, both, [thing for thing, _ in pair], masks)
    outputs: Any = decode(model, states)
    for place, (row, known) in enumerate(zip(rows, truth_of, strict=True)):
        record: dict[str, Any] = {"sample_id": row["sample_id"], "objects": len(known.masks), "slots": []}
        record |= {"asked": bool(known.questions), "moves": moves.get(place, [])}
        masks = _on_frame(model, known.masks)  # (n, 4h, 4w)
        right = _right_slots(outputs, place, masks, known.targets)
        shown = {target for _, target in right}
        record["twins"] = [float(target in shown) for target in known.targets if known.has_twin(target)]
        record["steered"] = []
        if numbers[place] < STEERED:
            rng = np.random.default_rng([seed, numbers[place]])
            kinds = [truths.kinds[kind] for kind in truths.steered if kind in truths.kinds]
            steered = measure_steered_reasoning(model, processor, row, labels.hands, rng, kinds)
            record["steered"] = [] if steered is None else [steered]
        if right:
            reading = reading_class(model, single_sample(states, place), means)
            truth = Truth(
                masks=masks,
                cover=patch_cover(known.masks, reading.patch_boxes),
                looks=known.looks,
                places=known.places,
                targets=known.targets,
                steered=truths.steered,
            )
            for slot, target in right:
                rng = np.random.default_rng([seed, numbers[place], slot])
                measured = measure_slot(reading, slot, target, truth, labels, rng)
                values = {name: None if value != value else value for name, value in measured.items()}
                heaviest = int(reading.indices[reading.weights[slot].argmax()])
                record["slots"].append({"slot": slot, "heaviest": heaviest, **values})
        yield record


def _on_frame(model, objects):
    """bool (n, 4h, 4w): masks of an image, bool (n, H, W), on the frame of the mask logits, False in its padding."""
    side, frame = 4 * model.config.key_grid, model.config.frame
    height, width = (round(length * side / frame.side) for length in frame.reshaped_size(*objects.shape[1:]))
    if not len(objects):
        return torch.zeros(0, side, side, dtype=torch.bool, device=model.device)
    masks = torch.from_numpy(objects)[:, None].float().to(model.device)
    masks = torch.nn.functional.interpolate(masks, size=(height, width), mode="area")[:, 0] > 0.5
    return torch.nn.functional.pad(masks, (0, side - width, 0, side - height))


def _right_slots(outputs, place, masks, targets):
    """(slot, object) of each confident slot whose mask shows a target."""
    found = []
    for slot in outputs.slot_mask[place].nonzero()[:, 0].tolist() if targets else []:
        if outputs.pred_logits[place, slot].sigmoid() < CONFIDENT:
            continue
        ious = overlap(masks[targets], outputs.pred_masks[place, slot] > 0)
        if ious.max() >= SHOWS:
            found.append((slot, targets[int(ious.argmax())]))
    return found


def interchange(
    model: SegCompassModel, states: list[ReasoningStates], things: list[int], masks: torch.Tensor
) -> list[dict[str, float]]:
    """Whose object appears when two questions about one image exchange their concentration tokens' states?

    Args:
        model: in evaluation mode.
        states: of the two questions, a sample each.
        things: the objects that were asked for.
        masks: bool (n, 4h, 4w) of all objects.

    Returns:
        For each of the two directions: `move`, 1 if with A's tokens and B's concepts B's object is shown;
        `move_control`, 1 if A's is. [] unless both questions' own masks are right.
    """
    if any(_sure_overlap(model, own, masks[thing]) < SHOWS for own, thing in zip(states, things, strict=True)):
        return []
    moves = []
    for a, b in permutations((0, 1)):
        mixed = _with_tokens_of(model, states[b], states[a])
        moves.append(
            {
                "move": float(_sure_overlap(model, mixed, masks[things[b]]) >= SHOWS),
                "move_control": float(_sure_overlap(model, mixed, masks[things[a]]) >= SHOWS),
            }
        )
    return moves


def _sure_overlap(model, states, target):
    """IoU of the most confident slot's mask; 0 when it is not confident."""
    outputs: Any = decode(model, states)
    logits = outputs.pred_logits[0].masked_fill(~outputs.slot_mask[0], float("-inf"))
    slot = int(logits.argmax())
    return float(overlap(outputs.pred_masks[0, slot][None] > 0, target)[0]) if logits[slot] >= 0 else 0.0


def _with_tokens_of(model, states, other):
    """The states with the last hidden states of another question's concentration tokens at its own."""
    (own, have), (theirs, had) = (find_slots(x.input_ids, x.response_mask, model.config) for x in (states, other))
    last = states.last_hidden.clone()
    shared = have[0] & had[0]
    last[0, own[0][shared]] = other.last_hidden[0, theirs[0][shared]]
    return states._replace(last_hidden=last)
