"""What differs between families of MLLMs: this file knows LLaVA from Qwen, everybody else asks it.

    backbone_of(model).blocks(model.mllm)       # likewise of an MLLM, a configuration or a processor

transformers answers most questions in one way for all families (`get_decoder`, `get_encoder`, `image_token_id`, the
processor's `replace_image_token`), and `Backbone` is that way. A family that differs is a small class below and an
entry in `FAMILIES`. No family's model code is repeated here. It knows nothing about masks, concepts or training.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import PROCESSOR_NAME, TransformersKwargs

from .family_processor import known_obstacle, model_class, own_processor_class
from .patch_boxes import Box, View, grid_boxes, pad_boxes

PER_TOKEN_INPUTS = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
"""Inputs of shape (B, T), whatever the family; all others have one row per image or per patch."""

TOKEN_TYPE_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Per-token inputs that tell image tokens (1) from text (0)."""

PROJECTORS = ("multi_modal_projector", "connector", "aligner", "embed_vision", "visual.merger")
"""Where families have their projector, as a path from the MLLM without its head."""

ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Linear layers that choose experts."""


class Backbone:
    """A family of MLLMs, without weights: names, shapes and places. The defaults hold wherever transformers is uniform.

    Example:
        backbone = backbone_of(model)
        block = backbone.blocks(model.mllm)[model.config.sae_config.layer - 1]
        taken = backbone.mllm_inputs(model.mllm, inputs)
    """

    model_types: tuple[str, ...] = ()
    """`model_type` of the configurations that belong to the family."""
    image_token: str | None = None
    """the text that stands for an image in a prompt; None: the family's processor says it."""
    response_type = 0
    """the token type of a response."""
    notes_on_model = False
    """whether the MLLM notes something about the prompt on itself while it generates, so that one thread must wait for
    another."""
    processor_fields: tuple[str, ...] = ()
    """settings that the family's own processor keeps and `SegCompassProcessor` takes over under the same name."""
    one_grid = False
    """whether the image tokens are one grid over what the MLLM sees, so that positions can be told without the
    processor's `patch_boxes`."""

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
        return next((modules[name] for name in PROJECTORS if name in modules), None)

    def vision_names(self, mllm: PreTrainedModel) -> tuple[str, ...]:
        """Where all is that is not language: vision tower, projector and what lies between, by their weights' names.

        Args:
            mllm: transformers' model.

        Returns:
            tuple: prefixes of names in the MLLM.
        """
        core, decoder = self.without_head(mllm), self.language_model(mllm)
        start = next(f"{name}." if name else "" for name, module in mllm.named_modules() if module is core)
        names: list[str] = []
        while True:  # go down to the decoder, and take what stands beside the way
            inside = {name: any(module is decoder for module in part.modules()) for name, part in core.named_children()}
            names += [start + name for name, holds in inside.items() if not holds and name != "lm_head"]
            names += [start + name for name, _ in core.named_parameters(recurse=False)]
            way = next((name for name, holds in inside.items() if holds), None)
            if way is None or core.get_submodule(way) is decoder:
                return tuple(names)
            core, start = core.get_submodule(way), f"{start}{way}."

    def lora_targets(self, mllm: PreTrainedModel) -> str:
        """A regular expression of the decoder blocks' linear layers, by their names in a SegCompassModel.

        Routers of experts are left out: they choose, and a small change makes others be chosen.
        """
        blocks = self.blocks(mllm)
        name = next(name for name, module in mllm.named_modules() if module is blocks)
        linear = {part.rpartition(".")[2] for part, module in blocks.named_modules() if isinstance(module, nn.Linear)}
        leaves = "|".join(sorted(linear - ROUTERS))
        return rf".*mllm\.{re.escape(name)}\..*\.({leaves})"

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

    def seen_boxes(
        self, mllm_config: Any, input_ids: torch.Tensor, inputs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """Where the image tokens are on what the MLLM sees, told without the processor.

        Args:
            mllm_config: the MLLM's configuration.
            input_ids: long (B, T), one image per sample.
            inputs: the MLLM's other inputs.

        Returns:
            float (B, P, 4), (left, top, right, bottom) in fractions of what it sees.

        Raises:
            ValueError: in this family only the processor can say it.
        """
        if not self.one_grid:
            raise ValueError(
                f"patch_boxes is missing, and of {mllm_config.model_type} only the processor can say which part of "
                "the image each image token shows; pass all that the processor returns."
            )
        grids = self.patch_grid(mllm_config, input_ids, inputs).tolist()
        return pad_boxes([grid_boxes(*grid) for grid in grids]).to(input_ids.device)

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

    def split_rows(self, value: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor] | None:
        """Share out the rows of all images, one image after the other, in proportion to their image tokens.

        Args:
            value: (N, ...), patches or tiles of B images.
            counts: long (B,), image tokens of each.

        Returns:
            list: of B tensors; None where the rows do not divide, or an image would have none.
        """
        shares, total = counts * len(value), max(1, int(counts.sum()))
        sizes = (shares // total).tolist()
        return None if sum(sizes) != len(value) or 0 in sizes or (shares % total).any() else list(value.split(sizes))

    def select_rows(self, inputs: Mapping[str, Any], rows: Sequence[int], image_token_id: int) -> dict[str, Any]:
        """The inputs of some of the samples, in this order; one may be there several times.

        An input with one row per sample, whatever it is, is indexed; one with more is shared out by `split_rows`.

        Args:
            inputs: tensors of B samples with one image each; None stays None.
            rows: places in the batch.
            image_token_id: the MLLM's image token.

        Returns:
            dict: the same names; B is now the number of rows.

        Raises:
            ValueError: an input with rows that cannot be shared out.
        """
        counts = (inputs["input_ids"] == image_token_id).sum(1)  # (B,)
        taken: dict[str, Any] = {}
        for name, value in inputs.items():
            if value is None or len(value) == len(counts):
                taken[name] = None if value is None else value[list(rows)]
                continue
            parts = self.split_rows(value, counts)
            if parts is None:
                raise ValueError(
                    f"{name} has {len(value)} rows for {len(counts)} samples of {counts.tolist()} image tokens, so "
                    "that a sample's rows cannot be told; give the samples one by one."
                )
            taken[name] = torch.cat([parts[row] for row in rows])
        return taken

    def append_text(self, inputs: dict[str, Any], length: int) -> None:
        """Lengthen the token types by `length` tokens of a response, in place; ids and mask are the caller's."""
        for name in TOKEN_TYPE_INPUTS:
            if name in inputs:
                types = torch.as_tensor(inputs[name])
                inputs[name] = torch.cat([types, types.new_full((len(types), length), self.response_type)], 1)

    def mark_response(self, inputs: dict[str, Any], response_mask: torch.Tensor | None) -> None:
        """Set the token types of a response, in place: who lengthens them for all families (TRL) writes 0.

        Args:
            inputs: of the MLLM's forward.
            response_mask: bool (B, T), True at response tokens; None leaves them as they are.
        """
        for name in TOKEN_TYPE_INPUTS:
            types = inputs.get(name)
            if self.response_type and types is not None and response_mask is not None:
                inputs[name] = types.masked_fill(response_mask.to(types.device), self.response_type)

    # -- image processor and processor -------------------------------------------------------------------------------

    def obstacle(self, mllm_type: str) -> str | None:
        """Why an MLLM cannot be used, as far as transformers' own tables tell; a class below may stand in for them.

        Args:
            mllm_type: `model_type` of its configuration.

        Returns:
            The reason; None where nothing is known against it.
        """
        stands_in = type(self).replace_image_token is not Backbone.replace_image_token
        return None if stands_in else known_obstacle(mllm_type)

    def own_processor(self, processor: Any) -> Any:
        """The family's own processor around the same parts; None if transformers has none for it.

        Args:
            processor: a SegCompassProcessor.

        Returns:
            As `family_processor.own_processor_class` makes it.

        Raises:
            ValueError: its class cannot be used here, or lacks a setting.
        """
        name = processor.mllm_type or self.model_types[0]
        if (obstacle := self.obstacle(name)) is not None:
            raise ValueError(f"mllm_type={name!r} cannot be used: {obstacle}; see docs/families.md.")
        family = own_processor_class(name)
        if family is None:
            return None
        settings = {field: getattr(processor, field) for field in self.processor_fields}
        return family.around(processor.image_processor, processor.tokenizer, {**settings, **processor.family_settings})

    def replace_image_token(self, processor: Any, image_inputs: Mapping[str, Any], image_idx: int) -> str:
        """What stands in the prompt for an image, its token once per image token: as the family's processor has it.

        Args:
            processor: a SegCompassProcessor.
            image_inputs: what the image processor returned.
            image_idx: which of its images.

        Returns:
            str: the text that replaces `processor.image_token`.
        """
        processor.own.image_processor = processor.image_processor  # which may have been exchanged
        return processor.own.replace_image_token(image_inputs, image_idx=image_idx)

    def taken_inputs(self, mllm_type: str | None) -> frozenset[str] | None:
        """The inputs that the MLLM's forward names.

        Args:
            mllm_type: `model_type` of the MLLM's configuration; None = the first of `model_types`.

        Returns:
            Their names; None for an MLLM that transformers does not have.
        """
        kind = model_class(mllm_type or self.model_types[0])
        return None if kind is None else frozenset(inspect.signature(kind.forward).parameters)

    def prompt_types(self, processor: Any, input_ids: Sequence[Any]) -> list[list[int]]:
        """The token types of prompts, as the family's processor makes them: 1 at image tokens.

        Args:
            processor: a SegCompassProcessor.
            input_ids: of B prompts.

        Returns:
            list: of B lists.
        """
        return [[int(token == processor.image_token_id) for token in row] for row in input_ids]

    def image_boxes(
        self,
        processor: Any,
        image_inputs: Mapping[str, Any],
        image_idx: int,
        size: tuple[int, int],
        count: int,
        views: Callable[[], list[View]],
    ) -> torch.Tensor:
        """Which part of an image each of its tokens shows.

        Grids that the image processor names, or pictures whose tokens run row by row, one picture after the other.

        Args:
            processor: a SegCompassProcessor.
            image_inputs: what the image processor returned.
            image_idx: which of its images.
            size: of the image in pixels, (width, height).
            count: how many image tokens it has.
            views: says which part of the image each picture of it shows.

        Returns:
            float (count, 4), boxes of `patch_boxes`.

        Raises:
            ValueError: it cannot be told.
        """
        named = image_inputs.get("image_grid_thw")
        if named is not None:
            _, rows, columns = (int(n) for n in named[image_idx])
            return self._merged_grid(rows, columns, count)
        places = image_inputs.get("image_position_ids")
        if places is not None:
            columns, rows = (int(n) + 1 for n in torch.as_tensor(places[image_idx]).amax(0))
            return self._merged_grid(rows, columns, count)
        pictures = views()
        each, rest = divmod(count, len(pictures)) if pictures else (0, 1)
        boxes = []
        for view in pictures:
            columns = max(1, round(math.sqrt(each * view.width / view.height)))
            rest += each % columns
            boxes.append(grid_boxes(each // columns, columns, view.box))
        if rest or not each:
            raise ValueError(
                f"{processor.mllm_type or 'this MLLM'} has {count} image tokens for the {len(pictures)} pictures of an "
                f"image of {size[0]} x {size[1]} pixels: which token shows which part of the image cannot be told; "
                "choose an MLLM whose image tokens are patches."
            )
        return torch.cat(boxes)

    def _merged_grid(self, rows, columns, count):
        """The boxes of `count` tokens that each stand for a square of patches of a grid."""
        side = math.isqrt(rows * columns // max(1, count))
        if not side or rows % side or columns % side or rows * columns != count * side**2:
            raise ValueError(
                f"{count} image tokens do not divide a grid of {rows} x {columns} patches into squares; choose an MLLM "
                "whose image tokens are patches."
            )
        return grid_boxes(rows // side, columns // side)

    def largest_aspect(self, image_processor: Any) -> float:
        """How many times longer than wide an image may be, so that something of it is left at the MLLM's size.

        Args:
            image_processor: the MLLM's.

        Returns:
            float: the ratio of its sides, at most 200, which is Qwen's own limit.
        """
        sides = dict(getattr(image_processor, "size", None) or {})
        longest = sides.get("max_height") if self.image_view(image_processor) == "frame" else None
        return min(longest or 200, 200)  # the other side is rounded down

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
        if getattr(image_processor, "do_pad", False) and (sides.get("longest_edge") or sides.get("max_height")):
            return "frame"  # as SAM's: the longest side fills the square, the rest is padded right and below
        return "whole"

    def save_processor(self, processor: Any, folder: str | Path) -> None:
        """Save what AutoProcessor reads beside the bare MLLM, but for the tokenizer.

        Args:
            processor: a SegCompassProcessor.
            folder: the MLLM's folder.
        """
        processor.image_processor.save_pretrained(folder)  # AutoProcessor finds the class by the model's type
        if processor.family_settings:
            named = {"processor_class": type(processor.own).plain.__name__, **processor.family_settings}
            (Path(folder) / PROCESSOR_NAME).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


class Llava(Backbone):
    """LLaVA-1.5: a square grid of patches, its number fixed by the image processor."""

    model_types = ("llava",)
    processor_fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    one_grid = True

    def save_processor(self, processor: Any, folder: str | Path) -> None:
        """As the base class, with the settings that only a LlavaProcessor keeps."""
        family: Any = own_processor_class("llava")
        settings = {name: getattr(processor, name) for name in self.processor_fields}
        family.plain(
            processor.image_processor, processor.tokenizer, chat_template=processor.chat_template, **settings
        ).save_pretrained(folder)


class QwenVL(Backbone):
    """Qwen2.5-VL and its relatives: patches in the image's own aspect, `merge_size` squared of them in one token."""

    model_types = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5")
    image_token = "<|image_pad|>"
    notes_on_model = True  # `rope_deltas`, a prompt's position offsets
    one_grid = True


class Anyres(Backbone):
    """LLaVA-NeXT and LLaVA-OneVision: the whole image, then its tiles as one grid without their padding, each row of
    it followed by a token that shows nothing."""

    model_types = ("llava_next", "llava_onevision")

    def image_boxes(
        self,
        processor: Any,
        image_inputs: Mapping[str, Any],
        image_idx: int,
        size: tuple[int, int],
        count: int,
        views: Callable[[], list[View]],
    ) -> torch.Tensor:
        """See `Backbone.image_boxes`; rows and columns are the family's own count."""
        whole, *tiles = views()
        area = _around([tile.box for tile in tiles])
        first = tiles[0].box
        across, down = (round((area[n + 2] - area[n]) / (first[n + 2] - first[n])) for n in (0, 1))
        side = _patches_along(processor.own, whole.height)
        shown, rows = processor.own._get_unpadded_features(size[1], size[0], side, side, down, across)
        columns = shown // rows
        if len(tiles) != across * down or side**2 + rows * (columns + 1) != count:
            raise ValueError(
                f"{processor.mllm_type} has {count} image tokens where {side**2} + {rows} x ({columns} + 1) were "
                "expected; check the processor's patch_size or num_image_tokens."
            )
        left, top, right, bottom = area
        cell_x, cell_y = (right - left) / (across * side), (bottom - top) / (down * side)
        if size[0] * down > size[1] * across:  # padded above and below
            cut = (down * side - int(round(size[1] * across * side / size[0], 7))) // 2
            top, bottom = top + cut * cell_y, bottom - cut * cell_y
        else:
            cut = (across * side - int(round(size[0] * down * side / size[1], 7))) // 2
            left, right = left + cut * cell_x, right - cut * cell_x
        lines = grid_boxes(rows, columns, (left, top, right, bottom)).view(rows, columns, 4)
        lines = torch.cat([lines, lines.new_zeros(rows, 1, 4)], 1)  # the end of a row
        return torch.cat([grid_boxes(side, side, whole.box), lines.flatten(0, 1)])


def _around(boxes: Sequence[Any]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _patches_along(own: Any, side: int) -> int:
    """Patches along a picture's side, by whichever of its settings the family's processor has."""
    patch_size = getattr(own, "patch_size", None)
    return side // patch_size if patch_size else math.isqrt(own.num_image_tokens)


class PaliGemma(Backbone):
    """PaliGemma: all of the prompt sees all of it, and only a response (type 1) is read from left to right."""

    model_types = ("paligemma",)
    response_type = 1

    def prompt_types(self, processor: Any, input_ids: Sequence[Any]) -> list[list[int]]:
        """0 everywhere."""
        return [[0] * len(row) for row in input_ids]


GENERIC = Backbone()
FAMILIES: dict[str, Backbone] = {
    name: family for family in (Llava(), QwenVL(), Anyres(), PaliGemma()) for name in family.model_types
}


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
