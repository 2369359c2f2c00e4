"""Concepts and image keys say where they are in one frame, whatever the image's aspect and the MLLM's view of it."""

import pytest
import torch

from segcompass.modeling_segcompass.backbone_files import see_all
from segcompass.modeling_segcompass.token_layout import token_position_features
from tests.support.scripted import noise_image
from tests.support.tiny import tiny_segcompass


def centres_among_keys(processor, inputs, columns, rows):
    """Where a grid over what the MLLM sees has its centres among the image keys, from pixel geometry alone."""
    pixels, images = inputs["original_sizes"][0].flip(0), processor.image_processor  # (2,) width and height
    across, start = torch.ones(2), torch.zeros(2)  # what the MLLM sees, in fractions of the image
    if getattr(images, "do_center_crop", False):
        across = min(pixels) / pixels
        start = (1 - across) / 2
    elif getattr(images, "do_pad", False):
        side = images.pad_size["height"]
        across = side / (side * pixels // max(pixels))
    x, y = ((torch.arange(count) + 0.5) / count for count in (columns, rows))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    return (start + places * across) * inputs["reshaped_input_sizes"][0].flip(0) / processor.frame.side


@pytest.mark.parametrize("view", ["llava, padded", "llava, its centre", "qwen"])
def test_concepts_and_image_keys_have_one_frame_on_images_of_any_aspect(view, monkeypatch):
    model, processor = tiny_segcompass("qwen2_5_vl" if view == "qwen" else "llava")
    if view == "llava, padded":
        processor.image_processor = see_all(processor.image_processor)
    model.config.image_view = processor.model_tokens()["image_view"]
    seen = []

    def recorded(types, image_xy, distance, placed):
        seen.append((types, image_xy))
        return token_position_features(types, image_xy, distance, placed)

    monkeypatch.setattr("segcompass.modeling_segcompass.modeling_segcompass.token_position_features", recorded)
    for height, width in ((56, 56), (28, 56), (56, 28), (40, 61)):
        inputs = processor(images=noise_image(height, width), text="it", response=processor.format_response("a"))
        with torch.no_grad():
            model(**inputs)
        types, xy = seen.pop()
        patches = xy[0][types[0] == 0]
        rows = int(inputs["image_grid_thw"][0, 1]) // 2 if view == "qwen" else 4
        expected = centres_among_keys(processor, inputs, len(patches) // rows, rows)
        torch.testing.assert_close(patches, expected.to(patches.dtype))


def test_one_image_gives_the_same_masks_wherever_its_padding_is_made(monkeypatch):
    """A wide image, and the same image already padded to a square with black: the patches lie at the same places."""
    _, processor = tiny_segcompass("llava")
    processor.image_processor = see_all(processor.image_processor)
    wide = processor(images=noise_image(20, 40), text="it")
    rows = processor.image_processor.crop_size["height"] // 2
    assert (wide["pixel_values"][..., :rows, :] != 0).any() and (wide["pixel_values"][..., rows:, :] == 0).all()
    assert wide["reshaped_input_sizes"].tolist() == [[16, 32]]  # half of the image encoder's frame as well
