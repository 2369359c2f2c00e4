"""The criteria of `criteria` over procedural scenes: labels from some scenes, records of others.

The model writes its own reasoning, greedily; the masks that are examined are those that are right. Labels come from
reference reasoning on training scenes (thresholds) and on held-out scenes of another seed (F1 and lift), never from
those examined.
"""

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from segcompass.loaders import load_rows
from segcompass.loaders.masks import encode_mask
from segcompass.loaders.scene_drawing import COLOURS, SHAPES, Scene
from segcompass.loaders.scenes import STYLES, scene_question
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.states import ReasoningStates
from segcompass.modeling_segcompass.token_layout import IMAGE, RESPONSE, find_slots
from segcompass.trainers.targets import patch_coverage

from .concept_access import reading_of
from .criteria import SHOWS, Labels, Truth, measure_slot
from .decoding import decode, overlap, single_sample
from .detectors import score_all
from .dictionary_reader import TokenReader
from .scene_attributes import ATTRIBUTES, COVERED, NAMES_F1, NAMES_LIFT
from .shared_concepts import Sample, decoder_cosines, exchanged, identity, shared_detectors
from .steered_reasoning import measure_steered_reasoning

PLACES = (
    *(column + row for column in "ABCD" for row in "1234"),
    *(f"column {column}" for column in "ABCD"),
    *(f"row {row}" for row in "1234"),
)
NAMED = (*ATTRIBUTES, *PLACES)
"""The attributes that concepts may detect."""
READINGS = ("scene", "patch", "word", "phrase")
"""Where: those of `scene_attributes`, and words of the reasoning that describe an object which has the attribute."""
STEERS_F1, HANDS_F1, DETECTORS = 0.3, 0.5, 10
CONFIDENT = 0.5
STEERED = 100
"""Of so many first scenes the response is written again under steering, six times each."""

_PHRASE = re.compile(
    rf"\b([A-D][1-4])(?:(?: small| large)?(?: {'| '.join(COLOURS)}) (?:{'|'.join(SHAPES)}))?",
)


class Found(NamedTuple):
    """Labels, and how many concepts they rest on."""

    labels: Labels
    counts: dict[str, Any]
    """JSON: how many concepts name anything, and which attributes none names."""


def _attributes(thing: Any) -> list[str]:
    column, row = thing.place
    return [thing.colour, thing.shape, thing.size, thing.place, f"column {column}", f"row {row}"]


def patch_cover(scene: Scene, boxes: torch.Tensor) -> np.ndarray:
    """How much of each patch that the MLLM sees shows each object.

    Args:
        scene: with n objects.
        boxes: float (P, 4), the part of the image that each patch shows.

    Returns:
        float (n, P).
    """
    height, width = scene.image.shape[:2]
    return patch_coverage([encode_mask(mask) for mask in scene.masks], height, width, boxes).numpy()


def _read_labelled(reader, dataset, split, seed, count, batch_size):
    """reading -> (activations float (N, d_sae), present bool (N, A)) of scenes; and a Sample of each scene."""
    values: dict[str, list[torch.Tensor]] = {reading: [] for reading in READINGS}
    truths: dict[str, list[torch.Tensor]] = {reading: [] for reading in READINGS}
    place_of = {name: number for number, name in enumerate(NAMED)}
    samples = []
    usual = reader.model.sae.mean_active_activation.clamp_min(1e-6).cpu()
    rows = load_rows(dataset, split, seed, count)
    for start in tqdm(range(0, count, batch_size), unit="batch", desc=f"labels, {split}", dynamic_ncols=True):
        batch = [rows[index] for index in range(start, min(start + batch_size, count))]
        for number, tokens in enumerate(reader.read(batch), start):
            scene, _ = scene_question(split, seed, number, **STYLES[dataset])
            has = np.zeros((len(scene.objects), len(NAMED)), bool)  # (n, A)
            for row, thing in enumerate(scene.objects):
                has[row, [place_of[name] for name in _attributes(thing)]] = True
            cover = patch_cover(scene, tokens.boxes)  # (n, patches)
            clear = ((cover.max(0) >= COVERED) | (cover.sum(0) == 0)).nonzero()[0]
            image = tokens.activations[tokens.types == IMAGE]  # (patches, d_sae)
            values["scene"].append(image.amax(0, keepdim=True))
            truths["scene"].append(torch.from_numpy(has.any(0))[None])
            values["patch"].append(image[clear].half())
            truths["patch"].append(torch.from_numpy((cover.T @ has)[clear] >= COVERED))
            text = (tokens.types != IMAGE).tolist()
            words = reader.words([token for token, chosen in zip(tokens.ids, text, strict=True) if chosen])
            written = [kind == RESPONSE for kind in tokens.types.tolist() if kind != IMAGE]
            word, phrase = _said(words, written, scene, has, place_of)
            activations = tokens.activations[tokens.types != IMAGE].half()
            values["word"].append(activations)
            truths["word"].append(word)
            values["phrase"].append(activations[torch.tensor(written)])
            truths["phrase"].append(phrase[torch.tensor(written)])
            said = tokens.types == RESPONSE
            samples.append(
                Sample(
                    patch_codes=image / usual,
                    patch_states=tokens.states[tokens.types == IMAGE],
                    word_codes=tokens.activations[said] / usual,
                    word_states=tokens.states[said],
                    words=[name for name, mine in zip(words, written, strict=True) if mine],
                    cover=cover,
                    has=has[:, : len(ATTRIBUTES)],
                )
            )
    return samples, {reading: (torch.cat(values[reading]).float(), torch.cat(truths[reading])) for reading in READINGS}


