"""Loads a model together with its processor, as every command does."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, SamImageProcessorPil

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.backbone_files import read_config, read_mllm
from segcompass.modeling_segcompass.saved_folders import check_loaded
from segcompass.modeling_segcompass.tokens import give_rows


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
        model = SegCompassModel.from_pretrained(path, dtype="float32")  # first: its errors say what the folder is
        processor = SegCompassProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no folder or Hub id of a SegCompass model: {error}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


def load_mllm(
    path: str,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    chat_template: str | None = None,
) -> tuple[PreTrainedModel, SegCompassProcessor]:
    """What a sparse autoencoder reads: a SegCompass model, or an MLLM alone.

    Args:
        path: folder or Hub id of either.
        dtype: of the weights.
        device: where the model goes; by default the GPU, or the CPU where there is none.
        chat_template: of an MLLM that comes without one.

    Returns:
        The model, and a SegCompassProcessor that makes its inputs (without a prompt of ours for an MLLM alone).

    Raises:
        ValueError: no MLLM, a file of it that is missing, or weights that are missing or not finite.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = read_config(path, "model")
    if config.model_type == "segcompass":
        model = SegCompassModel.from_pretrained(path, dtype=dtype)
        return model.to(device), SegCompassProcessor.from_pretrained(path)
    processor = SegCompassProcessor(
        encoder_image_processor=SamImageProcessorPil(),  # not used: an MLLM alone has no image encoder
        prompt_template="{instruction}",
        **read_mllm(path, chat_template=chat_template),
    )
    asked = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loaded` refuses
    loaded: Any = AutoModelForImageTextToText.from_pretrained(path, **asked)
    mllm, info = loaded
    check_loaded(mllm, info, path, unexpected=False)
    give_rows(mllm, processor.tokenizer, processor.new_tokens)  # as a SegCompass model that is built from it has them
    return mllm.to(device), processor
