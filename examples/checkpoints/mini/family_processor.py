"""The processor that transformers has for a family of MLLMs, without what it loads for videos and sound.

`own_processor_class("internvl").around(image_processor, tokenizer, settings)` runs the family's own constructor, and so
has its tokens and its `replace_image_token`, but checks and keeps no other parts. It knows nothing about ours.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

SAYING_TOKENS = (5, 15)
"""Version of transformers since when most processors say which tokens stand for an image."""

PARTS = (
    *("self", "image_processor", "tokenizer", "video_processor", "feature_extractor", "chat_template"),
    *("args", "kwargs"),
)
"""Arguments of a processor's constructor that are no settings."""


class _Quiet(ProcessorMixin):
    """Stands behind a family's constructor in place of ProcessorMixin's, which would ask for a video processor."""

    plain: Any
    mllm_type: str
    given: dict[str, Any]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, *args: Any, **kwargs: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __reduce__(self) -> Any:  # its class is made when it is asked for, so that pickle cannot find it by name
        return _made_again, (self.mllm_type, self.image_processor, self.tokenizer, self.given)

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The settings that the family's constructor takes."""
        return tuple(name for name in inspect.signature(cls.plain.__init__).parameters if name not in PARTS)

    @classmethod
    def around(cls, image_processor: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
        """The family's processor around these parts.

        Args:
            image_processor: the MLLM's.
            tokenizer: the MLLM's; some families add tokens to it.
            settings: those of `setting_names` that differ from the family's defaults.

        Returns:
            The processor; it makes texts and token types, and is not called.

        Raises:
            ValueError: a setting that the family does not have, or what its constructor lacks.
        """
        name = cls.plain.__name__
        unknown = sorted(set(settings) - set(cls.setting_names()))
        if unknown:
            raise ValueError(f"{name} has no {', '.join(unknown)}; it has {', '.join(cls.setting_names()) or 'none'}.")
        parts = {part: None for part in inspect.signature(cls.plain.__init__).parameters if part in PARTS[3:6]}
        try:
            made = cls(**{**parts, "image_processor": image_processor, "tokenizer": tokenizer, **settings})
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be made of these parts ({type(error).__name__}: {error}); use the MLLM's own tokenizer "
                "and image processor, and install the package that it names."
            ) from error
        made.given = dict(settings)
        return made

    @property
    def image_options(self) -> dict[str, Any]:
        """What the family asks of its image processor on every call."""
        defaults = getattr(getattr(self, "valid_processor_kwargs", None), "_defaults", None) or {}
        return {**defaults.get("images_kwargs", {}), **(getattr(type(self).plain, "images_kwargs", None) or {})}


@cache
def own_processor_class(mllm_type: str) -> Any:
    """The family's processor class, of which `around` makes one.

    Args:
        mllm_type: `model_type` of the MLLM's configuration.

    Returns:
        A class, with transformers' own as `plain`; None if transformers has none.
    """
    family = _family(mllm_type)
    if family is None or not issubclass(family, ProcessorMixin):  # transformers' stand-in for what is not installed
        return None
    return type(family.__name__, (family, _Quiet), {"plain": family, "mllm_type": mllm_type})


def _made_again(mllm_type, image_processor, tokenizer, settings):
    return own_processor_class(mllm_type).around(image_processor, tokenizer, settings)


def saved_settings(mllm_type: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a family's own processor was saved with, the settings: `family_settings` of a SegCompassProcessor.

    Args:
        mllm_type: `model_type` of the MLLM's configuration.
        saved: its processor_config.json, or the attributes of the processor itself.

    Returns:
        dict: {} for a family without a processor of its own.
    """
    family = own_processor_class(mllm_type)
    names = () if family is None else family.setting_names()
    return {name: saved[name] for name in names if isinstance(saved.get(name), (str, int, float, list, dict))}


def _family(mllm_type):
    name = PROCESSOR_MAPPING_NAMES.get(mllm_type)
    return None if name is None else processor_class_from_name(name)


@cache
def model_class(mllm_type: str) -> Any:
    """transformers' class of an MLLM for `from_backbones`, by its `model_type`; None if there is none."""
    try:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[mllm_type]]
    except KeyError:
        return None


def _newer():
    if tuple(map(int, transformers_version.split(".")[:2])) >= SAYING_TOKENS:
        return ""
    needed = ".".join(map(str, SAYING_TOKENS))
    return f"; install transformers>={needed}, where most do, in place of {transformers_version}"


def known_obstacle(mllm_type: str) -> str | None:
    """Why an MLLM cannot be used, as far as transformers' own tables tell; the rest is tried (`family_check.py`).

    Args:
        mllm_type: `model_type` of its configuration.

    Returns:
        The reason; None where nothing is known against it.
    """
    if mllm_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "it is no MLLM, which reads an image and writes text"
    config = CONFIG_MAPPING[mllm_type]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose response never stands in one sequence with the image"
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(mllm_type)
    if isinstance(images, dict) and "pil" not in images:
        return "transformers has its image processor for torchvision only"
    family = _family(mllm_type)
    if family is None:
        return "transformers has no processor for it"
    if not issubclass(family, ProcessorMixin):
        return f"its processor ({PROCESSOR_MAPPING_NAMES[mllm_type]}) needs a package that is not installed"
    if family.replace_image_token is ProcessorMixin.replace_image_token:
        return f"its processor does not say which tokens stand for an image (replace_image_token){_newer()}"
    return None
