"""Noise images, tiny models whose masks depend on their input, and a way to make a model write a given response."""

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor

from tests.support.tiny import tiny_segcompass

IMAGE_SIZES = [(40, 40), (30, 44), (44, 28), (20, 64)]
INSTRUCTIONS = ["the red box", "it", "whatever stands left of the ring", "a mug?"]


def noise_image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise_images():
    return [noise_image(*size, seed) for seed, size in enumerate(IMAGE_SIZES)]


def lively_segcompass(backbone, **config):
    """A tiny model with larger weights, and its processor. As initialised, its masks hardly depend on the input."""
    model, processor = tiny_segcompass(backbone, **config)
    factors = {"mllm": 8, "image_encoder": 10, "mask_decoder": 1.3}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(factors.get(name.split(".")[0], 1))
    return model, processor


class Script(LogitsProcessor):
    """Makes generation write the given responses, each followed by the end token, whatever the model says."""

    def __init__(self, tokenizer, responses):
        end = [tokenizer.eos_token_id]
        self.rows = [tokenizer(response, add_special_tokens=False).input_ids + end for response in responses]
        self.prompt_length = None

    def __call__(self, input_ids, scores):
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        step = input_ids.shape[1] - self.prompt_length
        forced = torch.tensor([row[min(step, len(row) - 1)] for row in self.rows])
        return torch.full_like(scores, float("-inf")).scatter(1, forced[:, None], 0.0)
