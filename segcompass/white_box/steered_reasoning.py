"""Does the model write otherwise when its concepts fire otherwise? Steering while the response is written.

A colour or shape that the model's own conclusion names is switched off, or replaced by another that its response does
not name, in every hidden state after the SAE's layer. Controls: as many random concepts of the same image and text
switched off; the wrong sign, the same concepts doubled; and at each token a random direction of the replacement's
length. Detectors come from the criteria's labels, which rest on other scenes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from segcompass.loaders.scene_drawing import COLOURS, SHAPES
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.answering import reasoning_of
from segcompass.modeling_segcompass.interventions import Steering

VARIANTS = ("swap", "swap_control", "off", "off_control", "doubled")


def conclusion_of(response: str) -> str:
    """The last sentence of a response's reasoning: "answer: small blue cone".

    Args:
        response: as written, with or without markers.

    Returns:
        Its text, without the full stop.
    """
    return reasoning_of(response).rstrip(" .").rsplit(". ", 1)[-1]


@torch.no_grad()
def measure_steered_reasoning(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    row: Mapping[str, Any],
    detectors: Mapping[str, Sequence[int]],
    rng: np.random.Generator,
    kinds: Sequence[Sequence[str]] = (tuple(COLOURS), SHAPES),
) -> dict[str, float] | None:
    """What one sample's conclusion says under steering.

    Args:
        model: in evaluation mode.
        processor: the model's.
        row: with `image` and `instruction`.
        detectors: attribute -> features that detect it on patches, see `criteria.Labels.hands`.
        rng: chooses attribute, replacement and controls.
        kinds: the attributes of each kind; one takes the place of another of its kind.

    Returns:
        0 or 1 each: `swap`, the conclusion says the replacement and no longer the attribute; `swap_control`, so it does
        under random directions; `off`, the attribute is no longer named without its detectors; `off_control`, without
        as many random concepts; `doubled`, with its detectors doubled. None where the conclusion names no attribute
        that has detectors.
    """
    inputs = processor(images=[row["image"]], text=[row["instruction"]]).to(model.device)
    response, codes = _write(model, processor, inputs, None)
    named = set(re.findall(r"\w+", conclusion_of(response).lower()))
    said = set(re.findall(r"\w+", f"{response} {row['instruction']}".lower()))
    choices = [
        (word, other)
        for kind in kinds
        for word in kind
        if word in named and detectors.get(word)
        for other in kind
        if other not in said and detectors.get(other) and not set(detectors[word]) & set(detectors[other])
    ]
    if not choices:
        return None
    word, other = choices[rng.integers(len(choices))]
    own = list(detectors[word])
    others = [index for index in codes.nonzero()[:, 0].tolist() if index not in own]
    random = rng.permutation(others)[: len(own)].tolist()
    swapped = Steering(None, [], [(own, list(detectors[other]))])
    generator = torch.Generator(model.device).manual_seed(int(rng.integers(2**31)))

    def sideways(z):
        length = (swapped.on_states(model.sae, z) - z).norm(dim=-1, keepdim=True)  # (B, t, 1)
        direction = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        return z + length * torch.nn.functional.normalize(direction, dim=-1)

    def scaled(indices, factor):
        scale = codes.new_ones(len(codes))
        scale[indices] = factor
        return Steering(scale, [], []).on_states

    steers = {
        "swap": swapped.on_states,
        "swap_control": lambda sae, z: sideways(z),
        "off": scaled(own, 0.0),
        "off_control": scaled(random, 0.0),
        "doubled": scaled(own, 2.0),
    }
    measured = {}
    for name in VARIANTS:
        text, _ = _write(model, processor, inputs, lambda z, steer=steers[name]: steer(model.sae, z))
        names = set(re.findall(r"\w+", conclusion_of(text).lower()))
        measured[name] = float(word not in names and (other in names or not name.startswith("swap")))
    return measured


def _write(
    model: SegCompassModel, processor: SegCompassProcessor, inputs: Any, steer: Callable | None
) -> tuple[str, torch.Tensor]:
    """The response, and each concept's greatest activation over all tokens, float (d_sae,)."""
    asked = {name: value for name, value in inputs.items() if name != "encoder_pixel_values"}
    with model.reading_states() as recorder:
        recorder.steer = steer
        sequences = model.generate(**asked, do_sample=False, max_new_tokens=model.config.max_response_length)
    written = sequences[0, inputs["input_ids"].shape[1] :]
    codes = model.sae.encode(recorder.states.z[0]).amax(0)
    return processor.tokenizer.decode(written, skip_special_tokens=True), codes
