"""Loads a model together with its processor, as every command does."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, SamImageProcessorPil

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.family_processor import saved_settings


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


def load_mllm(
    path: str, dtype: str = "float32", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, SegCompassProcessor]:
    """What a sparse autoencoder reads: a SegCompass model, or an MLLM alone.

    Args:
        path: folder or Hub id of either.
        dtype: of the weights.
        device: where the model goes; by default the GPU, or the CPU where there is none.

    Returns:
        The model, and a SegCompassProcessor that makes its inputs (without a prompt of ours for an MLLM alone).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "segcompass":
        model = SegCompassModel.from_pretrained(path, dtype=dtype)
        return model.to(device), SegCompassProcessor.from_pretrained(path)
    parts = AutoProcessor.from_pretrained(path)
    names = backbone_of(config).processor_fields
    own = saved_settings(config.model_type, vars(parts))
    processor = SegCompassProcessor(
        image_processor=parts.image_processor,
        tokenizer=parts.tokenizer,
        encoder_image_processor=SamImageProcessorPil(),  # not used: an MLLM alone has no image encoder
        chat_template=parts.chat_template,
        prompt_template="{instruction}",
        mllm_type=config.model_type,
        family_settings={name: value for name, value in own.items() if name not in names},
        **{field: getattr(parts, field) for field in names if getattr(parts, field, None) is not None},
    )
    mllm: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return mllm.to(device), processor
