"""Segment what an instruction means in an image, and show the whole way there.

    python examples/segment.py
    python examples/segment.py photo.jpg "the mug nearest the sink" --model PATH --output runs/mug --explain

Prints the reasoning and the instances, and writes into the output folder
    overlay.png   image, concept activations, heatmaps and masks side by side
    masks.png     label image: 0 background, k + 1 = instance k
    result.json   instruction, text, no_target, instances, concepts
and with --explain
    explanation.html   each shown slot: its concepts by weight, the words and patches they fired on, heatmap and mask
    explanation.png    the same of the surest slot as a figure
Concepts go by their labels where the model's folder holds a concepts.json (see concept_dictionary.py).
`no_target` says that the model looked and found nothing it is sure of. A response without concentration tokens is no
such answer: then `no_target` is false and `instances` is empty. Without arguments the scene beside this file is taken.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from figure import draw_overlay, label_image
from pycocotools import mask as coco_mask
from transformers.image_utils import load_image

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.concept_dictionary import ConceptDictionary
from segcompass.modeling_segcompass.explanation import render_html

HERE = Path(__file__).parent
NO_TOKENS = "no mask: the response had no concentration tokens"
TOP_CONCEPTS = 8


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="file or URL (default: the scene beside this file)")
    parser.add_argument("instruction", nargs="?", help="what to segment; needed with an image of your own")
    parser.add_argument("--model", default=str(HERE / "checkpoints" / "mini"), help="SegCompass folder or Hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/segment"))
    parser.add_argument("--threshold", type=float, default=0.5, help="confidence from which a slot is kept")
    parser.add_argument("--explain", action="store_true", help="also say which concepts made the masks")
    args = parser.parse_args(argv)
    if args.image is None:
        scene = json.loads((HERE / "scene.json").read_text())
        args.image, args.instruction = str(HERE / scene["image"]), scene["instruction"]
    if args.instruction is None:
        parser.error(f'no instruction; say what to segment in {args.image}, e.g. "the mug nearest the sink".')
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is {args.threshold}; it is a probability, choose a value from 0 to 1.")
    return args


def read_image(path):
    try:
        return load_image(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise SystemExit(f"the image {path!r} cannot be read ({error}); give a picture file or a URL.") from error


def load(path):
    """The model, on the GPU when there is one, and its processor. Raises SystemExit when they cannot be loaded."""
    try:
        processor = SegCompassProcessor.from_pretrained(path)
        model = SegCompassModel.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {path!r} is no folder or Hub id of a SegCompass model: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def main(argv=None):
    args = parse(argv)
    image = read_image(args.image)
    model, processor = load(args.model)
    try:
        inputs = processor(images=image, text=args.instruction).to(model.device)
    except ValueError as error:  # an empty or too long instruction
        raise SystemExit(str(error)) from error
    outputs = model.segment(**inputs)

    sizes = inputs["original_sizes"]
    instances = processor.post_process_instance_segmentation(outputs, args.threshold, target_sizes=sizes)[0]
    result = describe(args.instruction, outputs, processor, instances)
    reasoning = reasoning_of(result["text"])
    verdict = verdict_of(result, outputs)
    report(result, reasoning, verdict)

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    masks = instances["masks"].cpu().numpy()
    slots, scores = instances["slots"].tolist(), instances["scores"].tolist()
    label_image(masks, scores, slots).save(args.output / "masks.png")
    heatmaps = slot_heatmaps(outputs, processor, image, slots)
    shown = [slot for slot, _, _ in heatmaps]
    concepts = concept_heat(outputs, model, processor, inputs, image, shown)
    figure = draw_overlay(np.asarray(image), result, reasoning, verdict, masks, heatmaps, concepts)
    figure.savefig(args.output / "overlay.png")
    print(f"wrote overlay.png, masks.png and result.json to {args.output}")
    if args.explain:
        explain(args, model, processor, outputs, image, shown)


# -- what is told ------------------------------------------------------------------------------------------------------


def describe(instruction, outputs, processor, instances):
    """The content of result.json."""
    text = processor.decode(outputs.sequences[0, outputs.prompt_length :], skip_special_tokens=True)
    slots = instances["slots"].tolist()
    return {
        "instruction": instruction,
        "text": text,
        "no_target": bool(outputs.slot_mask[0].any()) and not slots,
        "instances": [
            {"slot": slot, "score": score, "box": box, "segmentation": encode(mask)}
            for slot, score, box, mask in zip(
                slots,
                instances["scores"].tolist(),
                instances["boxes"].int().tolist(),
                instances["masks"].cpu().numpy(),
                strict=True,
            )
        ],
        "concepts": [
            {
                "slot": slot,
                "index": outputs.concept_indices[0, column].item(),
                "weight": outputs.concept_weights[0, slot, column].item(),
                "value": outputs.concept_values[0, column].item(),
            }
            for slot in slots
            for column in top_concepts(outputs, slot)
        ],
    }


def encode(mask):
    """bool (H, W) -> COCO compressed RLE with str counts."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def top_concepts(outputs, slot):
    """Columns of the concepts that weigh most in a slot, heaviest first; [] when the queries used no concepts."""
    if outputs.concept_weights is None:
        return []
    weights = outputs.concept_weights[0, slot]
    order = weights.topk(min(TOP_CONCEPTS, len(weights))).indices
    return order[weights[order] > 0].tolist()


