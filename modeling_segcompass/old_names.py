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


class _AsVector(ConversionOps):
    """A tensor of one number as a vector; one that is a vector stays as it is."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        (read,) = input_dict.values()
        return {target_patterns[0]: [(read[0] if isinstance(read, list) else read).reshape(1)]}


register_checkpoint_conversion_mapping(
    "SegCompassModel",
    [WeightConverter(name, name, [_AsVector()]) for name in (f"grounded_reading.{scalar}" for scalar in OLD_SCALARS)],
    overwrite=True,  # the model's code may be imported twice: from the package, and from a saved folder
)
