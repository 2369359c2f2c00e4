"""Segments one image and writes down everything that came out: the work of `segcompass segment`."""

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from segcompass.box_formats import Answer
from segcompass.boxes_route import BoxesRoute
from segcompass.drawing import ConceptTile, draw_overlay, label_image, legible
from segcompass.loaders.folder_lock import folder_lock
from segcompass.loaders.masks import encode_mask
from segcompass.loading import load
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.answering import NO_TOKENS, reasoning_of, verdict_of
from segcompass.modeling_segcompass.explanation import Explanation, heaviest_concepts
from segcompass.modeling_segcompass.explanation_page import render_html
from segcompass.modeling_segcompass.images import read_image
from segcompass.modeling_segcompass.patch_boxes import has_area
from segcompass.modeling_segcompass.whole_files import write_whole
from segcompass.routes import QUERY_SOURCES, check_route
from segcompass.shipped import notes_on

LARGEST_EXPLAINED = 1600
"""Longest side of the image in explanation.html, pixels: whole, a photograph's took half a minute and gigabytes."""


def segment_image(
    source: str,
    instruction: str,
    model: str,
    output: Path,
    threshold: float = 0.5,
    explain: bool = False,
    route: str = "concepts",
) -> dict:
    """Segment an image, print the result, and write overlay.jpg, masks.png and result.json.

    Args:
        source: file or URL of the image.
        instruction: what to segment in it.
        model: SegCompass folder or Hub id.
        output: folder to write into; made if it does not exist.
        threshold: confidence, in [0, 1], from which a slot is kept.
        explain: write explanation.html and explanation.png too.
        route: "concepts" or "tokens".

    Returns:
        The content of result.json.

    Raises:
        OSError: the image cannot be read, the results cannot be written, or another run writes into the folder.
        ValueError: no such model, one that cannot take the route, or an empty or too long instruction.
    """
    image = read_image(source)
    segcompass, processor = load(model)
    check_route(segcompass, route)
    labels = segcompass.concept_labels  # read with the model, {} without a dictionary
    inputs = processor(images=image, text=instruction).to(segcompass.device)
    unknown, notes = notes_on(segcompass, processor.tokenizer, source, instruction)
    print(*notes, sep="\n", end="\n" * bool(notes))
    with torch.no_grad():  # once, for the masks and for what they lose without a concept
        keys = segcompass.get_image_embeddings(inputs.pop("encoder_pixel_values"))
    outputs: Any = segcompass.segment(**inputs, image_embeddings=keys, query_source=QUERY_SOURCES[route])

    sizes = inputs["original_sizes"]
    instances = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)[0]
    result = {**describe(instruction, outputs, processor, instances), "unknown_words": unknown}
    reasoning = reasoning_of(result["text"])
    verdict = verdict_of(len(result["instances"])) if outputs.slot_mask[0].any() else NO_TOKENS
    report(result, reasoning, verdict)

    masks = instances["masks"].cpu().numpy()
    slots, scores = instances["slots"].tolist(), instances["scores"].tolist()
    heatmaps = slot_heatmaps(outputs, processor, image, slots)
    shown = [slot for slot, _, _ in heatmaps]
    concepts = concept_heat(outputs, segcompass, shown)
    grounded = outputs.grounding is not None
    explanations = []
    if grounded or explain:  # the overlay has room for the concepts of a grounded read-out, whose sum the heatmap is
        explanations = explain_slots(segcompass, processor, outputs, shown, labels, keys)
    tiles = {report.slot: concept_tiles(report) for report in explanations if grounded}
    overlay = draw_overlay(image, result, reasoning, verdict, masks, heatmaps, concepts, tiles)
    write_results(output, result, label_image(masks, scores, slots), overlay)
    if explain:
        write_explanation(output, segcompass, processor, outputs, image, instruction, explanations)
    return result


def segment_image_by_boxes(
    source: str, instruction: str, mllm: str, image_encoder: str, output: Path, threshold: float = 0.0
) -> dict:
    """As `segment_image`, by the boxes route: overlay.jpg has the boxes of the answer in place of heatmaps.

    Args:
        source: file or URL of the image.
        instruction: what to segment in it.
        mllm: see `BoxesRoute`.
        image_encoder: likewise.
        output: folder to write into; made if it does not exist.
        threshold: SAM's estimate of a mask's IoU, in [0, 1], from which the mask is kept.

    Returns:
        The content of result.json.

    Raises:
        OSError: the image cannot be read, the results cannot be written, or another run writes into the folder.
        ValueError: what `BoxesRoute` refuses, or an empty or too long instruction.
    """
    image = read_image(source)
    route = BoxesRoute(mllm, image_encoder)
    outputs, (answer,) = route.segment([image], [instruction])
    sizes = [(image.height, image.width)]
    instances = route.processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)[0]
    result: dict[str, Any] = {
        "instruction": instruction,
        "text": answer.text,
        "no_target": answer.nothing,
        "instances": list_instances(instances),
        "concepts": [],
        "prompts": [
            {"slot": slot, "box": region.box, "point": region.point} for slot, region in enumerate(answer.regions)
        ],
        "left_out": answer.left_out,
        "fault": answer.fault,
    }
    verdict = verdict_of_answer(answer, len(result["instances"]), threshold)
    report(result, answer.text.strip(), verdict, "answer")
    masks, slots = instances["masks"].cpu().numpy(), instances["slots"].tolist()
    overlay = draw_overlay(image, result, answer.text, verdict, masks, [], prompts=result["prompts"])
    write_results(output, result, label_image(masks, instances["scores"].tolist(), slots), overlay)
    return result


def write_results(output: Path, result: dict, labels: Image.Image, overlay: Image.Image) -> None:
    """Write result.json, masks.png and overlay.jpg; what an earlier answer left beside them goes. Raises OSError."""
    with folder_lock(output):
        for name in ("explanation.html", "explanation.png", "overlay.png"):  # the last is an earlier version's
            (output / name).unlink(missing_ok=True)
        write_whole(output / "result.json", json.dumps(result, indent=2) + "\n")
        write_whole(output / "masks.png", labels.save)
        # no difference to be seen from a PNG, which is twice as large and takes five times as long
        write_whole(output / "overlay.jpg", partial(overlay.save, quality=92, subsampling=0))
    print(f"wrote overlay.jpg, masks.png and result.json to {output}")


# -- results as text and JSON ------------------------------------------------------------------------------------------


def describe(instruction: str, outputs: Any, processor: SegCompassProcessor, instances: dict) -> dict:
    """The content of result.json.

    Args:
        instruction: what was asked.
        outputs: SegCompassOutput of `model.segment` for one image.
        processor: the model's.
        instances: of `post_process_instance_segmentation` for that image.

    Returns:
        instruction, text, no_target, instances and concepts.
    """
    text = processor.decode(outputs.sequences[0, outputs.prompt_length :], skip_special_tokens=True)
    slots = instances["slots"].tolist()
    return {
        "instruction": instruction,
        "text": text,
        "no_target": bool(outputs.slot_mask[0].any()) and not slots,
        "instances": list_instances(instances),
        "concepts": [
            {"slot": slot, "index": concept.index, "weight": concept.weight, "value": concept.value}
            for slot in slots
            for concept in heaviest_concepts(outputs, slot)
        ],
    }


def list_instances(instances: dict) -> list[dict[str, Any]]:
    """The instances of one image as result.json has them."""
    return [
        {"slot": slot, "score": score, "box": box, "segmentation": encode_mask(mask)}
        for slot, score, box, mask in zip(
            instances["slots"].tolist(),
            instances["scores"].tolist(),
            instances["boxes"].int().tolist(),
            instances["masks"].cpu().numpy(),
            strict=True,
        )
    ]


def verdict_of_answer(answer: Answer, count: int, threshold: float) -> str:
    """What became of an MLLM's boxes, in one line.

    Args:
        answer: the MLLM's.
        count: of instances.
        threshold: from which a mask was kept.

    Returns:
        Such as "2 instances", "no target" or "no mask: the answer holds no box".
    """
    if answer.nothing:
        return "no target"
    if answer.fault:
        return f"no mask: {answer.fault}"
    if not count:
        return f"no mask: SAM made none with a pixel and a confidence of {threshold:g} or more"
    more = f", {answer.left_out} of the answer's boxes left out: no area, or outside the image" * bool(answer.left_out)
    return verdict_of(count) + more


def report(result: dict, text: str, verdict: str, called: str = "reasoning") -> None:
    """Print the result: what was asked, what was written and what it is called, and what came of it."""
    print(f"instruction  {result['instruction']}\n{called:<13}{text}\nresult       {verdict}")
    for instance in result["instances"]:
        box = ", ".join(map(str, instance["box"]))
        print(f"             slot {instance['slot']}  score {instance['score']:.3f}  box ({box})")


# -- pictures ----------------------------------------------------------------------------------------------------------


def slot_heatmaps(
    outputs: Any, processor: SegCompassProcessor, image: Image.Image, kept: list[int]
) -> list[tuple[int, float, np.ndarray]]:
    """(slot, confidence, heatmap in [0, 1]) of the kept slots; of the most confident found slot when none is kept."""
    found = outputs.slot_mask[0].nonzero()[:, 0].tolist()
    confidences = outputs.pred_logits[0].sigmoid().tolist()
    slots = kept or sorted(found, key=lambda slot: confidences[slot])[-1:]
    scale = min(1.0, 512 / max(image.size))
    size = [max(1, round(side * scale)) for side in (image.height, image.width)]
    heatmaps = processor.post_process_masks(outputs.heatmaps, [size])[0].sigmoid().cpu().numpy()  # (K, *size)
    return [(slot, confidences[slot], heatmaps[slot]) for slot in slots]


