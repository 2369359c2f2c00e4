"""Loads a model together with its processor, as every command does."""

from pathlib import Path

import torch

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor


def load(path: str | Path, device: str | torch.device | None = None) -> tuple[SegCompassModel, SegCompassProcessor]:
    """A model in float32 and its processor.

    Args:
        path: SegCompass folder or Hub id.
        device: where the model goes; by default the GPU, or the CPU where there is none.

    Returns:
        The model and the processor.

    Raises:
        ValueError: there is no such model.
    """
    try:
        processor = SegCompassProcessor.from_pretrained(path)
        model = SegCompassModel.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no folder or Hub id of a SegCompass model: {error}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor
