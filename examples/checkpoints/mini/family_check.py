"""Whether an MLLM can serve, tried when a model is built of its parts: right, or refused by name.

Three things must hold, and no reading of code tells them for every family: the states that generation leaves are those
of one pass over the same tokens; a well-formed response has its concentration tokens; an image token shows the part of
the image that `patch_boxes` says. They are tried on a generated image, with a few tokens. It knows nothing about masks.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from .images import read_image
from .patch_boxes import has_area
from .token_layout import find_slots

SIZE = (96, 64)
"""Width and height of the image whose states are compared."""
PAINTED_SIZE = (384, 256)
"""Of the image that patches are painted on."""
PAINTED = (0.15, 0.5, 0.9)
"""Which of the patches are painted, as shares of their number."""
TEXTS = ("it", "what is beside it")
WRITTEN = 4
"""Tokens that are generated."""
TOLERANCE = 1e-3
"""How far states may differ, relative to their size, where numbers are exact enough to ask for so much."""
ROUNDINGS = 16
"""How many roundings of a half-precision dtype they may differ by: in bfloat16 32 blocks leave 4 %, where a wrong
computation leaves a difference of the states' own size."""

SUPPORTED = (
    "LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, InternVL, Gemma 3, Gemma 4, "
    "PaliGemma, SmolVLM, Idefics 3, GLM-4V, Aya Vision and DeepSeek-VL can be used"
)


def check_parts(mllm: Any, processor: Any, backbone: Any) -> None:
    """Refuse an MLLM that lacks a part, before anything is built.

    Args:
        mllm: transformers' model.
        processor: a SegCompassProcessor, or None.
        backbone: the MLLM's family.

    Raises:
        ValueError: naming the part.
    """
    name = type(mllm).__name__
    if mllm.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, whose reasoning never stands in one sequence with the image; {SUPPORTED}."
        )
    if (obstacle := backbone.obstacle(mllm.config.model_type)) is not None:
        raise ValueError(f"{name} cannot be used: {obstacle}; {SUPPORTED}.")
    backbone.blocks(mllm)
    if mllm.get_output_embeddings() is None:
        raise ValueError(f"{name} has no LM head to write a response with; {SUPPORTED}.")
    if getattr(mllm.config, "image_token_id", None) is None:
        raise ValueError(f"{name} has no image tokens (config.image_token_id) that show its parts; {SUPPORTED}.")
    backbone.vision_tower(mllm)
    if processor is None:
        if not backbone.model_types:
            raise ValueError(
                f"{name} is of a family that must be tried before it is used ({mllm.config.model_type}); pass "
                "processor=, so that it can be."
            )
    elif mllm.config.image_token_id != processor.image_token_id:
        raise ValueError(
            f"{name} has image token {mllm.config.image_token_id}, the processor writes {processor.image_token_id} "
            f"({processor.image_token!r}); pass the processor of this MLLM (mllm_type={mllm.config.model_type!r})."
        )


@torch.no_grad()
def check_family(model: Any, processor: Any) -> None:
    """Try a model's MLLM with its processor.

    Args:
        model: a SegCompassModel.
        processor: its SegCompassProcessor.

    Raises:
        ValueError: it cannot serve, with the reason.
    """
    if any(weight.is_meta for weight in model.mllm.parameters()):
        return  # it has no numbers
    settings = processor.image_processor.to_json_string(), processor.chat_template, processor.tokenizer.get_vocab()
    key = hash((type(model.mllm), model.mllm.config.to_json_string(), type(model.backbone), str(settings)))
    if key in _TRIED:
        return
    training = model.training
    model.eval()
    try:
        _check(model, processor)
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{type(model.mllm).__name__} cannot be used: {error}") from error
    finally:
        model.train(training)
    _TRIED.add(key)


_TRIED: set[int] = set()
"""What passed in this process: the trials ask for structure, and weights of the same structure pass as well."""


def _check(model, processor):
    image = _noise(*SIZE)
    response = processor(images=[image], text=TEXTS[0], response=processor.format_response("a"), image_encoder=False)
    _, found = find_slots(response["input_ids"], response["response_mask"], model.config)
    count = int((response["input_ids"] == model.config.ref_token_id).sum())
    if not found.all() or count != model.config.num_slots:
        raise ValueError(
            f"a formatted response has {count} concentration tokens after '</think>', it must have "
            f"{model.config.num_slots}; pass the tokenizer of this MLLM."
        )
    alone = _states(model, processor, [image], TEXTS[:1])
    padded = _states(model, processor, [image, image], TEXTS)
    for name, (written, read, mask) in {"alone": alone, "padded": padded}.items():
        if (error := _error(written, read, mask)) > _tolerance(written):
            raise ValueError(
                f"the states that generation left differ from those of one pass over the same tokens by {error:.1%} "
                f"(a prompt {name}), so its masks would not be those it is trained for; {SUPPORTED}."
            )
    _check_boxes(model, processor)


