"""From rows of a data set to what a rollout carries beside TRL's tensors: images, image keys and mask targets.

Rows follow the project's schema. Knows nothing about rewards or losses. `trainer` is the SegCompassGRPOTrainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from segcompass.loaders.identity import encoded_key
from segcompass.loaders.rows import row_image
from segcompass.modeling_segcompass.states import ReasoningStates

from .checks import check_masks
from .image_features import image_key
from .joint_forward import JointForward
from .targets import mask_targets

if TYPE_CHECKING:  # the trainer imports this file
    from .grpo_trainer import SegCompassGRPOTrainer

Row = Mapping[str, Any]


@dataclass
class Rollout:
    """One generation batch of B responses while TRL generates and scores it."""

    segmentation: dict[str, Any]
    """what joins TRL's batch: image_embeddings, mask_targets (lists of B tensors), reshaped_input_sizes (B, 2),
    patch_boxes (B, P, 4) and,
    once they are known, mask_scores (B,)."""
    images: list[Image.Image]
    """the image of each row, to be drawn on."""
    sample_ids: Sequence[str] = ()
    """the sample of each row, for what is said about it."""
    written: ReasoningStates | None = None
    """the states of the responses as they were generated, without the image; None with vLLM."""
    scoring_inputs: tuple[tuple, dict[str, Any]] | None = None
    """the tensors of TRL's last scoring pass: (positional arguments after the model, keyword arguments)."""
    scored: JointForward | None = None
    """the pass that decoded the masks to reward, where generation left no states."""


def decode_images(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with PIL images, each image decoded once: equal bytes, paths or pixels are one image, whatever its id.

    Args:
        rows: rows whose `image` has any form that `read_image` reads.

    Returns:
        As many rows.

    Raises:
        ValueError: an image is not of its row's size, or a row's masks cannot serve.
        OSError: an image cannot be read. The sample is named, as above.
    """
    images: dict[Any, Image.Image] = {}
    decoded = []
    for row in rows:
        key = encoded_key(row["image"])
        image = images.get(key) if key else None
        if image is None:
            image = row_image(row)
            image = images.setdefault(key or image_key(image), image)
        if image.size != (row["width"], row["height"]):
            row_image(row)  # which names the sizes
        check_masks(row)
        decoded.append({**row, "image": image})
    return decoded


def segmentation_batch(trainer: "SegCompassGRPOTrainer", rows: Sequence[Row]) -> dict[str, Any]:
    """Image keys and mask targets of the rows; the G responses of a prompt share theirs.

    Args:
        trainer: the trainer.
        rows: B rows as `decode_images` returns them.

    Returns:
        `image_embeddings`, B tensors (d_k, h, w); `reshaped_input_sizes`, long (B, 2); `patch_boxes`, float (B, P, 4);
        `mask_targets`, B tensors
        (G_i, s, s); all on the device.
    """
    config = trainer.core.config
    frame, side = config.frame, 4 * config.key_grid
    images = {id(row["image"]): row["image"] for row in rows}
    embedded = dict(zip(images, embed_images(trainer, list(images.values())), strict=True))
    targets: dict[tuple, Tensor] = {}
    for row in rows:
        if (key := _masks_key(row)) not in targets:
            target = mask_targets(row["masks"], row["height"], row["width"], frame, side)
            targets[key] = target.to(trainer.accelerator.device)
    embeddings, sizes = zip(*(embedded[id(row["image"])] for row in rows), strict=True)
    return {
        "image_embeddings": list(embeddings),
        "reshaped_input_sizes": torch.stack(sizes),  # (B, 2)
        "patch_boxes": trainer.processing_class.patch_boxes([row["image"] for row in rows]).to(sizes[0].device),
        "mask_targets": [targets[_masks_key(row)] for row in rows],
    }


@torch.no_grad()
def embed_images(trainer: "SegCompassGRPOTrainer", images: list[Image.Image]) -> list[tuple[Tensor, Tensor]]:
    """The image encoder's features of each image, encoded now or read from `args.image_features`.

    Args:
        trainer: the trainer.
        images: N distinct images.

    Returns:
        N pairs, on the device: image keys (d_k, h, w), and (H, W) inside the encoder's frame, long (2,).
    """
    core, device = trainer.core, trainer.accelerator.device
    if trainer.image_features is not None:
        inputs = trainer.image_features.inputs(images)
        return [
            (embedding.to(device), size.to(device))
            for embedding, size in zip(inputs["image_embeddings"], inputs["reshaped_input_sizes"], strict=True)
        ]
    if "get_image_embeddings" not in vars(core):
        register_fsdp_forward_method(core, "get_image_embeddings")  # gathers the weights under FSDP2, else nothing
    batch_size = trainer.args.per_device_train_batch_size
    pairs: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(images), batch_size):
        inputs = trainer.processing_class.encoder_inputs(images[start : start + batch_size])
        with trainer.accelerator.autocast():
            embeddings = core.get_image_embeddings(inputs["encoder_pixel_values"].to(device))  # (n, d_k, h, w)
        pairs += zip(embeddings, inputs["reshaped_input_sizes"].to(device), strict=True)
    return pairs


def _masks_key(row: Row) -> tuple:
    """What targets are made from and laid over; ids may repeat from data set to data set."""
    masks = tuple((tuple(mask["size"]), mask["counts"]) for mask in row["masks"])
    return id(row["image"]), row["height"], row["width"], masks
