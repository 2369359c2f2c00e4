"""Ground-truth masks as the model sees them: soft coverage of a square grid laid over the image encoder's frame.

Knows nothing about models or trainers; rows carry masks as COCO RLE, and a collator or a rollout turns them into
targets here. No mask is ever resampled twice: coverage is computed from the original pixels.
"""

import numpy as np
import torch
from pycocotools import mask as coco_mask

from segcompass.loaders.reasoning_segmentation.run_lengths import checked_rle
from segcompass.modeling_segcompass.image_encoder import Frame


def mask_targets(masks: list[dict], height: int, width: int, frame: Frame, grid_size: int) -> torch.Tensor:
    """Coverage of each cell of the image encoder's square frame by each mask.

    A cell's value is the exact fraction of it the mask covers, so area is conserved (as the frame scales it) and the
    padding is 0.

    Args:
        masks: G compressed RLE dicts `{"size": [height, width], "counts": str or bytes}`, one per instance.
        height: of the image (and of every mask) in pixels.
        width: of the image (and of every mask) in pixels.
        frame: where the image lies in the encoder's input.
        grid_size: side s of the grid, `4 * config.key_grid` for the model's `pred_masks`.

    Returns:
        (G, s, s) float32 in [0, 1]; (0, s, s) when there is no target.

    Raises:
        ValueError: a mask's size is not `[height, width]`, or its counts are damaged.
    """
    targets = torch.zeros(len(masks), grid_size, grid_size)
    frame_height, frame_width = frame.reshaped_size(height, width)
    cell = frame.side / grid_size
    cell_height, cell_width = cell * height / frame_height, cell * width / frame_width  # in source pixels
    for index, mask in enumerate(masks):
        if list(mask["size"]) != [height, width]:
            raise ValueError(
                f"mask {index} is {list(mask['size'])}, but its image is [{height}, {width}]; "
                "store masks at the image's own size (height, width)."
            )
        pixels = coco_mask.decode(checked_rle(mask)).T  # (W, H), contiguous: RLE runs down the columns
        covered = _cell_sums(_cell_sums(pixels, cell_height, grid_size).T, cell_width, grid_size)  # (s, s)
        targets[index] = torch.from_numpy(covered / (cell_height * cell_width))
    return targets.clamp_(0.0, 1.0)


def patch_coverage(
    masks: list[dict],
    height: int,
    width: int,
    boxes: torch.Tensor,
) -> torch.Tensor:
    """Coverage by each mask of each patch that the MLLM sees.

    Args:
        masks: G compressed RLE dicts, one per instance.
        height: of the image (and of every mask) in pixels.
        width: of the image (and of every mask) in pixels.
        boxes: float (P, 4), the part of the image that each patch shows (the processor's `patch_boxes`), in fractions
            of its width and height; it may reach beyond the image, where nothing is.

    Returns:
        (G, P) float32 in [0, 1]; 0 for a box without area.

    Raises:
        ValueError: a mask's size is not `[height, width]`.
    """
    coverage = torch.zeros(len(masks), len(boxes))
    edges = boxes.double().cpu().numpy() * [width, height, width, height]  # (P, 4) in pixels
    areas = np.maximum((edges[:, 2:] - edges[:, :2]).prod(1), 1e-9)  # (P,)
    for index, mask in enumerate(masks):
        if list(mask["size"]) != [height, width]:
            raise ValueError(f"mask {index} is {list(mask['size'])}, but its image is [{height}, {width}].")
        running = np.zeros((height + 1, width + 1))  # pixels of the mask above and left of each corner
        running[1:, 1:] = coco_mask.decode(mask).cumsum(0, dtype=np.float64).cumsum(1)
        corners = [_between(running, edges[:, row], edges[:, column]) for row in (1, 3) for column in (0, 2)]
        coverage[index] = torch.from_numpy((corners[3] - corners[2] - corners[1] + corners[0]) / areas)
    return coverage.clamp_(0.0, 1.0)


def _between(running: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Sums up to places between the corners: (H + 1, W + 1) and two (P,) -> (P,). Beyond the edge nothing is added."""
    down, across = down.clip(0, len(running) - 1), across.clip(0, running.shape[1] - 1)
    row, column = np.minimum(down.astype(int), len(running) - 2), np.minimum(across.astype(int), running.shape[1] - 2)
    down, across = down - row, across - column
    upper = running[row, column] * (1 - across) + running[row, column + 1] * across
    lower = running[row + 1, column] * (1 - across) + running[row + 1, column + 1] * across
    return upper * (1 - down) + lower * down


def _cell_sums(values: np.ndarray, cell: float, grid_size: int) -> np.ndarray:
    """Integrate the rows of (N, length) unit-wide steps over cells of width `cell`: (N, grid_size).

    It is 0 where there are no steps.
    """
    length = values.shape[1]
    edges = np.clip(np.arange(grid_size + 1) * cell, 0, length)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    steps = values[:, whole]
    running = np.cumsum(values, axis=1, dtype=np.int32 if values.dtype == np.uint8 else np.float64)
    return np.diff(running[:, whole] - steps + (edges - whole) * steps, axis=1)
