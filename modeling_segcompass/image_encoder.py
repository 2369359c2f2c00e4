"""F_enc, the frozen image encoder that gives the image keys K: this file knows SAM from DINO, everybody else asks it.

    encoder_of(config).encode(model.image_encoder, pixels)      # K, float (B, d_k, h, w)
    image_processor_of("facebook/sam2.1-hiera-small")           # what prepares the pixels, without torchvision

Another encoder is a subclass of `ImageEncoder` (or of `TokenEncoder`) with the answers that differ, and an entry in
`ENCODERS`. Where the image lies in the encoder's square input is its `Frame`: keys, heatmaps, masks and their targets
are all laid over it.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from .patch_boxes import has_area, snapped
from .sam_weights import read_original_sam, take_apart
from .saved_folders import HUB_KEYWORDS, check_loaded

logger = logging.getLogger(__name__)

DEFAULT_ENCODER = "sam_vision_model"
"""`model_type` of the encoder of a configuration that names none."""

IMAGE_VIEWS = ("whole", "center_crop", "center_pad", "frame")
"""How an MLLM sees an image: all of it, in whatever aspect; the square in its middle; all of it in the middle of a
square; or as the image encoder does, in a square's top left corner."""

DINOV3_TERMS = "DINOv3 is under Meta's own DINOv3 License, and the Hub asks for access before it is loaded."

FAR = -1e3
"""Where a patch is laid that shows nothing, so that no cell takes it for the nearest."""

NORMALISATION = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor")
"""Settings of a repository's own image processor that are kept; where the image lies is decided here."""