def _said(words, written, scene: Scene, has, place_of):
    """bool (T, A) each: the word is the attribute's name; the word is of a phrase about an object that has it."""
    word = torch.zeros(len(words), len(NAMED), dtype=torch.bool)
    phrase = torch.zeros_like(word)
    text, ends = "", []
    for number, (piece, mine) in enumerate(zip(words, written, strict=True)):
        name = piece
        if mine and piece in ("A", "B", "C", "D"):
            name = f"column {piece}"
        elif mine and piece in ("1", "2", "3", "4"):
            name = f"row {piece}"
        if name in place_of:
            word[number, place_of[name]] = True
        joined = bool(text) and piece[:1].isdigit() and text[-1:] in "ABCD"  # "B", "4" is the place B4
        text += ("" if joined else " ") + (piece if mine else " " * len(piece))
        ends.append((len(text) - len(piece), len(text)))
    for match in _PHRASE.finditer(text):
        for row, thing in enumerate(scene.objects):
            if thing.place == match.group(1):
                inside = [a < match.end() and b > match.start() for a, b in ends]
                phrase[torch.tensor(inside)] |= torch.from_numpy(has[row])
    return word, phrase


def find_labels(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    dataset: str,
    held_out: str,
    seed: int,
    chosen: int,
    scored: int,
    batch_size: int,
) -> Found:
    """Which concepts detect which attributes: thresholds on training scenes, F1 and lift on held-out scenes.

    Args:
        model: in evaluation mode.
        processor: the model's.
        dataset: "scenes" or "mixed-scenes".
        held_out: split of the held-out scenes.
        seed: of the training scenes; the held-out ones have the next.
        chosen: how many training scenes.
        scored: how many held-out scenes.
        batch_size: scenes read at a time.

    Returns:
        The labels.
    """
    reader = TokenReader(model, processor)
    _, train = _read_labelled(reader, dataset, "train", seed, chosen, batch_size)
    samples, other = _read_labelled(reader, dataset, held_out, seed + 1, scored, batch_size)
    scores = {name: score_all(*train[name], *other[name]) for name in READINGS}  # F1 and lift, (A, d_sae)
    good = torch.stack([(f1 >= NAMES_F1) & (lift >= NAMES_LIFT) for f1, lift in scores.values()]).any(0).numpy()
    f1, lift = scores["patch"]
    on_patches = torch.where(lift >= STEERS_F1, f1, 0)  # (A, d_sae)

    def detectors(row, least):
        best, places = on_patches[row].topk(min(DETECTORS, on_patches.shape[1]))
        return tuple(int(place) for place, value in zip(places, best, strict=True) if value >= least)

    looks = list(enumerate(ATTRIBUTES))
    said = torch.maximum(scores["word"][0], scores["phrase"][0])  # (A, d_sae)
    shared = shared_detectors(f1[: len(ATTRIBUTES)], said[: len(ATTRIBUTES)])
    on_patch, on_word = decoder_cosines(samples, shared["best"], model.sae.W_dec.detach().float().cpu())
    shared |= {
        "identity": identity(samples),
        "control identity": identity(samples, exchanged()),
        "cosine on patches": on_patch,
        "cosine on words": on_word,
    }
    shared = {name: None if value != value else value for name, value in shared.items()}
    labels = Labels(
        names={name: good[row] for row, name in enumerate(NAMED)},
        steers={name: detectors(row, STEERS_F1) for row, name in looks},
        hands={name: detectors(row, HANDS_F1) for row, name in looks},
    )
    counts = {
        "concepts": good.shape[1],
        "name something": int(good.any(0).sum()),
        "name a look": int(good[: len(ATTRIBUTES)].any(0).sum()),
        "shared": shared,
        "looks without a name": [name for row, name in looks if not good[row].any()],
        "training scenes": chosen,
        "held-out scenes": scored,
        "held-out split": held_out,
    }
    return Found(labels, counts)


