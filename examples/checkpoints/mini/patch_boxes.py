"""Which part of the image each image token shows: boxes, told by the pixels that the MLLM is given.

Image processors stretch, crop, pad and cut an image into tiles, each in its own way. `Views` asks the processor itself:
it hands it a picture whose colours are its own coordinates, and reads off the pixels where they came from. A family's
`Backbone.image_boxes` says which pixels an image token stands for. It knows nothing about models, words or masks.

A box is (left, top, right, bottom) in fractions of the image's width and height. It may reach beyond the image, where
an image was padded. A box without area belongs to an image token that shows no patch, such as the end of a row.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

Box = tuple[float, float, float, float]


class View(NamedTuple):
    """One picture that the MLLM is given of an image."""

    box: Box
    """the part of the image that it shows."""
    height: int
    """in pixels."""
    width: int
    """in pixels."""


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

REMEMBERED = 4096
"""Sizes of images whose views are kept."""

NEAR = 0.01
"""How far a measured edge may lie from a known one to be that one: colours have 256 steps."""

MIDDLE = 0.2
"""Share of a view left out at each end where its scale is measured: resizing bends a ramp near its ends."""

COARSE, NOISE = 2.0**12, 2.0**-22
"""Of `snapped`."""

SHARP = 0.02
"""How much of a pixel's range may be lost beside padding that was made after the image was resized, and so ends between
two pixels."""


def grid_boxes(rows: int, columns: int, area: Box = WHOLE) -> torch.Tensor:
    """An area cut evenly into patches.

    Args:
        rows: of patches.
        columns: of patches.
        area: what is cut.

    Returns:
        float (rows · columns, 4), row by row.
    """
    left, top, right, bottom = area
    x = left + (right - left) * torch.arange(columns + 1, dtype=torch.float64) / columns
    y = top + (bottom - top) * torch.arange(rows + 1, dtype=torch.float64) / rows
    boxes = torch.empty(rows, columns, 4, dtype=torch.float64)
    boxes[..., 0], boxes[..., 2] = x[:-1], x[1:]
    boxes[..., 1], boxes[..., 3] = y[:-1, None], y[1:, None]
    return boxes.flatten(0, 1).float()


def grid_shape(boxes: torch.Tensor) -> tuple[int, int]:
    """How patches lie that cut one area evenly.

    Args:
        boxes: float (P, 4), row by row.

    Returns:
        tuple: (rows, columns).

    Raises:
        ValueError: they do not: there are tiles, or tokens between the rows.
    """
    shown = boxes[has_area(boxes)]
    columns = len(shown) if not len(shown) else int((shown[:, 1] == shown[0, 1]).sum())
    if columns and len(shown) % columns == 0:
        area = tuple(shown[0, :2].tolist()) + tuple(shown[-1, 2:].tolist())
        if torch.allclose(shown.cpu(), grid_boxes(len(shown) // columns, columns, area), atol=1e-4):  # type: ignore[arg-type]
            return len(shown) // columns, columns
    raise ValueError(
        f"these {len(shown)} patches are no single grid (their MLLM sees an image in tiles); read their boxes one by "
        "one, or choose an MLLM that sees an image whole."
    )


def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """Which boxes show something: (..., 4) -> bool (...)."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def pad_boxes(boxes: list[torch.Tensor]) -> torch.Tensor:
    """The boxes of several images as one tensor: B times (P_i, 4) -> float (B, max P, 4), no patch at the end."""
    return torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)


