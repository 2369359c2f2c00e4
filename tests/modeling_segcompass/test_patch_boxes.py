"""Which part of an image a token shows: image processors of transformers, asked by their own pixels."""

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.modeling_segcompass.patch_boxes import (
    Views,
    boxes_of_tokens,
    grid_boxes,
    grid_shape,
    has_area,
    pad_boxes,
    paint_boxes,
)

SQUARE = {"height": 224, "width": 224}
SIZES = [(56, 40), (40, 120), (333, 214), (60, 60)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("processor", "seen"),
    [
        (CLIPImageProcessorPil(size=SQUARE, do_center_crop=False), "whole"),
        (CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=SQUARE), "crop"),
        (LlavaImageProcessorPil(size={"shortest_edge": 224}, crop_size=SQUARE, do_pad=True), "pad"),
        (SamImageProcessorPil(size={"longest_edge": 224}, pad_size=SQUARE), "corner"),
    ],
    ids=["whole", "crop", "pad", "corner"],
)
def test_a_view_is_what_the_image_processor_shows(processor, seen, size):
    width, height = size
    long, short = max(size), min(size)
    expected = {
        "whole": (0, 0, 1, 1),
        "crop": ((1 - short / width) / 2, (1 - short / height) / 2, (1 + short / width) / 2, (1 + short / height) / 2),
        "pad": ((1 - long / width) / 2, (1 - long / height) / 2, (1 + long / width) / 2, (1 + long / height) / 2),
        "corner": (0, 0, 224 / round(224 * width / long), 224 / round(224 * height / long)),
    }[seen]
    (view,) = Views(processor).of(width, height)
    assert view.box == pytest.approx(expected, abs=1e-9), "exact, though it was measured in 256 steps"


def test_what_whole_pixels_make_of_a_narrow_image_is_told():
    """12 x 120 pixels in a frame of 32: 3.2 columns are rounded to 3, so that the frame is 32/3 images wide."""
    (view,) = Views(SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})).of(12, 120)
    assert view.box == pytest.approx((0, 0, 32 / 3, 1), abs=1e-9)


def test_tiles_are_found_in_their_order():
    """96 x 32 pixels are cut into three tiles of a third each, and then seen whole."""
    views = Views(GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=6)).of(96, 32)
    assert [view.box for view in views] == [
        pytest.approx((0, 0, 1 / 3, 1), abs=0.01),
        pytest.approx((1 / 3, 0, 2 / 3, 1), abs=0.01),
        pytest.approx((2 / 3, 0, 1, 1), abs=0.01),
        (0, 0, 1, 1),
    ]


def test_options_of_the_call_change_the_view():
    views = Views(CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=SQUARE))
    assert views.of(56, 28)[0].box != views.of(56, 28, {"size": SQUARE, "do_center_crop": False})[0].box


def test_what_makes_no_pictures_is_refused():
    def flat(images, return_tensors):
        return {"pixel_values": torch.zeros(4, 12)}

    with pytest.raises(ValueError, match=r"shape \(4, 12\), in which pictures .* cannot be told"):
        Views(flat).of(8, 8)


def test_tokens_get_their_boxes_in_order_and_others_none():
    boxes = pad_boxes([grid_boxes(1, 2), grid_boxes(1, 1)])
    is_image = torch.tensor([[False, True, True], [True, False, False]])
    found = boxes_of_tokens(boxes, is_image)
    assert found[0, 1:].tolist() == [[0, 0, 0.5, 1], [0.5, 0, 1, 1]] and found[1, 0].tolist() == [0, 0, 1, 1]
    assert torch.equal(has_area(found), is_image)
    with pytest.raises(ValueError, match="3 image tokens but patch_boxes has 2"):
        boxes_of_tokens(boxes, torch.ones(2, 3, dtype=torch.bool))


def test_a_grid_is_told_from_tiles():
    assert grid_shape(grid_boxes(3, 5, (0.1, 0, 0.9, 1))) == (3, 5)
    with pytest.raises(ValueError, match="8 patches are no single grid"):
        grid_shape(torch.cat([grid_boxes(2, 2, (0, 0, 0.5, 1)), grid_boxes(2, 2, (0.5, 0, 1, 1))]))


def test_patches_are_painted_where_they_are_and_the_strongest_shows():
    boxes = np.array([[0, 0, 1, 1], [0.5, 0, 1, 0.5], [0, 0, 0, 0], [0.75, 0.75, 2, 2]])
    painted = paint_boxes(np.array([1.0, 3.0, 9.0, 2.0]), boxes, 4, 4)
    assert painted.tolist() == [[1, 1, 3, 3], [1, 1, 3, 3], [1, 1, 1, 1], [1, 1, 1, 2]]