def _states(model, processor, images, texts):
    """The SAE's input of generated tokens: as generation left it, as one pass over them gives it; where they count."""
    backbone, mllm = model.backbone, model.mllm
    inputs = processor(images=images, text=list(texts), image_encoder=False).to(mllm.device)
    boxes = inputs.pop("patch_boxes")
    with model.reading_states() as recorder:
        limits = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False}
        model.generate(**inputs, patch_boxes=boxes, **limits)
        written = recorder.states
    whole = dict(inputs)
    added = written.input_ids.shape[1] - whole["input_ids"].shape[1]
    backbone.append_text(whole, added)
    whole.update(input_ids=written.input_ids)
    whole["attention_mask"] = nn.functional.pad(whole["attention_mask"], (0, added), value=1)
    with model.reading_states() as recorder:
        backbone.without_head(mllm)(**backbone.mllm_inputs(backbone.without_head(mllm), whole), use_cache=False)
        (read,) = recorder.z
    return written.z, read, whole["attention_mask"].bool()


def _error(written, read, mask):
    """The greatest difference of a token's states, relative to their size."""
    difference = (written - read).float().square().mean(-1).sqrt()[mask]
    return float((difference / read.float().square().mean(-1).sqrt()[mask].clamp_min(1e-9)).max())


def _tolerance(states):
    return max(TOLERANCE, ROUNDINGS * torch.finfo(states.dtype).eps)


def _check_boxes(model, processor):
    """Paint one patch after another: the token that changes most must be one that shows the painted place.

    Attention within the vision tower would spread the change, so its output is taken off.
    """
    image = _noise(*PAINTED_SIZE)
    boxes = processor.patch_boxes([image])[0]
    shown = has_area(boxes).nonzero()[:, 0].tolist()
    width, height = image.size
    images, places = [image], []
    for share in PAINTED:
        left, top, right, bottom = (boxes[shown[int(share * len(shown))]] * torch.tensor([*image.size] * 2)).tolist()
        place = (max(0, left), max(0, top), min(width, right), min(height, bottom))
        place = tuple(round(edge) for edge in place)
        if place[2] <= place[0] or place[3] <= place[1]:
            continue  # of a patch of padding
        painted = np.array(image)
        painted[place[1] : place[3], place[0] : place[2]] = 255 - painted[place[1] : place[3], place[0] : place[2]]
        images.append(read_image(painted))
        places.append(place)
    inputs = processor(images=images, text=[TEXTS[0]] * len(images), image_encoder=False).to(model.mllm.device)
    inputs.pop("patch_boxes")
    embedded = _embedded(model, inputs)  # (1 + n, P, d_π)
    change = (embedded[1:] - embedded[:1]).float().norm(dim=-1).cpu()  # (n, P)
    corners = boxes * torch.tensor([*image.size] * 2)
    for place, changed in zip(places, change, strict=True):
        most = int(changed.argmax())
        left, top, right, bottom = corners[most].tolist()
        overlaps = min(right, place[2]) > max(left, place[0]) and min(bottom, place[3]) > max(top, place[1])
        if not changed[most] > 0 or not overlaps:
            raise ValueError(
                f"an image token does not show the part of the image that it stands for (pixels {place} were changed, "
                f"and image token {most} of {len(changed)} changed most), so concepts would be shown in wrong places; "
                f"{SUPPORTED}."
            )


class _Enough(Exception):
    """Ends a pass before the decoder."""


def _embedded(model, inputs):
    """What the decoder is given at the image tokens: (B, P, d_π)."""
    backbone, mllm = model.backbone, model.mllm
    kept: list[torch.Tensor] = []

    def keep(module, args, kwargs):
        kept.append(kwargs["inputs_embeds"])
        raise _Enough

    hooks = [backbone.language_model(mllm).register_forward_pre_hook(keep, with_kwargs=True)]
    for module in backbone.vision_tower(mllm).modules():
        if "attention" in type(module).__name__.lower() and not any(
            "attention" in type(part).__name__.lower() for part in list(module.modules())[1:]
        ):
            hooks.append(module.register_forward_hook(_silence))
    core = backbone.without_head(mllm)
    try:
        core(**backbone.mllm_inputs(core, inputs), use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    is_image = inputs["input_ids"] == model.config.image_token_id
    return kept[0][is_image].view(len(is_image), -1, kept[0].shape[-1])


def _silence(module, args, output):
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def _noise(width, height):
    """Coarse noise, so that resizing leaves something of it."""
    small = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return read_image(small).resize((width, height))
