"""The tiny models of tests/support see: what they make of an image depends on the image.

SAM's own start (a standard deviation of 1e-10) gives every image the same features, and a test of masks on top of it
passes whatever is done to the images.
"""

import pytest
import torch

from segcompass.modeling_segcompass.image_encoder import encoder_of, image_processor_of, load_image_encoder
from segcompass.trainers.activations import layer_hidden_states
from tests.support.encoders import TINY, tiny_encoder
from tests.support.hub_world import make_sam
from tests.support.promptable import WHOLE, save_promptable
from tests.support.scripted import lively_segcompass, noise_image
from tests.support.tiny import BACKBONES, tiny_sam, tiny_segcompass


def hub_sam(folder):
    make_sam(folder)
    return str(folder)


def promptable(name):
    def save(folder):
        save_promptable(name, folder)
        return str(folder)

    return save


ENCODERS = {
    "tiny_sam": lambda folder: tiny_sam(),
    "hub_world's SAM": hub_sam,
    **{f"tiny_encoder {name}": lambda folder, name=name: tiny_encoder(name) for name in TINY},
    **{f"as made {name}": lambda folder, name=name: TINY[name]() for name in TINY},
    **{f"promptable {name}": promptable(name) for name in WHOLE},
}


def share_between_images(features):
    """Of the features' spread, what is left when each place's mean over the images is taken off."""
    assert features.std() > 1e-3, "features are almost constant"
    return (features - features.mean(0)).std() / features.std()


@pytest.mark.parametrize("name", ENCODERS)
def test_features_depend_on_the_image(name, tmp_path):
    torch.manual_seed(0)
    encoder, _ = load_image_encoder(ENCODERS[name](tmp_path / "encoder"))
    images = image_processor_of(encoder)
    pixels = images([noise_image(40, 40, seed) for seed in range(4)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = encoder_of(encoder).encode(encoder.eval(), pixels)
    assert share_between_images(features) > 0.1


@pytest.mark.parametrize("name", [*BACKBONES, "lively"])
def test_masks_and_states_depend_on_the_image(name):
    """Each by its own way: states by what the MLLM sees, masks by the image encoder's features alone."""
    model, processor = lively_segcompass("llava") if name == "lively" else tiny_segcompass(name)
    images, response = [noise_image(40, 40, seed) for seed in range(4)], processor.format_response("a box")
    inputs = processor(images=images, text=["the box"] * 4, response=[response] * 4)
    states = layer_hidden_states(model, inputs, model.config.sae_config.layer)[:, -3:]  # of text
    assert share_between_images(states) > 0.02
    same = processor(images=images[:1] * 4, text=["the box"] * 4, response=[response] * 4)
    same["encoder_pixel_values"] = inputs["encoder_pixel_values"]
    with torch.no_grad():
        masks = model(**same).pred_masks
    assert share_between_images(masks) > 0.1
