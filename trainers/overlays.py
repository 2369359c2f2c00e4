"""Pictures of what a rollout segmented, for the completions table. Knows nothing about training."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from segcompass.modeling_segcompass import SegCompassProcessor
from segcompass.modeling_segcompass.palette import slot_colour


@torch.no_grad()
def draw_overlays(
    images: list[Image.Image], outputs: Any, processor: SegCompassProcessor, limit: int = 4
) -> list[Image.Image]:
    """The first images with their confident slots' masks painted over, half transparent, one colour per slot.

    Args:
        images: at least one per sample of `outputs`.
        outputs: SegCompassOutput of a forward pass.
        processor: the model's.
        limit: how many at most.

    Returns:
        list of RGB images of the same sizes.
    """
    count = min(limit, len(outputs.pred_masks), len(images))
    shown = type(outputs)(
        pred_masks=outputs.pred_masks[:count],
        pred_logits=outputs.pred_logits[:count],
        slot_mask=outputs.slot_mask[:count],
    )
    sizes = [(image.height, image.width) for image in images[:count]]
    overlays = []
    instances = processor.post_process_instance_segmentation(shown, target_sizes=sizes)
    for image, found in zip(images, instances, strict=False):
        pixels = np.array(image.convert("RGB"))
        for slot, mask in zip(found["slots"].tolist(), found["masks"].cpu().numpy(), strict=True):
            pixels[mask] = pixels[mask] // 2 + np.array(slot_colour(slot), np.uint8) // 2
        overlays.append(Image.fromarray(pixels))
    return overlays
