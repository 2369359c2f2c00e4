"""Names of earlier versions, and what they are called now: saved folders of any version load through this one table.

It knows names, and the defaults and shapes that were others once; what values mean is the business of the
configuration, the processor and the model.
"""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

OLD_FIELDS = {
    "sam_config": "image_encoder_config",
    "sam_image_processor": "encoder_image_processor",
}
"""Fields of config.json and processor_config.json."""

OLD_PARTS = {"sam": "image_encoder"}
"""Parts of the model, as `references` in config.json and `from_backbones` name them."""

OLD_WEIGHTS = {
    r"^sam\.": "image_encoder.",
    r"^sae\.usual_strength$": "sae.mean_active_activation",
    r"^usual_strength$": "mean_active_activation",
}
"""Regular expressions of weight names, as transformers' `key_mapping` takes them."""

OLD_SCALARS = (
    *("same_concept", "gain", "offset", "confidence_bias", "key_scale", "key_shift"),
    "upsampling.log_sigma",
)
"""Weights of the grounded read-out that were saved with shape (), and are vectors of one number now."""

EARLIER_DEFAULTS = {"concept_reading": "feature", "grounded_rank": 0}
"""What a config.json means that lacks these fields: whoever wrote it knew one read-out, or no map."""


def with_new_names(fields: dict[str, Any], names: dict[str, str] = OLD_FIELDS) -> dict[str, Any]:
    """The fields of a saved JSON, or the keywords of a call, under today's names.

    Args:
        fields: a configuration's or processor's fields, or keyword arguments.
        names: old name -> new name.

    Returns:
        dict: new names; everything else as it was.

    Raises:
        ValueError: a field is there under its old and its new name.
    """
    for old, new in names.items():
        if old in fields and new in fields:
            raise ValueError(f"both {old!r} and {new!r} (its new name) are given; keep {new!r} only.")
    fields = {names.get(name, name): value for name, value in fields.items()}
    if fields.get("references"):
        fields["references"] = {OLD_PARTS.get(part, part): where for part, where in fields["references"].items()}
    return fields


def read_old_shapes(model_class: type) -> None:
    """Let transformers read OLD_SCALARS from files of earlier versions; it looks conversions up by the class's name.

    Args:
        model_class: SegCompassModel, or a class made of it.
    """
    names = [f"grounded_reading.{name}" for name in OLD_SCALARS]
    conversions: list[Any] = [WeightConverter(name, name, [_AsTheModelHasIt()]) for name in names]
    register_checkpoint_conversion_mapping(model_class.__name__, conversions, overwrite=True)


def with_vectors(state_dict: dict[str, Any], prefix: str) -> None:
    """In place, OLD_SCALARS of a state dict as vectors of one number: adapters and states of earlier versions.

    Args:
        state_dict: tensors by name.
        prefix: of the grounded read-out's names in it.
    """
    for name in OLD_SCALARS:
        if (weight := state_dict.get(prefix + name)) is not None and not weight.ndim:
            state_dict[prefix + name] = weight.reshape(1)


class _AsTheModelHasIt(ConversionOps):
    """A tensor of one number in the shape that it has in the model, which may be of an earlier version's code too."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        (read,) = input_dict.values()
        weight = read[0] if isinstance(read, list) else read
        shape = kwargs["model"].get_parameter(kwargs["full_layer_name"]).shape
        fits = weight.numel() == shape.numel() == 1  # others are refused by name, as all weights are
        return {target_patterns[0]: [weight.reshape(shape) if fits else weight]}