def concept_heat(
    outputs: Any,
    model: SegCompassModel,
    slots: list[int],
) -> tuple[np.ndarray, np.ndarray] | None:
    """How strongly the slots' top concepts fire at each image patch, and the part of the image that each shows.

    Args:
        outputs: SegCompassOutput of `model.segment` for one image.
        model: the model.
        slots: the slots whose concepts are added up.

    Returns:
        None when no slot is shown or no concepts were used, or (float (P,), float (P, 4) boxes of `patch_boxes`).
    """
    if not slots or outputs.concept_weights is None:
        return None
    shows = has_area(outputs.patch_boxes[0])  # (P,)
    boxes = outputs.patch_boxes[0][shows].float().cpu().numpy()  # (patches, 4)
    if outputs.grounding is not None:  # what is shown is what the heatmap is the sum of
        heat = sum(outputs.grounding.on_patches(0, slot).sum(0) for slot in slots)[: len(boxes)]
        return heat.float().cpu().numpy(), boxes
    activations = outputs.concept_activations[0]  # (T, M)
    activations = activations[outputs.sequences[0, : len(activations)] == model.config.image_token_id]
    activations = activations[shows[: len(activations)]]  # (patches, M)
    heat = activations.new_zeros(len(activations))
    for slot in slots:
        heaviest = [concept.column for concept in heaviest_concepts(outputs, slot)]
        heat += activations[:, heaviest] @ outputs.concept_weights[0, slot, heaviest]
    return heat.float().cpu().numpy(), boxes


# -- explanation -------------------------------------------------------------------------------------------------------


def explain_slots(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    outputs: Any,
    slots: list[int],
    labels: Mapping[int, str] | None = None,
    image_embeddings: torch.Tensor | None = None,
) -> list[Explanation]:
    """The explanations of some slots.

    Args:
        model: the model.
        processor: its processor.
        outputs: SegCompassOutput of `model.segment` for one image.
        slots: which slots.
        labels: {feature index: label}.
        image_embeddings: float (1, d_k, h, w) that the masks were decoded with; of a grounded read-out the
            explanations then say what each mask loses without each concept. Others leave them aside.

    Returns:
        One per slot; none where the queries were built without concepts.
    """
    if outputs.concept_weights is None:
        return []
    keys = None if outputs.grounding is None else image_embeddings
    return [model.explain(outputs, slot, labels=labels, processor=processor, image_embeddings=keys) for slot in slots]


def concept_tiles(explanation: Explanation) -> list[ConceptTile]:
    """What the overlay shows of a slot's concepts: name, share, the phrase that called it, what the mask loses.

    Args:
        explanation: of the slot.

    Returns:
        One per concept, heaviest first.
    """
    tiles = []
    for concept in explanation.concepts:
        heat = np.array([hit.strength for hit in concept.patches], np.float32)
        boxes = np.array([hit.box for hit in concept.patches], np.float32).reshape(-1, 4)
        lines = [f"{concept.weight:.0%} of the slot"]
        if concept.tokens:
            lines.append(f"by “{concept.tokens[0].phrase or concept.tokens[0].text.strip()}”")
        if concept.lost is not None:
            lines.append(f"without it {'−' if concept.lost >= 0.005 else '±'}{concept.lost:.0%}")
        tiles.append(ConceptTile(concept.label or f"concept {concept.index}", tuple(lines), heat, boxes))
    return tiles


def write_explanation(
    folder: Path,
    model: SegCompassModel,
    processor: SegCompassProcessor,
    outputs: Any,
    image: Image.Image,
    instruction: str,
    explanations: list[Explanation],
) -> None:
    """Write explanation.html of the slots and explanation.png of the most confident of them.

    Args:
        folder: where to write.
        model: the model.
        processor: its processor.
        outputs: SegCompassOutput of `model.segment` for one image.
        image: the image.
        instruction: what was asked.
        explanations: of the slots; without any, a line says so and nothing is written.
    """
    if not explanations:
        print("nothing to explain: the response had no concentration tokens")
        return
    slots = [explanation.slot for explanation in explanations]
    if max(image.size) > LARGEST_EXPLAINED:
        image = image.copy()
        image.thumbnail((LARGEST_EXPLAINED, LARGEST_EXPLAINED))
    logits = processor.post_process_masks(outputs.pred_masks, [(image.height, image.width)])[0]  # (K, H, W)
    masks = (logits[slots] > 0).cpu().numpy()
    write_whole(folder / "explanation.html", render_html(explanations, image, masks, instruction))
    first = max(range(len(explanations)), key=lambda place: explanations[place].confidence)
    figure = explanations[first].to_figure(image, masks[first], legible(instruction))
    with warnings.catch_warnings():  # words of the response in other scripts; explanation.html has them all
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        write_whole(folder / "explanation.png", lambda part: figure.savefig(part, dpi=100))
    print(f"wrote explanation.html and explanation.png to {folder}")
