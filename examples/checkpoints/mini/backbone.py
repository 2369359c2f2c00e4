"""What differs between families of MLLMs: this file knows LLaVA from Qwen, everybody else asks it.

    backbone_of(model).blocks(model.mllm)       # likewise of an MLLM, a configuration or a processor

transformers answers most questions in one way for all families (`get_decoder`, `get_encoder`, `image_token_id`, the
processor's `replace_image_token`), and `Backbone` is that way. A family that differs is a small class below and an
entry in `FAMILIES`. No family's model code is repeated here. It knows nothing about masks, concepts or training.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import TransformersKwargs

PER_TOKEN_INPUTS = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
"""Inputs of shape (B, T), whatever the family; all others have one row per image or per patch."""

TOKEN_TYPE_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Per-token inputs that tell image tokens (1) from text (0)."""


class Backbone:
    """A family of MLLMs, without weights: names, shapes and places. The defaults hold wherever transformers is uniform.

    Example:
        backbone = backbone_of(model)
        block = backbone.blocks(model.mllm)[model.config.sae_config.layer - 1]
        rows, columns = backbone.patch_grid(model.config.mllm_config, inputs["input_ids"], inputs)[0].tolist()
    """

    model_types: tuple[str, ...] = ()
    """`model_type` of the configurations that belong to the family."""
    image_token = "<image>"
    """the text that stands for an image in a prompt."""
    returns_token_types = False
    """whether the MLLM's forward takes one of TOKEN_TYPE_INPUTS."""
    per_patch_inputs: tuple[str, ...] = ()
    """inputs whose rows are the patches of all images, one image after the other."""
    projector_names = ("multi_modal_projector",)
    """where the projector may be, as a path from the MLLM without its head."""
    notes_on_model = False
    """whether the MLLM notes something about the prompt on itself while it generates, so that one thread must wait for
    another."""
    processor_fields: tuple[str, ...] = ()
    """settings that the family's own processor keeps and `SegCompassProcessor` takes over."""

    # -- parts of the model ------------------------------------------------------------------------------------------

    def language_model(self, mllm: PreTrainedModel) -> nn.Module:
        """The decoder: its output's `last_hidden_state` is (B, T, d_π)."""
        return mllm.get_decoder()

    def blocks(self, mllm: PreTrainedModel) -> nn.ModuleList:
        """The decoder blocks; the output of block L (from 1) is `hidden_states[L]`.

        Args:
            mllm: transformers' model.

        Returns:
            nn.ModuleList: all blocks, in order.

        Raises:
            ValueError: the MLLM's decoder is no stack of blocks.
        """
        layers = getattr(self.language_model(mllm), "layers", None)
        if layers is None:
            raise ValueError(
                f"{type(mllm).__name__} has no decoder blocks that the SAE could read (get_decoder().layers); choose "
                "an MLLM whose language model is a decoder, such as LLaVA-1.5 or Qwen2.5-VL."
            )
        return layers

    def without_head(self, mllm: PreTrainedModel) -> nn.Module:
        """The MLLM without its LM head: takes the same inputs, returns hidden states only."""
        return mllm.base_model

    def vision_tower(self, mllm: PreTrainedModel) -> nn.Module:
        """The MLLM's own image encoder.

        Args:
            mllm: transformers' model.

        Returns:
            nn.Module: the tower, without the projector in most families.

        Raises:
            ValueError: the MLLM has none.
        """
        tower = mllm.get_encoder("image")
        if tower is mllm or tower is self.without_head(mllm):
            raise ValueError(f"{type(mllm).__name__} has no vision tower; choose an MLLM that takes images.")
        return tower

    def projector(self, mllm: PreTrainedModel) -> nn.Module | None:
        """What carries image features to the language model's width; None where the family has no such module."""
        modules = dict(self.without_head(mllm).named_modules())
        return next((modules[name] for name in self.projector_names if name in modules), None)

    def vision_names(self, mllm: PreTrainedModel) -> tuple[str, ...]:
        """Where vision tower and projector are in the MLLM: prefixes of its weights' names."""
        parts = [self.vision_tower(mllm), self.projector(mllm)]
        return tuple(name for name, module in mllm.named_modules() if any(module is part for part in parts))

    def lora_targets(self, mllm: PreTrainedModel) -> str:
        """A regular expression of the language model's linear layers, by their names in a SegCompassModel."""
        decoder = self.language_model(mllm)
        name = next(name for name, module in mllm.named_modules() if module is decoder)
        return rf".*mllm\.{re.escape(name)}\..*\.(q|k|v|o|gate|up|down)_proj"

    # -- shapes ------------------------------------------------------------------------------------------------------

    def patches_per_token(self, mllm_config: Any) -> int:
        """How many patches of the vision tower one image token stands for."""
        return getattr(mllm_config.vision_config, "spatial_merge_size", 1) ** 2

    def vision_depth(self, mllm_config: Any) -> int:
        """The number of the vision tower's blocks."""
        vision = mllm_config.vision_config
        return vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers

    def patch_grid(
        self, mllm_config: Any, input_ids: torch.Tensor, inputs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """How the image tokens of each sample lie on the image; they run row by row.

        Args:
            mllm_config: the MLLM's configuration.
            input_ids: long (B, T), one image per sample.
            inputs: the MLLM's other inputs; `image_grid_thw`, where a family has it, says the grid. Without it the
                grid is square.

        Returns:
            long (B, 2), (rows, columns).
        """
        count = (input_ids == mllm_config.image_token_id).sum(1).clamp_min(1)
        patches = None if inputs is None else inputs.get("image_grid_thw")
        if patches is None:
            columns = count.float().sqrt().round().long()
        else:
            columns = patches[:, 2] // math.isqrt(self.patches_per_token(mllm_config))
        return torch.stack([count // columns, columns], 1)

    def patch_positions(self, is_image: torch.Tensor, patch_grid: torch.Tensor) -> torch.Tensor:
        """Where each image token's patch is on what the MLLM sees of the image.

        Args:
            is_image: bool (B, T), the image tokens.
            patch_grid: long (B, 2), (rows, columns) from `patch_grid`.

        Returns:
            float (B, T, 2), the centre's (x, y), each in [0, 1]; without meaning at other tokens.
        """
        order = (is_image.cumsum(1) - 1).clamp_min(0)
        height, width = patch_grid[:, :1], patch_grid[:, 1:]
        return torch.stack([(order % width + 0.5) / width, (order // width + 0.5) / height], -1)  # (B, T, 2)

    # -- inputs ------------------------------------------------------------------------------------------------------

    def mllm_inputs(self, mllm: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of a processor's inputs those that the MLLM's forward takes, without labels."""
        taken = set(inspect.signature(mllm.forward).parameters) - {"labels"}
        return {name: value for name, value in inputs.items() if name in taken and value is not None}

    def check_inputs(self, mllm: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        """Refuse what the MLLM would swallow without a word.

        Args:
            mllm: transformers' model.
            inputs: for its forward, by name.

        Raises:
            ValueError: an input that neither the MLLM nor its decoder names, nor transformers for all models.
        """
        parts = (mllm, self.without_head(mllm), self.language_model(mllm))  # each hands on what it does not name
        taken = set(TransformersKwargs.__optional_keys__)
        for part in parts:
            taken |= set(inspect.signature(type(part).forward).parameters)
        unknown = sorted(set(inputs) - taken)
        if unknown:
            raise ValueError(
                f"{type(mllm).__name__} takes no {', '.join(unknown)}; leave it out, or check the spelling "
                f"(it takes {', '.join(sorted(taken - {'self', 'kwargs'}))})."
            )

    def select_tokens(self, inputs: Mapping[str, Any], columns: slice) -> dict[str, Any]:
        """The same inputs with some of the tokens: per-token inputs (B, T) are cut, all others are left as they are."""
        return {name: value[:, columns] if name in PER_TOKEN_INPUTS else value for name, value in inputs.items()}

    def select_rows(self, inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """The inputs of some of the samples, in this order; one may be there several times.

        Args:
            inputs: tensors of B samples with one image each; None stays None.
            rows: places in the batch.

        Returns:
            dict: the same names; B is now the number of rows.
        """
        taken: dict[str, Any] = {}
        for name, value in inputs.items():
            if value is not None and name in self.per_patch_inputs:
                images = value.split(inputs["image_grid_thw"].prod(-1).tolist())
                taken[name] = torch.cat([images[row] for row in rows])
            else:
                taken[name] = None if value is None else value[list(rows)]
        return taken

    def append_text(self, inputs: dict[str, Any], length: int) -> None:
        """Lengthen the token types by `length` tokens of text, in place; ids and attention mask are the caller's."""
        for name in TOKEN_TYPE_INPUTS:
            if name in inputs:
                types = torch.as_tensor(inputs[name])
                inputs[name] = torch.cat([types, types.new_zeros(len(types), length)], 1)  # (B, T + length)

    # -- image processor and processor -------------------------------------------------------------------------------

    def replace_image_token(self, processor: Any, image_inputs: Mapping[str, Any], image_idx: int) -> str:
        """What stands in the prompt for an image: its token once per image token, as the family's processor has it.

        Args:
            processor: a SegCompassProcessor, with the attributes of the family's own.
            image_inputs: what the image processor returned.
            image_idx: which of its images.

        Returns:
            str: the text that replaces `image_token`.

        Raises:
            ValueError: the family's processor does not say it in the transformers that is installed.
        """
        name = processor.mllm_type or self.model_types[0]
        family = processor_class_from_name(PROCESSOR_MAPPING_NAMES[name])
        if family.replace_image_token is ProcessorMixin.replace_image_token:
            raise ValueError(
                f"{family.__name__} of transformers {transformers_version} does not say which tokens stand for an "
                "image; install transformers>=5.15, where most families' processors do (docs/encoders.md)."
            )
        return family.replace_image_token(processor, image_inputs, image_idx)

    def seen_extent(self, image_processor: Any, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image that the MLLM sees: some image processors crop the centre.

        Args:
            image_processor: the MLLM's.
            width: of the image in pixels.
            height: of the image in pixels.

        Returns:
            (left, top, right, bottom) in pixels of the image.
        """
        view = self.image_view(image_processor)
        if view == "frame":  # the square that the image was padded to, beyond the image's edges
            return 0, 0, max(width, height), max(width, height)
        if view != "center_crop":
            return 0, 0, width, height
        scale = image_processor.size["shortest_edge"] / min(width, height)
        half_width = image_processor.crop_size["width"] / scale / 2
        half_height = image_processor.crop_size["height"] / scale / 2
        return width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height

    def image_view(self, image_processor: Any) -> str:
        """How the MLLM sees an image, as `Frame.place_patches` takes it.

        Args:
            image_processor: the MLLM's.

        Returns:
            str: a name in `image_encoder.IMAGE_VIEWS`.
        """
        if getattr(image_processor, "do_center_crop", False):
            return "center_crop"
        sides = dict(getattr(image_processor, "size", None) or {})
        if getattr(image_processor, "do_pad", False) and "longest_edge" in sides:
            return "frame"  # as SAM's: the longest side fills the square, the rest is padded right and below
        return "whole"

    def save_processor(self, processor: Any, folder: str | Path) -> None:
        """Save what AutoProcessor reads beside the bare MLLM, but for the tokenizer.

        Args:
            processor: a SegCompassProcessor.
            folder: the MLLM's folder.
        """
        processor.image_processor.save_pretrained(folder)  # AutoProcessor finds the class by the model's type


class Llava(Backbone):
    """LLaVA-1.5: a square grid of patches, its number fixed by the image processor."""

    model_types = ("llava",)
    processor_fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")

    def save_processor(self, processor: Any, folder: str | Path) -> None:
        """As the base class, with the settings that only a LlavaProcessor keeps."""
        family = processor_class_from_name(PROCESSOR_MAPPING_NAMES["llava"])
        settings = {name: getattr(processor, name) for name in self.processor_fields}
        family(
            processor.image_processor, processor.tokenizer, chat_template=processor.chat_template, **settings
        ).save_pretrained(folder)


class QwenVL(Backbone):
    """Qwen2.5-VL and its relatives: patches in the image's own aspect, `merge_size` squared of them in one token."""

    model_types = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5")
    image_token = "<|image_pad|>"
    returns_token_types = True
    notes_on_model = True  # `rope_deltas`, a prompt's position offsets
    per_patch_inputs = ("pixel_values",)
    projector_names = ("visual.merger",)


GENERIC = Backbone()
FAMILIES: dict[str, Backbone] = {name: family for family in (Llava(), QwenVL()) for name in family.model_types}


def backbone_of(source: Any) -> Backbone:
    """The family of an MLLM.

    Args:
        source: a SegCompassModel, an MLLM, the configuration of either, or a SegCompassProcessor.

    Returns:
        Backbone: the family's, or the generic one for a `model_type` that is not listed.
    """
    config = getattr(source, "config", source)
    config = getattr(config, "mllm_config", config)
    if hasattr(config, "model_type"):
        return FAMILIES.get(config.model_type, GENERIC)
    if source.mllm_type is not None:
        return FAMILIES.get(source.mllm_type, GENERIC)
    return FAMILIES["qwen2_5_vl" if hasattr(source.image_processor, "merge_size") else "llava"]
