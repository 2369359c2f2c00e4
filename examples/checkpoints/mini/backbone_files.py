"""What a processor needs of a plain MLLM and a plain image encoder, out of their folders or Hub repositories.

Read without torchvision and without the MLLM's own processor, which for some families wants a video part. What is no
MLLM or no image encoder is refused by name. It knows nothing about weights.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin

from .backbone import backbone_of
from .family_processor import saved_settings
from .image_encoder import image_processor_of
from .patch_boxes import WHOLE, Views

MIN_PIXELS, MAX_PIXELS = 3136, 705_600
"""The paper's limits on what an MLLM sees of an image, where its family has any: 4 to 900 tokens of Qwen2.5-VL."""


def read_mllm(
    source: str | Path,
    whole_image: bool = True,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    stretched: bool = False,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """The parts of a processor that come from the MLLM.

    Args:
        source: folder or Hub id of the MLLM.
        whole_image: whether an image processor that cuts a square out of the centre pads to a square instead.
        min_pixels: smaller images are enlarged to so many; None takes the paper's limit.
        max_pixels: larger images are reduced to so many; None takes the paper's limit.
        stretched: whether the image encoder stretches images to its square; then the MLLM's are stretched as well.
        chat_template: taken where the MLLM has none.

    Returns:
        dict: arguments of SegCompassProcessor.

    Raises:
        ValueError: what is named is no MLLM or lacks a file; or it has no limits on pixels and some were given.
    """
    config = read_config(source)
    if config.model_type == "segcompass":
        raise ValueError(
            f"mllm={str(source)!r} is a SegCompass model already; load its processor with "
            "SegCompassProcessor.from_pretrained, or name it as the model (--model)."
        )
    backbone = check_mllm(config, source)
    tokenizer = _read(AutoTokenizer, source, "tokenizer")
    images = _read(AutoImageProcessor, source, "image processor", backend="pil")
    saved, _ = ProcessorMixin.get_processor_dict(str(source))
    template = saved.get("chat_template") or tokenizer.chat_template or chat_template
    if template is None:
        raise ValueError(
            f"mllm={str(source)!r} has no chat template, so no prompt can be made; choose the MLLM's instruction-tuned "
            "version, or put its chat_template.jinja into the folder."
        )
    parts = {
        "image_processor": limit_pixels(see_all(images, stretched) if whole_image else images, min_pixels, max_pixels),
        "tokenizer": tokenizer,
        "chat_template": template,
        "mllm_type": config.model_type,
    }
    own = saved_settings(config.model_type, saved)
    parts["family_settings"] = {name: value for name, value in own.items() if name not in backbone.processor_fields}
    of_vision = {"patch_size": getattr(getattr(config, "vision_config", None), "patch_size", None)}
    for name in backbone.processor_fields:
        value = saved.get(name, getattr(config, name, of_vision.get(name)))
        if value is not None:
            parts[name] = value
    return parts


def read_config(source: str | Path, option: str = "mllm") -> PreTrainedConfig:
    """A model's configuration.

    Args:
        source: folder or Hub id.
        option: what named it, for the error.

    Returns:
        Its configuration.

    Raises:
        ValueError: no model is there.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{option}={str(source)!r} is no folder or Hub id of a model: {str(error).splitlines()[0]}"
        ) from error


def check_mllm(config: PreTrainedConfig, source: str | Path, option: str = "mllm") -> Any:
    """Refuse a model that is no MLLM, or one that cannot be a backbone.

    Args:
        config: of the model.
        source: folder or Hub id.
        option: what named it, for the error.

    Returns:
        What is known of its family.

    Raises:
        ValueError: it cannot be used.
    """
    backbone = backbone_of(config)
    if (obstacle := backbone.obstacle(config.model_type)) is not None:
        raise ValueError(
            f"{option}={str(source)!r} is of type {config.model_type!r} and cannot be used: {obstacle}. Choose one "
            "such as llava-hf/llava-1.5-7b-hf or Qwen/Qwen2.5-VL-7B-Instruct (docs/families.md)."
        )
    return backbone


def holds_processor(source: str | Path, processor_class: str) -> bool:
    """Whether a folder or repository was saved with a processor of this class."""
    try:
        return ProcessorMixin.get_processor_dict(str(source))[0].get("processor_class") == processor_class
    except OSError:
        return False


def read_image_encoder(source: str | Path) -> Any:
    """The image processor of an image encoder.

    Args:
        source: folder or Hub id, or an original segment-anything `.pth` file.

    Returns:
        its image processor, which makes what the encoder takes.

    Raises:
        ValueError: what is named is no image encoder.
    """
    try:
        return image_processor_of(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(f"image_encoder={str(source)!r} cannot be read: {str(error).splitlines()[0]}") from error


def see_all(image_processor: Any, stretched: bool = False) -> Any:
    """An image processor that leaves nothing out: the longest side fills the square, the rest is padded.

    The padding is right and below, as the image encoder's is, so that patches and image keys lie on one frame; it has
    the mean colour, which is what the released LLaVA-1.5 was trained to see beside an image.

    Args:
        image_processor: the MLLM's; one that does not cut a square out of the centre, or that also shows the image
            whole, stays as it is.
        stretched: fill the square by stretching instead, as the image encoder does.

    Returns:
        an image processor of the same class.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return image_processor
    if any(view.box == WHOLE for view in Views(image_processor).of(64, 32)):  # beside its tiles
        return image_processor
    side = dict(image_processor.crop_size)
    if side["height"] != side["width"]:
        return image_processor
    square = {"height": side["height"], "width": side["width"]}
    size = square if stretched else {"max_height": side["height"], "max_width": side["width"]}
    changes = {"do_center_crop": False, "size": size, "do_pad": not stretched, "pad_size": square}
    return image_processor.from_dict({**image_processor.to_dict(), **changes})


def limit_pixels(image_processor: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """An image processor with limits on the pixels that the MLLM sees, where its family has such limits.

    Args:
        image_processor: the MLLM's.
        min_pixels: as for `read_mllm`.
        max_pixels: as for `read_mllm`.

    Returns:
        an image processor of the same class.

    Raises:
        ValueError: limits were given and it has none, or the lower is above the upper.
    """
    if not hasattr(image_processor, "merge_size"):
        if min_pixels is not None or max_pixels is not None:
            raise ValueError(
                f"min_pixels={min_pixels} and max_pixels={max_pixels} were given, but {type(image_processor).__name__} "
                "brings every image to one size; leave them out."
            )
        return image_processor
    lower = MIN_PIXELS if min_pixels is None else min_pixels
    upper = MAX_PIXELS if max_pixels is None else max_pixels
    if not 0 < lower <= upper:
        raise ValueError(f"min_pixels is {lower} and max_pixels {upper}; the first must be the smaller, above 0.")
    size = {"shortest_edge": lower, "longest_edge": upper}
    return image_processor.from_dict({**image_processor.to_dict(), "size": size})


def _read(auto: Any, source: str | Path, what: str, **settings: Any) -> Any:
    try:
        return auto.from_pretrained(source, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"mllm={str(source)!r} has no {what} that can be read ({str(error).splitlines()[0]}); its folder must hold "
            "all files of the MLLM, as the Hub has them."
        ) from error
