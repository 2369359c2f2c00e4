"""Masks as run lengths and polygons: both give back the same pixels, by pycocotools and by counting crossed edges."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage

from segcompass.modeling_segcompass.mask_outlines import outlines, run_lengths


def masks():
    """Noise of every density, blobs, and what is easily forgotten."""
    random = np.random.default_rng(0)
    for number in range(60):
        height, width = random.integers(1, 40, 2)
        noise = random.normal(size=(height, width))
        yield (
            (ndimage.gaussian_filter(noise, 2) > 0) if number % 3 == 0 else random.random((height, width)) < number / 60
        )
    for rows in ("1", "0", "01/10", "10/01", "111/101/111", "11111/10001/10101/10001/11111", "101/010/101"):
        yield np.array([[cell == "1" for cell in row] for row in rows.split("/")])
    ring = np.ones((9, 9), bool)
    ring[2:7, 2:7] = False
    ring[4, 4] = True
    yield ring


def crossed(rings, shape):
    """bool (H, W): pixels with an odd number of vertical edges on their left."""
    inside = np.zeros(shape, bool)
    for ring in rings:
        for (x, y), (next_x, next_y) in zip(ring, [*ring[1:], ring[0]], strict=True):
            assert (x == next_x) != (y == next_y), "edges follow the pixels'"
            if x == next_x:
                inside[min(y, next_y) : max(y, next_y), x:] ^= True
    return inside


def test_run_lengths_are_those_of_pycocotools():
    for mask in masks():
        ours = run_lengths(mask)
        theirs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert ours == {"size": list(mask.shape), "counts": theirs["counts"].decode()}


def test_polygons_hold_the_pixels_of_one_connected_part_each():
    for mask in masks():
        polygons = outlines(mask)
        parts, count = ndimage.label(mask)
        assert len(polygons) == count
        seen = np.zeros(mask.shape, int)
        for outer, *holes in polygons:
            inside = crossed([outer, *holes], mask.shape)
            (part,) = np.unique(parts[inside])
            assert part > 0 and (inside == (parts == part)).all()
            seen += inside
            assert all((crossed([outer], mask.shape) >= crossed([hole], mask.shape)).all() for hole in holes)
        assert (seen == mask).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 70_000), (300, 300)])
def test_full_and_empty_masks(shape):
    assert outlines(np.zeros(shape, bool)) == []
    (((*corners,),),) = outlines(np.ones(shape, bool))
    assert corners == [[0, 0], [shape[1], 0], [shape[1], shape[0]], [0, shape[0]]]
    for mask in (np.zeros(shape, bool), np.ones(shape, bool)):
        assert coco_mask.area(run_lengths(mask)) == mask.sum()