def reasoning_of(text):
    """What stands in the think tags, or the whole text when they are missing."""
    thought = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return (thought[1] if thought else text).strip()


def verdict_of(result, outputs):
    if not outputs.slot_mask[0].any():
        return NO_TOKENS
    count = len(result["instances"])
    return "no target" if result["no_target"] else f"{count} instance" + "s" * (count > 1)


def report(result, reasoning, verdict):
    print(f"instruction  {result['instruction']}\nreasoning    {reasoning}\nresult       {verdict}")
    for instance in result["instances"]:
        box = ", ".join(map(str, instance["box"]))
        print(f"             slot {instance['slot']}  score {instance['score']:.3f}  box ({box})")


def explain(args, model, processor, outputs, image, slots):
    """Write explanation.html of the slots and explanation.png of the surest of them."""
    if not slots:
        print("nothing to explain: the response had no concentration tokens")
        return
    dictionary = ConceptDictionary.from_pretrained(args.model)
    labels = dictionary.labels if dictionary else None
    told = [model.explain(outputs, slot=slot, labels=labels, processor=processor) for slot in slots]
    logits = processor.post_process_masks(outputs.pred_masks, [(image.height, image.width)])[0]
    masks = (logits[slots] > 0).cpu().numpy()
    extent = patch_extent(processor.image_processor, image)
    page = render_html(told, image, masks, extent, args.instruction)
    (args.output / "explanation.html").write_text(page, encoding="utf-8")
    surest = max(range(len(told)), key=lambda place: told[place].confidence)
    figure = told[surest].to_figure(image, masks[surest], args.instruction, extent)
    figure.savefig(args.output / "explanation.png", dpi=100)
    print(f"wrote explanation.html and explanation.png to {args.output}")


# -- what is drawn -----------------------------------------------------------------------------------------------------


def slot_heatmaps(outputs, processor, image, kept):
    """(slot, confidence, heatmap) of the kept slots; of the surest found slot when none is kept."""
    found = outputs.slot_mask[0].nonzero()[:, 0].tolist()
    confidences = outputs.pred_logits[0].sigmoid().tolist()
    slots = kept or sorted(found, key=lambda slot: confidences[slot])[-1:]
    scale = min(1.0, 512 / max(image.size))
    size = [max(1, round(side * scale)) for side in (image.height, image.width)]
    heatmaps = processor.post_process_masks(outputs.heatmaps, [size])[0].sigmoid().cpu().numpy()
    return [(slot, confidences[slot], heatmaps[slot]) for slot in slots]


def concept_heat(outputs, model, processor, inputs, image, slots):
    """How strongly the slots' top concepts fire at each image patch, and the part of the image the patches cover.

    Returns:
        None when no slot is shown or no concepts were used, or (float (rows, columns), (left, top, right, bottom)).
    """
    if not slots or outputs.concept_weights is None:
        return None
    activations = outputs.concept_activations[0]  # (T, M)
    activations = activations[outputs.sequences[0, : len(activations)] == model.config.image_token_id]
    heat = activations.new_zeros(len(activations))
    for slot in slots:
        columns = top_concepts(outputs, slot)
        heat += activations[:, columns] @ outputs.concept_weights[0, slot, columns]
    if "image_grid_thw" in inputs:  # Qwen2.5-VL: patches in the image's own aspect
        merge = model.config.mllm_config.vision_config.spatial_merge_size
        _, rows, columns = (inputs["image_grid_thw"][0] // torch.tensor([1, merge, merge], device=heat.device)).tolist()
    else:
        rows = columns = round(len(heat) ** 0.5)
    return heat.view(rows, columns).cpu().numpy(), patch_extent(processor.image_processor, image)


def patch_extent(image_processor, image):
    """(left, top, right, bottom) of the part of the image that the MLLM sees, in pixels: LLaVA-1.5 crops the centre."""
    width, height = image.size
    if not getattr(image_processor, "do_center_crop", False):
        return 0, 0, width, height
    scale = image_processor.size["shortest_edge"] / min(width, height)
    half_width = image_processor.crop_size["width"] / scale / 2
    half_height = image_processor.crop_size["height"] / scale / 2
    return width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height


if __name__ == "__main__":
    main()