class Frame(NamedTuple):
    """F_enc's square input: the image's longest side becomes `side` pixels, the rest is padded right and bottom.

    Or, `stretched`, the image fills the square, whatever its aspect.

    Example:
        frame = Frame(1024)
        frame.reshaped_size(480, 640)                           # (768, 1024)
        frame.valid_extent(torch.tensor([[768, 1024]]), 64)     # [[48, 64]] of 64 x 64 cells
    """

    side: int
    """in pixels."""
    stretched: bool = False
    """whether height and width are scaled apart, so that nothing is padded."""

    def reshaped_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of an image inside the frame, rounded to whole pixels."""
        if self.stretched:
            return self.side, self.side
        scale = self.side / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def valid_extent(self, reshaped_sizes: torch.Tensor, grid_size: int) -> torch.Tensor:
        """The unpadded part of a grid laid over the frame: a cell counts when some of it is image.

        Args:
            reshaped_sizes: long (B, 2), (H, W) inside the frame.
            grid_size: side of the grid in cells.

        Returns:
            long (B, 2), (rows, columns).
        """
        return (reshaped_sizes * grid_size + self.side - 1) // self.side

    def cell_mask(self, reshaped_sizes: torch.Tensor, grid_size: int) -> torch.Tensor:
        """The unpadded cells of a grid laid over the frame.

        Args:
            reshaped_sizes: long (B, 2), (H, W) inside the frame.
            grid_size: side of the grid in cells.

        Returns:
            bool (B, grid_size, grid_size), False where the frame is padding.
        """
        extent = self.valid_extent(reshaped_sizes, grid_size)
        cells = torch.arange(grid_size, device=extent.device)
        return (cells < extent[:, :1])[:, :, None] & (cells < extent[:, 1:])[:, None]  # (B, h, w)

    def place_patches(
        self, patch_xy: torch.Tensor, reshaped_sizes: torch.Tensor | None, view: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lay the MLLM's patches over the frame.

        Args:
            patch_xy: float (B, P, 2), (x, y) of the patches' centres on what the MLLM sees, in [0, 1].
            reshaped_sizes: long (B, 2), (H, W) of the image inside the frame; None = the whole frame.
            view: one of IMAGE_VIEWS.

        Returns:
            The centres on the frame, float (B, P, 2), in units of its side; how large what the MLLM sees is there,
            float (B, 1, 2), (width, height); and the patches whose centre lies on the image, bool (B, P). Of an image
            so narrow that no centre lies on it, the nearest row or column counts.

        Raises:
            ValueError: the MLLM sees a square of the image, but the frame is stretched and its aspect forgotten.
        """
        if self.stretched and view != "whole":
            raise ValueError(
                f"the image encoder stretches the image and the MLLM sees it as {view!r}, so that nobody knows where "
                "its patches are; choose an image encoder that pads (SAM, SAM-HQ, DINO), or an MLLM that sees the "
                "whole image."
            )
        image = torch.ones_like(patch_xy[:, :1])  # (B, 1, 2) width and height
        if reshaped_sizes is not None:
            image = reshaped_sizes.to(patch_xy.device).flip(-1)[:, None].to(patch_xy.dtype) / self.side
        seen = {
            "whole": image,
            "center_crop": image.amin(-1, keepdim=True).expand_as(image),
            "center_pad": image.amax(-1, keepdim=True).expand_as(image),
            "frame": torch.ones_like(image),
        }[view]
        start = (image - seen) / 2 if view.startswith("center") else torch.zeros_like(image)
        xy = start + patch_xy * seen
        outside = torch.relu(xy - image) + torch.relu(-xy)  # (B, P, 2)
        return xy, seen, (outside <= outside.amin(1, keepdim=True)).all(-1)

    def place_boxes(
        self, boxes: torch.Tensor, reshaped_sizes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lay parts of the image over the frame.

        Args:
            boxes: float (B, P, 4), as in `patch_boxes.py`.
            reshaped_sizes: long (B, 2), (H, W) of the image inside the frame; None = the whole frame.

        Returns:
            In units of the frame's side, the boxes' centres (x, y), float (B, P, 2), and their width and height, float
            (B, P, 2); and which of them count, bool (B, P): they show something, and their centre lies on the image as
            in `place_patches`. A box that shows nothing lies far off and is 1 wide and high.
        """
        shown = has_area(boxes)
        centres = ((boxes[..., :2] + boxes[..., 2:]) / 2).masked_fill(~shown[..., None], FAR)  # (B, P, 2)
        xy, image, on_image = self.place_patches(centres, reshaped_sizes, "whole")
        sizes = snapped((boxes[..., 2:] - boxes[..., :2]) * image).masked_fill(~shown[..., None], 1)
        return snapped(xy), sizes, on_image & shown


class ImageEncoder:
    """A kind of image encoder, without weights. The defaults hold for a transformer of square patches.

    Example:
        encoder = encoder_of(model)
        keys = encoder.encode(model.image_encoder, inputs["encoder_pixel_values"])  # (B, d_k, h, w)
        channels, grid = encoder.channels(config), encoder.key_grid(config)         # 256, 64 for SAM
    """

    model_types: tuple[str, ...] = ()
    """`model_type` of the configurations it is built from."""
    model_class = ""
    """its class in transformers, by name, so that nothing is imported before it is needed."""
    whole_classes: Mapping[str, str] = {}
    """`model_type` of larger models that hold it as `vision_encoder` -> the class that reads their weights."""
    terms = ""
    """what must be said to whoever loads its published weights; empty for Apache-2.0."""
    stretched = False
    """whether it was trained on images that fill its square whatever their aspect, rather than on padded ones."""
    image_mean = IMAGENET_DEFAULT_MEAN
    """of the pixels it was trained on, per channel, after scaling to [0, 1]."""
    image_std = IMAGENET_DEFAULT_STD
    """their standard deviation."""

    def build(self, config: Any) -> PreTrainedModel:
        """The encoder with random weights."""
        return _transformers_class(self.model_class)._from_config(config)

    def load(self, source: str | PreTrainedModel, **keywords: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """The encoder with its weights, and what the mask decoder can start from: see `load_image_encoder`."""
        model: Any = source
        if isinstance(source, str):
            if self.terms and not Path(source).is_dir():
                logger.warning("%s: %s", source, self.terms)
            name = self.whole_classes.get(_read_config(source, keywords).model_type, self.model_class)
            keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loaded` refuses them
            model, info = _transformers_class(name).from_pretrained(source, **keywords)
            check_loaded(model, info, source, unexpected=False)
        encoder_class = _transformers_class(self.model_class)
        return (model, {}) if isinstance(model, encoder_class) else take_apart(model, encoder_class)

    def encode(self, encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Image keys K.

        Args:
            encoder: as `build` makes it.
            pixels: float (B, 3, S, S), as its image processor makes them.

        Returns:
            float (B, d_k, h, w).
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode(encoder, pixels).")

    def channels(self, config: Any) -> int:
        """d_k, the width of the image keys."""
        return config.hidden_size

    def side(self, config: Any) -> int:
        """S, the side in pixels of the square input."""
        return _square(config.image_size, "image_size")

    def stride(self, config: Any) -> int:
        """The side in pixels of the square that one key stands for."""
        return _square(config.patch_size, "patch_size")

    def key_grid(self, config: Any) -> int:
        """Side of the square grid of image keys: 64 for SAM at 1024 pixels.

        Args:
            config: the encoder's configuration.

        Returns:
            int: in keys.

        Raises:
            ValueError: the keys would not cover the input, which is no whole multiple of their stride.
        """
        side, stride = self.side(config), self.stride(config)
        if side % stride:
            raise ValueError(
                f"the image encoder's input has {side} pixels a side, which is no multiple of its stride of {stride}; "
                f"set image_size in its configuration to {side - side % stride} or {side + stride - side % stride}."
            )
        return side // stride

    def frame(self, config: Any) -> Frame:
        """Where the image lies in the encoder's input."""
        return Frame(self.side(config), self.stretched)

    def image_processor(self, config: Any, **normalisation: Any) -> Any:
        """What prepares images for the encoder: transformers' own, in PIL.

        Args:
            config: the encoder's configuration.
            **normalisation: settings named in NORMALISATION, where they differ from the kind's.

        Returns:
            An image processor whose `pixel_values` are float (B, 3, S, S).
        """
        side = self.side(config)
        square = {"height": side, "width": side}
        normalisation = {"image_mean": self.image_mean, "image_std": self.image_std, **normalisation}
        if self.stretched:
            return ViTImageProcessorPil(size=square, **normalisation)
        return SamImageProcessorPil(size={"longest_edge": side}, pad_size=square, **normalisation)


class SamEncoder(ImageEncoder):
    """The vision encoder of SAM (ViT-B, L or H) as transformers has it."""

    model_types = ("sam_vision_model",)
    model_class = "SamVisionModel"
    whole_classes = {"sam": "SamModel"}

    def load(self, source: str | PreTrainedModel, **keywords: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """Also out of an original `.pth` file."""
        if isinstance(source, str) and Path(source).suffix == ".pth":
            return read_original_sam(source, keywords.get("dtype", "auto"))
        return super().load(source, **keywords)

    def encode(self, encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Image keys K: SAM gives them as a grid, float (B, d_k, h, w)."""
        return encoder(pixels.to(encoder.dtype)).last_hidden_state

    def channels(self, config: Any) -> int:
        """d_k, the width that SAM's neck leaves."""
        return config.output_channels


class SamHQEncoder(SamEncoder):
    """The vision encoder of SAM-HQ: SAM's, trained on."""

    model_types = ("sam_hq_vision_model",)
    model_class = "SamHQVisionModel"
    whole_classes = {"sam_hq": "SamHQModel"}


class Sam2Encoder(ImageEncoder):
    """The vision encoder of SAM 2 and 2.1 (Hiera). The keys are those that SAM 2's own mask decoder reads."""

    model_types = ("sam2_vision_model",)
    model_class = "Sam2VisionModel"
    whole_classes = {"sam2": "Sam2Model", "sam2_video": "Sam2Model"}
    stretched = True

    def encode(self, encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Image keys K: the coarsest level that the neck leaves, float (B, d_k, h, w)."""
        return encoder(pixels.to(encoder.dtype)).fpn_hidden_states[-1]

    def channels(self, config: Any) -> int:
        """d_k, the width that the neck leaves."""
        return config.fpn_hidden_size

    def side(self, config: Any) -> int:
        """S, as Hiera's configuration has it."""
        return _square(config.backbone_config.image_size, "image_size")

    def stride(self, config: Any) -> int:
        """The patches' stride, and that of the poolings between the levels."""
        hiera = config.backbone_config
        pooling = _square(hiera.query_stride, "query_stride") ** (config.num_feature_levels - 1)
        return _square(hiera.patch_stride, "patch_stride") * pooling


class Sam3Encoder(ImageEncoder):
    """The vision encoder of SAM 3, with the neck of its tracker, whose mask decoder reads the same keys."""

    model_types = ("sam3_vision_model",)
    model_class = "Sam3VisionModel"
    terms = "SAM 3 is under Meta's own SAM License, and the Hub asks for access before it is loaded."
    whole_classes = {"sam3": "Sam3Model", "sam3_tracker": "Sam3TrackerModel", "sam3_video": "Sam3TrackerModel"}
    stretched = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD

    def encode(self, encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Image keys K: the level at the patches' own resolution, float (B, d_k, h, w)."""
        levels = encoder(pixels.to(encoder.dtype)).fpn_hidden_states
        return levels[encoder.config.scale_factors.index(1.0)]

    def channels(self, config: Any) -> int:
        """d_k, the width that the neck leaves."""
        return config.fpn_hidden_size

    def side(self, config: Any) -> int:
        """S, as the ViT's configuration has it."""
        return _square(config.backbone_config.image_size, "image_size")

    def stride(self, config: Any) -> int:
        """The ViT's patches."""
        return _square(config.backbone_config.patch_size, "patch_size")


class TokenEncoder(ImageEncoder):
    """A transformer whose last states are one token per patch, row by row, after tokens of the whole image."""

    def tokens_before(self, config: Any) -> int:
        """How many tokens stand before the patches: a class token and the registers."""
        return 1 + getattr(config, "num_register_tokens", 0)

    def encode(self, encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Image keys K, float (B, d_k, h, w)."""
        states = encoder(pixels.to(encoder.dtype)).last_hidden_state[:, self.tokens_before(encoder.config) :]
        side = math.isqrt(states.shape[1])
        return states.mT.unflatten(2, (side, -1))  # (B, h·w, d_k) -> (B, d_k, h, w)


class Dinov2Encoder(TokenEncoder):
    """DINOv2's patch features."""

    model_types = ("dinov2",)
    model_class = "Dinov2Model"


class Dinov2RegistersEncoder(TokenEncoder):
    """Patch features of DINOv2 with registers."""

    model_types = ("dinov2_with_registers",)
    model_class = "Dinov2WithRegistersModel"


class Dinov3Encoder(TokenEncoder):
    """Patch features of DINOv3's ViTs, which read any size: `image_size` of the configuration decides."""

    model_types = ("dinov3_vit",)
    model_class = "DINOv3ViTModel"
    terms = DINOV3_TERMS


class Dinov3ConvNextEncoder(TokenEncoder):
    """The last stage of DINOv3's ConvNeXts, which read any size: `image_size` of the configuration decides."""

    model_types = ("dinov3_convnext",)
    model_class = "DINOv3ConvNextModel"
    terms = DINOV3_TERMS

    def channels(self, config: Any) -> int:
        """d_k, the last stage's width."""
        return config.hidden_sizes[-1]

    def stride(self, config: Any) -> int:
        """Four pixels of the stem, doubled by each further stage."""
        return 2 ** (len(config.hidden_sizes) + 1)


KINDS = (
    SamEncoder(),
    SamHQEncoder(),
    Sam2Encoder(),
    Sam3Encoder(),
    Dinov2Encoder(),
    Dinov2RegistersEncoder(),
    Dinov3Encoder(),
    Dinov3ConvNextEncoder(),
)
ENCODERS: dict[str, ImageEncoder] = {name: kind for kind in KINDS for name in (*kind.model_types, *kind.whole_classes)}
"""`model_type` of an encoder, or of a larger model that holds one -> its kind."""


def encoder_of(source: Any) -> ImageEncoder:
    """What is known about an image encoder.

    Args:
        source: a SegCompassModel, its configuration, an image encoder, or its configuration.

    Returns:
        ImageEncoder: the answers for its kind.

    Raises:
        ValueError: an encoder of an unknown kind.
    """
    config = getattr(source, "config", source)
    config = getattr(config, "image_encoder_config", config)
    return _known(config.model_type, f"the image encoder ({type(config).__name__})")


def load_image_encoder(
    source: str | PreTrainedModel, **keywords: Any
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """An image encoder with its weights.

    Args:
        source: model id, folder or loaded model, of an encoder or of a larger model that holds one; also an original
            segment-anything `.pth` file.
        **keywords: as transformers' `from_pretrained`, for what is loaded here.

    Returns:
        tuple: the encoder, and the weights that the mask decoder can start from, {} when there are none.

    Raises:
        ValueError: an encoder of an unknown kind, or weights that do not fit it.
        OSError: nothing there, or behind a gate: the Hub's own error says which licence to accept.
    """
    if not isinstance(source, str):
        encoder = _known(source.config.model_type, type(source).__name__)
    elif Path(source).suffix == ".pth":
        encoder = ENCODERS["sam"]
    else:
        encoder = _known(_read_config(source, keywords).model_type, repr(source))
    return encoder.load(source, **keywords)


def image_processor_of(source: Any, **keywords: Any) -> Any:
    """What prepares images for an encoder, for a SegCompassProcessor's `encoder_image_processor`; no weights are read.

    Mean and standard deviation are the repository's own where it has an image processor, and otherwise the kind's.

    Args:
        source: as for `load_image_encoder`, or a configuration.
        **keywords: how to reach the Hub, as of transformers' `from_pretrained`.

    Returns:
        An image processor in PIL, whose `pixel_values` are float (B, 3, S, S).

    Raises:
        ValueError: an encoder of an unknown kind.
        OSError: there is no such folder or repository.

    Example:
        images = image_processor_of("facebook/sam2.1-hiera-small")
        processor = SegCompassProcessor(mllm.image_processor, mllm.tokenizer, images, mllm.chat_template)
    """
    if isinstance(source, str) and Path(source).suffix == ".pth":
        return SamImageProcessorPil()  # all the original files were trained at 1024 pixels
    config = _read_config(source, keywords) if isinstance(source, str) else getattr(source, "config", source)
    encoder = _known(config.model_type, repr(source) if isinstance(source, str) else type(source).__name__)
    config = getattr(config, "tracker_config", config)
    return encoder.image_processor(
        getattr(config, "vision_config", config),
        **(_own_normalisation(source, keywords) if isinstance(source, str) else {}),
    )


def prepare_pixels(image_processor: Any, images: Sequence[Any]) -> torch.Tensor:
    """What an encoder's image processor makes of images, bit for bit, in a third of the time.

    transformers' own classes rescale and normalise each pixel in double precision, by way of several copies; there are
    but 256 levels, whose values are asked of the image processor once and looked up.

    Args:
        image_processor: the image encoder's, of any class; of classes other than the two that `image_processor_of`
            makes it is simply called.
        images: PIL images of mode "RGB".

    Returns:
        float (B, 3, S, S), its `pixel_values`.
    """
    known = type(image_processor) in (SamImageProcessorPil, ViTImageProcessorPil)
    if not known or not (image_processor.do_rescale and image_processor.do_normalize):
        return image_processor(images, return_tensors="pt")["pixel_values"]
    resample = image_processor.resample
    if image_processor.do_resize and isinstance(resample, int):  # before Pillow's pixels become an array's
        frame = frame_of(image_processor)
        sizes = [frame.reshaped_size(image.height, image.width) for image in images]
        images = [image.resize(size[::-1], resample) for image, size in zip(images, sizes, strict=True)]
    made = image_processor(images, return_tensors="np", do_rescale=False, do_normalize=False)
    every = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))  # a picture of all levels, in each channel
    rescaled = image_processor.rescale(every, image_processor.rescale_factor)
    values = image_processor.normalize(rescaled, image_processor.image_mean, image_processor.image_std)
    values = values[:, 0]  # (3, 1, 256) -> (3, 256)
    pixels = np.empty(made["pixel_values"].shape, np.float32)  # (B, 3, S, S)
    for levels, looked_up in zip(made["pixel_values"], pixels, strict=True):
        for channel in range(3):
            np.take(values[channel], levels[channel], out=looked_up[channel], mode="clip")
    for padded, (height, width) in zip(pixels, made.get("reshaped_input_sizes", ()), strict=False):
        padded[:, height:], padded[:, :, width:] = 0, 0  # SAM's pads after it has normalised
    return torch.from_numpy(pixels)


def frame_of(image_processor: Any) -> Frame:
    """Where an encoder's image processor puts the image.

    Args:
        image_processor: one that pads as SAM's does, or stretches to a square.

    Returns:
        Frame: in the pixels that the encoder reads.

    Raises:
        ValueError: it does something else, such as cropping.
    """
    settings = {name: getattr(image_processor, name, None) for name in ("size", "do_pad", "pad_size", "do_center_crop")}
    size, pad_size = (dict(settings[name] or {}) for name in ("size", "pad_size"))
    sides = [size.get("height"), size.get("width")]
    if not settings["do_center_crop"]:
        if settings["do_pad"] and size.get("longest_edge"):
            side = size["longest_edge"]
            if [pad_size.get("height"), pad_size.get("width")] == [side, side]:
                return Frame(side)
        elif sides[0] and sides[0] == sides[1]:
            return Frame(sides[0], stretched=True)
    shown = ", ".join(f"{name}={value}" for name, value in settings.items() if value)
    raise ValueError(
        f"the image encoder's image processor ({type(image_processor).__name__}) has {shown}; it must scale the "
        "longest side and pad to a square of that side, as SAM's does, or resize to a square: make one with "
        "image_processor_of(<the encoder>)."
    )


def check_frame(config: Any, image_processor: Any) -> None:
    """Refuse an image processor that puts images elsewhere than the encoder expects them.

    Args:
        config: SegCompassConfig.
        image_processor: the image encoder's.

    Raises:
        ValueError: it makes another side, or pads where the encoder's images are stretched, or the reverse.
    """
    wanted, made = config.frame, frame_of(image_processor)
    if wanted != made:
        said = [f"{frame.side} pixels, {'stretched' if frame.stretched else 'padded'}" for frame in (made, wanted)]
        raise ValueError(
            f"the processor makes images of {said[0]}, but the image encoder "
            f"({config.image_encoder_config.model_type}) reads {said[1]}; give the processor "
            "encoder_image_processor=image_processor_of(<the encoder>), or set image_size in the encoder's "
            "configuration."
        )


def check_keys(config: Any, keys: torch.Tensor) -> torch.Tensor:
    """The image keys as they are, if they have the width and the grid that the configuration says.

    Args:
        config: SegCompassConfig.
        keys: float (B, d_k, h, w), from `ImageEncoder.encode`.

    Returns:
        The same.

    Raises:
        ValueError: the encoder was given pixels of another size, or has no spatial map of this shape.
    """
    grid = config.key_grid
    if keys.shape[1:] != (config.key_channels, grid, grid):
        raise ValueError(
            f"the image encoder gave keys of shape {tuple(keys.shape)}, where (B, {config.key_channels}, {grid}, "
            f"{grid}) is needed; give it images of {config.frame.side} x {config.frame.side} pixels, as the "
            "processor makes them."
        )
    return keys


def without_torchvision(image_processor: dict[str, Any]) -> dict[str, Any]:
    """The settings of a saved image processor, in its PIL form: the same pixels with and without torchvision."""
    name = image_processor.get("image_processor_type", "")
    return {**image_processor, "image_processor_type": f"{name.removesuffix('Fast').removesuffix('Pil')}Pil"}


def _read_config(source, keywords):
    """The configuration in a folder or on the Hub."""
    known = (*HUB_KEYWORDS, "revision", "subfolder")
    return AutoConfig.from_pretrained(source, **{name: keywords[name] for name in known if name in keywords})


def _own_normalisation(source, keywords):
    """Of a repository's own image processor, the settings that NORMALISATION names; {} where it has none."""
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):  # as transformers looks for them
        path = cached_file(source, name, **keywords, **lenient)
        if path is not None:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
            settings = settings.get("image_processor", settings)
            found = {name: settings[name] for name in NORMALISATION if settings.get(name) is not None}
            if found:
                return found
    return {}


def _transformers_class(name):
    """A class of transformers by its name. Raises ValueError where the installed version has none."""
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {name}, which this image encoder needs; install a later "
            "version, or choose a SAM."
        )
    return found


def _square(size, name):
    """The side of a square that a configuration gives as a number or as (height, width). Raises ValueError."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"the image encoder's {name} is {tuple(size)}; only squares are supported.")
    return size[0]


def _known(model_type, name):
    if model_type not in ENCODERS:
        raise ValueError(
            f"{name} is of type {model_type!r}, which is no image encoder known here; one that gives a spatial map is "
            "needed: SAM, SAM-HQ, SAM 2 or 2.1, SAM 3, DINOv2 or DINOv3 (docs/encoders.md), or one of the original "
            "segment-anything .pth files."
        )
    return ENCODERS[model_type]