def boxes_of_tokens(patch_boxes: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """Each token's box.

    Args:
        patch_boxes: float (B, P, 4), of the image tokens in order.
        is_image: bool (B, T), the image tokens.

    Returns:
        float (B, T, 4), zeros at other tokens.

    Raises:
        ValueError: a sample has more image tokens than boxes.
    """
    count = int(is_image.sum(1).amax()) if is_image.numel() else 0
    if count > patch_boxes.shape[1]:
        raise ValueError(
            f"a sample has {count} image tokens but patch_boxes has {patch_boxes.shape[1]}; pass the patch_boxes that "
            "the processor made with these input_ids."
        )
    if not count:
        return patch_boxes.new_zeros(*is_image.shape, 4)
    order = (is_image.cumsum(1) - 1).clamp_min(0)  # (B, T)
    found = patch_boxes.gather(1, order[..., None].expand(-1, -1, 4).clamp_max(patch_boxes.shape[1] - 1))
    return found * is_image[..., None]


def snapped(values: torch.Tensor) -> torch.Tensor:
    """Values that lie within float32's noise of a multiple of 1/4096, made that multiple; the others as they are.

    A fraction of a padded image's width times that width is then the round number that it was made of.
    """
    near = (values * COARSE).round() / COARSE
    return torch.where((values - near).abs() < NOISE, near, values)


def paint_boxes(values: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values of patches over a picture of the image; of patches that overlap, the largest counts.

    Args:
        values: float (P,), at least 0.
        boxes: float (P, 4).
        height: of the picture in pixels.
        width: of the picture in pixels.

    Returns:
        float32 (height, width), 0 where no patch is.
    """
    painted = np.zeros((height, width), np.float32)
    edges = np.rint(boxes * [width, height, width, height]).astype(int).clip(0, [width, height, width, height])
    for value, (left, top, right, bottom) in zip(values, edges, strict=True):
        part = painted[top:bottom, left:right]
        np.maximum(part, value, out=part)
    return painted


class Views:
    """Where the pixels that an image processor makes come from.

    Args:
        image_processor: the MLLM's, in its PIL form.

    Example:
        views = Views(processor.image_processor)
        views.of(640, 480)[0].box    # (0.125, 0.0, 0.875, 1.0): the square in the middle
        processor.patch_boxes([image])[0, :3]
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self._known: OrderedDict[tuple[int, int, str], list[View]] = OrderedDict()

    def of(self, width: int, height: int, options: Mapping[str, Any] | None = None) -> list[View]:
        """The pictures that the MLLM is given of an image of this size.

        Args:
            width: in pixels.
            height: in pixels.
            options: keywords of the image processor's call.

        Returns:
            list: in the order in which it is given them, without those that are padding alone.

        Raises:
            ValueError: the image processor makes no pictures.
        """
        options = dict(options or {})
        size = (width, height, repr((sorted(options.items()), vars(self.image_processor))))
        if size not in self._known:
            self._known[size] = self._measure(width, height, options)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return self._known[size]

    def _measure(self, width, height, options):
        x = np.rint(255 * (np.arange(width) + 0.5) / width).astype(np.uint8)
        y = np.rint(255 * (np.arange(height) + 0.5) / height).astype(np.uint8)
        ruler = np.zeros((height, width, 3), np.uint8)
        ruler[..., 0], ruler[..., 1] = x, y[:, None]
        low, high, marked = (self._pictures(pixels, options) for pixels in (0 * ruler, 0 * ruler + 255, ruler))
        span = (high - low)[:, :2]  # (N, 2, h, w), 0 where the image is not
        extent = np.abs(span).max((0, 2, 3), keepdims=True)
        present = np.abs(span / np.where(extent, extent, 1)).min(1)  # (N, h, w), between 0 and 1 at the edge of padding
        inside = present > 0.5
        share = (marked - low)[:, :2] / np.where(inside[:, None], span, 1)  # (N, 2, h, w)
        views = []
        for place in inside.any((1, 2)).nonzero()[0]:
            pixels = inside[place]
            sharp = not ((present[place] > SHARP) & (present[place] < 1 - SHARP)).any()
            views.append(View(_known_view(_view(share[place], pixels), pixels, sharp, width, height), *pixels.shape))
        return views

    def _pictures(self, pixels, options):
        """float64 (N, 3, h, w)."""
        from PIL import Image

        made = self.image_processor([[Image.fromarray(pixels)]], return_tensors="pt", **options)["pixel_values"]
        if isinstance(made, (list, tuple)):
            made = torch.stack([torch.as_tensor(each) for each in made])
        if made.dim() < 4 or made.shape[-3] != 3:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes pixel_values of shape {tuple(made.shape)}, in which "
                "pictures (..., 3, height, width) cannot be told; its MLLM cannot be used."
            )
        return made.flatten(0, -4).double().numpy()


def _view(share, inside):
    """The part of the image that one picture shows: from (2, h, w) coordinates, bool (h, w) where they count."""
    edges = []
    for axis in (0, 1):  # x along columns, y along rows
        weight = inside.sum(axis)  # (w,) or (h,)
        places = weight.nonzero()[0]
        means = (share[axis] * inside).sum(axis)[places] / weight[places]
        start, scale = _line(places + 0.5, means)
        edges.append((start, start + scale * inside.shape[1 - axis]))
    (left, right), (top, bottom) = edges
    return float(left), float(top), float(right), float(bottom)


def _line(places, values):
    """Offset and slope of values along places, measured at the middle ones."""
    cut = int(len(places) * MIDDLE)
    if len(places) - 2 * cut >= 4:
        slope, offset = np.polyfit(places[cut : len(places) - cut], values[cut : len(places) - cut], 1)
        return offset, slope
    return 0.5 - places.mean() / len(places), 1 / len(places)  # too few to measure: they show all there is


def _known_view(view, inside, sharp, width, height):
    """A measured view, or the exact one that it is near: the whole image in its pixels, or the square in its middle."""
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    if sharp:  # whole pixels hold the image
        across, down = _beyond(columns, inside.shape[1]), _beyond(rows, inside.shape[0])
        known = [(across[0], down[0], across[1], down[1])]
    else:  # it was padded to a square before it was resized
        known = [_middle(max(width, height), width, height)]
    known.append(_middle(min(width, height), width, height))
    distances = [max(abs(a - b) / size for a, b, size in zip(view, box, _sizes(box), strict=True)) for box in known]
    nearest = int(np.argmin(distances))
    return known[nearest] if distances[nearest] < NEAR + 0.5 / min(width, height) else view


def _middle(side, width, height):
    """The square with this side around the middle of an image."""
    across, down = side / width, side / height
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _beyond(places, side):
    """Where a picture of `side` pixels begins and ends, in units of the image that lies at these pixels of it."""
    start, size = places[0], places[-1] + 1 - places[0]
    return float(-start / size), float((side - start) / size)


def _sizes(box):
    left, top, right, bottom = box
    return right - left, bottom - top, right - left, bottom - top
