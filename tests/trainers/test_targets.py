"""Soft mask targets on SAM's padded frame."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.trainers.targets import mask_targets


def encode(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def blobs(height, width, count, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    centres = rng.uniform(0, (height, width), (count, 2))
    radii = rng.uniform(0.1, 0.4, count) * min(height, width)
    return [(rows - y) ** 2 + (columns - x) ** 2 < r**2 for (y, x), r in zip(centres, radii, strict=True)]


def coverage_by_subdivision(mask, image_size, grid_size, fine=8):
    """Independent: sample every cell at fine x fine interior points, nearest source pixel, 0 in the padding."""
    height, width = mask.shape
    frame_height, frame_width = Frame(image_size).reshaped_size(height, width)
    points = (np.arange(grid_size * fine) + 0.5) * image_size / (grid_size * fine)
    rows, columns = points * height / frame_height, points * width / frame_width
    sampled = np.zeros((points.size, points.size))
    inside = np.ix_(rows < height, columns < width)
    sampled[inside] = mask[np.ix_(rows[rows < height].astype(int), columns[columns < width].astype(int))]
    return sampled.reshape(grid_size, fine, grid_size, fine).mean((1, 3))


SHAPES = [(128, 128), (96, 128), (131, 57), (20, 24), (300, 451)]


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_conserved_and_padding_is_zero(shape, stretched):
    frame = Frame(128, stretched)
    image_size, grid_size = frame.side, 32
    masks = blobs(*shape, 3)
    targets = mask_targets([encode(m) for m in masks], *shape, frame, grid_size)
    assert targets.shape == (3, grid_size, grid_size) and targets.dtype == torch.float32
    assert targets.min() >= 0 and targets.max() <= 1
    frame_height, frame_width = frame.reshaped_size(*shape)
    for target, mask in zip(targets.double(), masks, strict=True):
        area = target.sum().item() * (image_size / grid_size) ** 2
        expected = mask.sum() * (frame_height / shape[0]) * (frame_width / shape[1])
        assert area == pytest.approx(expected, rel=1e-6)
    valid_rows, valid_columns = (-(-side * grid_size // image_size) for side in (frame_height, frame_width))
    assert targets[:, valid_rows:].sum() == 0 and targets[:, :, valid_columns:].sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_equals_an_independent_subdivision(shape):
    image_size, grid_size, fine = 128, 32, 16
    mask = blobs(*shape, 1, seed=3)[0]
    target = mask_targets([encode(mask)], *shape, Frame(image_size), grid_size)[0].numpy()
    # a sample point stands for 1/fine of a cell, so one edge of the mask displaces at most 1/(2 fine) of each axis
    error = np.abs(target - coverage_by_subdivision(mask, image_size, grid_size, fine))
    assert error.max() < 3 / fine and error.mean() < 0.1 / fine


def test_a_full_mask_covers_exactly_the_valid_region():
    targets = mask_targets([encode(np.ones((64, 128)))], 64, 128, Frame(128), grid_size=32)
    assert torch.equal(targets[0, :16], torch.ones(16, 32)) and targets[0, 16:].sum() == 0


def test_no_target_gives_no_rows():
    assert mask_targets([], 40, 60, Frame(64), grid_size=16).shape == (0, 16, 16)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"mask 1 is \[10, 12\].*\[12, 10\]"):
        mask_targets([encode(np.ones((12, 10))), encode(np.ones((10, 12)))], 12, 10, Frame(64), grid_size=16)


def test_valid_extent_counts_every_cell_the_image_touches():
    sizes = torch.tensor([[128, 65], [1, 128], [96, 64]])
    assert Frame(128).valid_extent(sizes, grid_size=32).tolist() == [[32, 17], [1, 32], [24, 16]]
