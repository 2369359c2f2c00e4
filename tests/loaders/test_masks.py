"""Masks against independent painting: by hand, pixel by pixel in exact fractions, and OpenCV where it is installed."""

import copy
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from segcompass.loaders.masks import STRIP, coco_rle, decode_mask, encode_mask, packed_polygons, paint_polygon
from tests.support.refer import ANNOTATIONS, CROWD, HEIGHT, WIDTH, box, rectangle, run_lengths


@pytest.mark.parametrize("name", [name for name, case in ANNOTATIONS.items() if case[2] is not None])
def test_coco_segmentations_by_hand(name):
    segmentation, _, mask = ANNOTATIONS[name]
    assert (decode_mask([coco_rle(segmentation, HEIGHT, WIDTH)], HEIGHT, WIDTH) == mask).all()


def test_slanted_polygons_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for _ in range(30):
        polygons = [generator.uniform(-3, 35, 2 * generator.integers(3, 7)).tolist() for _ in range(2)]
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        for polygon in polygons:
            mask |= coco_mask.decode(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))[..., 0].astype(bool)
        rle = coco_rle(polygons, HEIGHT, WIDTH)
        assert (decode_mask([rle] if rle else [], HEIGHT, WIDTH) == mask).all()
        assert (rle is None) == (not mask.any())


@pytest.mark.parametrize("rows", [1, STRIP - 1, STRIP, 2 * STRIP + 3])
def test_masks_of_more_rows_than_a_strip_are_encoded_whole(rows):
    mask = np.random.default_rng(rows).random((rows, 7)) < 0.5
    for given in (mask, mask.astype(np.uint8), np.asfortranarray(mask), mask[:, ::-1]):
        rle = encode_mask(given)
        assert rle["size"] == [rows, 7]
        assert (coco_mask.decode(rle) == given).all()


def test_every_form_of_run_lengths():
    compressed = encode_mask(CROWD)
    as_bytes = dict(compressed, counts=compressed["counts"].encode())
    halves = [run_lengths(CROWD & (np.arange(WIDTH) < 10)), run_lengths(CROWD & (np.arange(WIDTH) >= 10))]
    for form in (run_lengths(CROWD), compressed, as_bytes, halves):
        assert (decode_mask([coco_rle(form, HEIGHT, WIDTH)], HEIGHT, WIDTH) == CROWD).all()
    assert decode_mask([], 2, 3).shape == (2, 3)


@pytest.mark.parametrize(
    "segmentation",
    [
        *(case[0] for case in ANNOTATIONS.values()),
        [[1, 2, 9.5, 2, 9, 9], []],
        [["1", "2", "9", "2", "9", "9"]],
        [[1, 2, None, 2, 9, 9]],
        [[1, 2, 10**400, 2, 9, 9]],
        [[1, 2, float("nan"), 2, 9, 9]],
        [[[1, 2], [9, 2], [9, 9]]],
        [[True, 2, 9, 2, 9, 9]],
        [[1, 2, 9, 2, 9, 9], "text"],
        [],
        [{}],
        {},
        "",
        None,
    ],
    ids=str,
)
def test_packed_polygons_are_read_as_lists_are(segmentation):
    def found(given):
        try:
            return coco_rle(given, HEIGHT, WIDTH)
        except (ValueError, TypeError, OverflowError) as error:
            return type(error), str(error)

    packed = packed_polygons({"id": 1, "segmentation": copy.deepcopy(segmentation)})
    assert found(packed["segmentation"]) == found(segmentation) and packed["id"] == 1
    assert packed_polygons({"id": 1}) == {"id": 1}


def test_run_lengths_of_all_kinds_of_masks_are_found_whole():
    generator = np.random.default_rng(0)
    for _ in range(200):
        height, width = generator.integers(1, 300, 2).tolist()
        mask = np.zeros((height, width), dtype=bool)
        for _ in range(generator.integers(0, 5)):
            top, left = generator.integers(0, (height, width))
            mask[top : top + generator.integers(1, 60), left : left + generator.integers(1, 60)] ^= True
        mask ^= generator.random((height, width)) < generator.choice([0, 0.01, 0.5])
        rle = encode_mask(mask)
        assert (coco_rle(rle, height, width) or encode_mask(mask & False)) == rle


def test_what_has_no_pixel_is_none():
    for name in (16, 17):
        assert coco_rle(ANNOTATIONS[name][0], HEIGHT, WIDTH) is None
    assert coco_rle([], HEIGHT, WIDTH) is None
    assert coco_rle(run_lengths(box(0, 0, 0, 0)), HEIGHT, WIDTH) is None


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"size \[32, 24\], its image \[24, 32\]"):
        coco_rle(run_lengths(CROWD.T), HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="counts for 7 pixels, its image 768"):
        coco_rle({"size": [HEIGHT, WIDTH], "counts": [3, 4]}, HEIGHT, WIDTH)
    whole = encode_mask(CROWD)["counts"]
    for damaged in (whole[:-2], whole + "1", "~" + whole, "", "\n" + whole):
        with pytest.raises(ValueError, match="an RLE has counts for .* pixels, its image 768"):
            coco_rle({"size": [HEIGHT, WIDTH], "counts": damaged}, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="not finite"):
        coco_rle([[1, 2, 3, 4, 5, float("nan")]], HEIGHT, WIDTH)
    with pytest.raises(TypeError, match="list of flat polygons"):
        coco_rle("mask", HEIGHT, WIDTH)
    with pytest.raises(ValueError, match='needs "size" and "counts"'):
        coco_rle({"counts": []}, HEIGHT, WIDTH)


