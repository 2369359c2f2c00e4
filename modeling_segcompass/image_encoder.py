"""F_enc, the frozen image encoder that gives the image keys K: this file knows SAM's, everybody else asks it.

    encoder_of(config).encode(model.image_encoder, pixels)      # K, float (B, d_k, h, w)

Another encoder is a subclass of `ImageEncoder` with the answers that differ, and an entry in `ENCODERS`. Where the
image lies in the encoder's square input is its `Frame`: keys, heatmaps, masks and their targets are all laid over it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel, SamImageProcessorPil, SamVisionModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from .sam_weights import read_sam
from .saved_folders import check_loaded

DEFAULT_ENCODER = "sam_vision_model"
"""`model_type` of the encoder of a configuration that names none."""


IMAGE_VIEWS = ("whole", "center_crop", "center_pad", "frame")
"""How an MLLM sees an image: all of it, in whatever aspect; the square in its middle; all of it in the middle of a
square; or as the image encoder does, in a square's top left corner."""


class Frame(NamedTuple):
    """F_enc's square input: the image's longest side becomes `side` pixels, the rest is padded right and bottom.

    Example:
        frame = Frame(1024)
        frame.reshaped_size(480, 640)                           # (768, 1024)
        frame.valid_extent(torch.tensor([[768, 1024]]), 64)     # [[48, 64]] of 64 x 64 cells
    """

    side: int
    """in pixels."""

    def reshaped_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of an image inside the frame, rounded to whole pixels."""
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
        """
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


class ImageEncoder:
    """A kind of image encoder, without weights. The defaults hold for a transformer of square patches.

    Example:
        encoder = encoder_of(model)
        keys = encoder.encode(model.image_encoder, inputs["encoder_pixel_values"])  # (B, d_k, h, w)
        channels, grid = encoder.channels(config), encoder.key_grid(config)         # 256, 64 for SAM
    """

    model_types: tuple[str, ...] = ()
    """`model_type` of the configurations it is built from, and of the models it is taken out of."""
    model_class: Any = None
    """its class in transformers."""

    def build(self, config: Any) -> PreTrainedModel:
        """The encoder with random weights."""
        return self.model_class._from_config(config)

    def load(
        self, source: str | PreTrainedModel, dtype: str | torch.dtype
    ) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """The encoder with its weights, and what the mask decoder can start from: see `load_image_encoder`."""
        if not isinstance(source, str):
            return source, {}
        loaded: Any = self.model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
        encoder, info = loaded
        check_loaded(encoder, info, source, unexpected=False)
        return encoder, {}

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

    def key_grid(self, config: Any) -> int:
        """Side of the square grid of image keys: 64 for SAM at 1024 pixels."""
        return config.image_size // config.patch_size

    def frame(self, config: Any) -> Frame:
        """Where the image lies in the encoder's input."""
        return Frame(config.image_size)


class SamEncoder(ImageEncoder):
    """The vision encoder of SAM (ViT-B, L or H) as transformers has it."""

    model_types = ("sam_vision_model", "sam")
    model_class = SamVisionModel

    def load(
        self, source: str | PreTrainedModel, dtype: str | torch.dtype
    ) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """Also out of a whole SAM, whose other weights start the mask decoder, and out of an original `.pth` file."""
        return read_sam(source, dtype)

    def encode(self, encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Image keys K: SAM gives them as a grid, float (B, d_k, h, w)."""
        return encoder(pixels.to(encoder.dtype)).last_hidden_state

    def channels(self, config: Any) -> int:
        """d_k, the width that SAM's neck leaves."""
        return config.output_channels


ENCODERS: dict[str, ImageEncoder] = {name: encoder for encoder in (SamEncoder(),) for name in encoder.model_types}


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
    source: str | PreTrainedModel, dtype: str | torch.dtype = "float32"
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """An image encoder with its weights.

    Args:
        source: model id, folder or loaded model; also an original segment-anything `.pth` file.
        dtype: of what is loaded here; "auto" keeps the checkpoint's own.

    Returns:
        tuple: the encoder, and the weights that the mask decoder can start from, {} when there are none.

    Raises:
        ValueError: an encoder of an unknown kind, or weights that do not fit it.
    """
    if not isinstance(source, str):
        encoder = _known(source.config.model_type, type(source).__name__)
    elif Path(source).suffix == ".pth":
        encoder = ENCODERS["sam"]
    else:
        encoder = _known(AutoConfig.from_pretrained(source).model_type, repr(source))
    return encoder.load(source, dtype)


def image_processor_of(source: str) -> Any:
    """What prepares images for an encoder, for a SegCompassProcessor's `encoder_image_processor`; no weights are read.

    Args:
        source: as for `load_image_encoder`.

    Returns:
        an image processor in PIL, at the side that the encoder takes.

    Raises:
        ValueError: an encoder of an unknown kind.
        OSError: there is no such folder or repository.
    """
    if Path(source).suffix == ".pth":
        return SamImageProcessorPil()
    config = AutoConfig.from_pretrained(source)
    _known(config.model_type, repr(source))
    side = getattr(config, "vision_config", config).image_size
    own = {"size": {"longest_edge": side}, "pad_size": {"height": side, "width": side}}
    return SamImageProcessorPil.from_dict({**get_image_processor_config(source), **own})


def image_side(image_processor: Any) -> int:
    """S, the side in pixels of the frame that the encoder's image processor makes."""
    return image_processor.size["longest_edge"]


def without_torchvision(image_processor: dict[str, Any]) -> dict[str, Any]:
    """The settings of a saved image processor, in its PIL form: the same pixels with and without torchvision."""
    name = image_processor.get("image_processor_type", "")
    return {**image_processor, "image_processor_type": f"{name.removesuffix('Fast').removesuffix('Pil')}Pil"}


def _known(model_type, name):
    if model_type not in ENCODERS:
        raise ValueError(
            f"{name} is of type {model_type!r}, which is no image encoder known here; choose a SAM "
            "(facebook/sam-vit-base, -large or -huge, or one of the original .pth files)."
        )
    return ENCODERS[model_type]