def reference_batches(
    model: SegCompassModel, processor: SegCompassProcessor, dataset: str, seed: int, count: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Training scenes with their reference reasoning, as inputs of the model's forward.

    Args:
        model: for its device.
        processor: the model's.
        dataset: "scenes" or "mixed-scenes".
        seed: of the scenes.
        count: how many.
        batch_size: scenes at a time.

    Yields:
        One batch.
    """
    rows = load_rows(dataset, "train", seed, count)
    for start in tqdm(range(0, count, batch_size), unit="batch", desc="mean contents", dynamic_ncols=True):
        batch = [rows[index] for index in range(start, min(start + batch_size, count))]
        inputs = processor(
            images=[row["image"] for row in batch],
            text=[row["instruction"] for row in batch],
            response=[processor.format_response(row["reasoning"]) for row in batch],
        )
        yield {**inputs.to(model.device), "skip_lm_head": True}


# -- records ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_scenes(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    rows: list[dict[str, Any]],
    numbers: list[int],
    dataset: str,
    split: str,
    seed: int,
    labels: Labels,
    means: Any,
) -> Iterator[dict[str, Any]]:
    """Measure one batch of scenes.

    Args:
        model: in evaluation mode.
        processor: the model's.
        rows: of `load_scenes`.
        numbers: of the rows.
        dataset: "scenes" or "mixed-scenes".
        split: of the scenes.
        seed: of the scenes.
        labels: from other scenes.
        means: what the reading's class gathered.

    Yields:
        One record per row, of types that JSON knows: `sample_id`; `slots`, what `measure_slot` says of each right mask
        (None for nan), with its `slot` and `heaviest` concept; `twins`, of each target whose looks another object has
        too, whether a right mask shows it; `moves`, of each ordered pair of questions whose own masks were right;
        `steered`, of each response that was written again, see `measure_steered_reasoning`.
    """
    reading_class = reading_of(model)
    scenes = [scene_question(split, seed, number, **STYLES[dataset]) for number in numbers]
    inputs = processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows])
    _, states = model.reason(**inputs.to(model.device))
    pairs = [(place, two_questions(scene)) for place, (scene, _) in enumerate(scenes)]
    asked = [(place, pair) for place, pair in pairs if pair is not None]
    moves: dict[int, list[dict[str, float]]] = {}
    if asked:
        images = [rows[place]["image"] for place, _ in asked for _ in range(2)]
        inputs = processor(images=images, text=[text for _, pair in asked for _, text in pair])
        _, answers = model.reason(**inputs.to(model.device))
        for number, (place, pair) in enumerate(asked):
            both = [single_sample(answers, 2 * number + side) for side in (0, 1)]
            moves[place] = interchange(model, both, [thing for thing, _ in pair], _on_frame(model, scenes[place][0]))
    outputs: Any = decode(model, states)
    for place, (row, (scene, question)) in enumerate(zip(rows, scenes, strict=True)):
        record: dict[str, Any] = {"sample_id": row["sample_id"], "slots": [], "moves": moves.get(place, [])}
        looks = [{"colour": x.colour, "shape": x.shape, "size": x.size} for x in scene.objects]
        masks = _on_frame(model, scene)  # (n, 4h, 4w)
        right = _right_slots(outputs, place, masks, question.targets)
        shown = {target for _, target in right}
        record["twins"] = [float(t in shown) for t in question.targets if looks.count(looks[t]) > 1]
        record["steered"] = []
        if numbers[place] < STEERED:
            rng = np.random.default_rng([seed, numbers[place]])
            steered = measure_steered_reasoning(model, processor, row, labels.hands, rng)
            record["steered"] = [] if steered is None else [steered]
        if right:
            reading = reading_class(model, single_sample(states, place), means)
            truth = Truth(
                masks=masks,
                cover=patch_cover(scene, outputs.patch_boxes[place]),
                looks=looks,
                places=[tuple(_attributes(thing)[3:]) for thing in scene.objects],
                targets=list(question.targets),
            )
            for slot, target in right:
                rng = np.random.default_rng([seed, numbers[place], slot])
                measured = measure_slot(reading, slot, target, truth, labels, rng)
                known = {name: None if value != value else value for name, value in measured.items()}
                heaviest = int(reading.indices[reading.weights[slot].argmax()])
                record["slots"].append({"slot": slot, "heaviest": heaviest, **known})
        yield record


def _on_frame(model, scene):
    """bool (n, 4h, 4w): a scene's masks on the frame of the mask logits, False in its padding."""
    side, frame = 4 * model.config.key_grid, model.config.frame
    height, width = (round(length * side / frame.side) for length in frame.reshaped_size(*scene.masks.shape[1:]))
    masks = torch.from_numpy(scene.masks)[:, None].float().to(model.device)
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


def two_questions(scene: Scene) -> list[tuple[int, str]] | None:
    """Two objects that can each be asked for by look alone, and how.

    Args:
        scene: any.

    Returns:
        [(object, instruction), (object, instruction)], or None when there are no two.
    """
    found = []
    for number, thing in enumerate(scene.objects):
        for names in (("colour", "shape"), ("shape",), ("colour",)):
            same = [all(getattr(other, name) == getattr(thing, name) for name in names) for other in scene.objects]
            if sum(same) == 1:
                words = [getattr(thing, name) for name in names]
                found.append((number, "find the " + " ".join(words + ["thing"] * ("shape" not in names))))
                break
    return found[:2] if len(found) > 1 else None


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