def exact_polygon(points, height, width):
    """Outline by rounding, halves towards the left start, and spans by exact crossings; pixel by pixel.

    Also the pixels half a pixel right of the end of a span: OpenCV, counting in fixed point, takes some of these.
    """
    mask = np.zeros((height, width), dtype=bool)
    halves = mask.copy()
    points = [(int(x), int(y)) for x, y in points]
    edges = list(zip(points, points[1:] + points[:1], strict=True))
    for start, end in edges:
        (x0, y0), (x1, y1) = sorted((start, end), key=lambda point: point[0])
        long = max(x1 - x0, abs(y1 - y0))
        for step in range(long + 1):
            x = x0 + round_half_down(Fraction((x1 - x0) * step, long)) if long else x0
            y = y0 + (1 if y1 > y0 else -1) * round_half_down(Fraction(abs(y1 - y0) * step, long)) if long else y0
            mask[y, x] = True
    for y in range(height):
        crossings = []
        for (x0, y0), (x1, y1) in edges:
            if min(y0, y1) <= y < max(y0, y1):
                crossings.append(x0 + Fraction((y - y0) * (x1 - x0), y1 - y0))
        crossings.sort()
        for left, right in zip(crossings[::2], crossings[1::2], strict=True):
            for x in range(width):
                if left <= x <= right:
                    mask[y, x] = True
                halves[y, x] |= x == right + Fraction(1, 2)
    return mask, halves


def round_half_down(value):
    return -floor(Fraction(1, 2) - value)


def test_painted_polygons_against_exact_arithmetic():
    generator = np.random.default_rng(1)
    for _ in range(60):
        height, width = generator.integers(3, 40, 2)
        points = generator.uniform(0, 1, (generator.integers(1, 9), 2)) * (width - 1, height - 1)
        mask, (exact, halves) = paint_polygon(points, height, width), exact_polygon(points, height, width)
        assert mask[exact].all() and not mask[~exact & ~halves].any()


def test_polygons_by_hand():
    assert (paint_polygon([[2, 1], [5, 1], [5, 3], [2, 3]], 6, 8) == box(2, 1, 6, 4, 6, 8)).all(), "outline included"
    assert (paint_polygon([[1.9, 1.9]], 4, 4) == box(1, 1, 2, 2, 4, 4)).all(), "a point is a dot, cut to whole numbers"
    assert (paint_polygon([[0, 0], [3, 3]], 4, 4) == np.eye(4, dtype=bool)).all()
    bow = paint_polygon([[0, 0], [6, 0], [0, 6], [6, 6]], 7, 7)
    assert bow[0].all() and bow[6].all() and bow[3].sum() == 1, "even-odd"
    square_in_square = [[0, 0], [8, 0], [8, 8], [0, 8], [0, 0], [2, 2], [2, 6], [6, 6], [6, 2], [2, 2]]
    assert not paint_polygon(square_in_square, 9, 9)[4, 4], "a hole"
    outside = paint_polygon([[-5, 2], [20, 2], [20, 4], [-5, 4]], 6, 8)
    assert (outside == box(0, 2, 8, 5, 6, 8)).all()
    assert not paint_polygon([[-5, -5], [-2, -5], [-2, -2]], 6, 8).any()
    for points in ([], [[1, 2, 3]], [[np.nan, 1]]):
        with pytest.raises(ValueError, match="list of finite points"):
            paint_polygon(points, 4, 4)


def test_painted_polygons_are_those_of_opencv_4():
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    if not cv2.__version__.startswith("4."):
        pytest.skip("OpenCV 5 rounds halves differently")
    generator = np.random.default_rng(0)
    for _ in range(500):
        height, width = generator.integers(5, 120, 2)
        points = generator.uniform(0, 1, (generator.integers(1, 12), 2)) * (width - 1, height - 1)
        canvas = np.zeros((height, width), dtype=np.uint8)
        cv2.polylines(canvas, np.array([points], dtype=np.int32), True, 1, 1)
        cv2.fillPoly(canvas, np.array([points], dtype=np.int32), 1)
        assert (paint_polygon(points, height, width) == canvas.astype(bool)).all()


def test_rectangle_of_coco_is_without_its_right_and_lower_edge():
    mask = decode_mask([coco_rle([rectangle(2, 3, 10, 9)], HEIGHT, WIDTH)], HEIGHT, WIDTH)
    assert (mask == box(2, 3, 10, 9)).all() and mask.sum() == 8 * 6
