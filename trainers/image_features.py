"""Features of the frozen image encoder on disk: encoded once, read from then on by trainers and evaluators.

A cache is a folder: `cache.json` says whose features these are, and each `shard-00000.npy`, float16 and memory-mapped,
has a `shard-00000.json` beside it that lists the images in it, written only once the shard is whole. A run that was
killed therefore leaves whole shards and, at worst, one unfinished file, which the next run deletes. Images are known
by what they show (a hash of their pixels), so a data set may rename, repeat or re-encode its files.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from segcompass.loaders.folder_lock import give_folder, take_folder
from segcompass.modeling_segcompass.image_encoder import Frame, encoder_of
from segcompass.modeling_segcompass.whole_files import read_signed_json, signed_json, write_whole

META = "cache.json"
FORMAT = 1


def image_key(image: Image.Image) -> str:
    """What an image shows, as 32 hex digits: a hash of its size and RGB pixels."""
    image = image.convert("RGB")
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def encoder_id(image_encoder: Any, encoder_image_processor: Any) -> str:
    """Which encoder makes the features: a hash of its weights, its shape and how images are prepared for it.

    Args:
        image_encoder: a vision encoder with its weights whole (before sharding), of any floating dtype.
        encoder_image_processor: its image processor.

    Returns:
        A name such as "sam-12x768-1024px-0123456789abcdef".
    """
    settings = encoder_image_processor.to_dict()
    kept = ("size", "pad_size", "image_mean", "image_std", "rescale_factor", "resample", "do_normalize", "do_rescale")
    digest = hashlib.blake2b(json.dumps({name: settings.get(name) for name in kept}, default=str).encode())
    for name, value in sorted(image_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    config = image_encoder.config
    kind = config.model_type.removesuffix("_vision_model")
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    shape = f"{layers}x{width}-" if layers and width else ""  # not every kind has one depth and one width
    return f"{kind}-{shape}{encoder_of(config).side(config)}px-{digest.hexdigest()[:16]}"


def _read_meta(folder: Path, encoder: str) -> dict[str, Any]:
    meta = read_signed_json(folder / META)
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{folder / META} says format {meta.get('format')}, this version reads image feature caches of format "
            f"{FORMAT}; make it again with `segcompass precompute-features`, in another folder."
        )
    if meta["encoder"] != encoder:
        raise ValueError(
            f"{folder} holds features of encoder {meta['encoder']!r}, this model's is {encoder!r}; run "
            "`segcompass precompute-features` with this model and another folder."
        )
    return meta


def _read_listing(path: Path) -> dict[str, Any]:
    """A shard's list. Raises ValueError when it is damaged."""
    listing = read_signed_json(path)
    if not {"keys", "shape", "crc32"} <= listing.keys():
        raise ValueError(f"{path} is no list of a shard (it holds {sorted(listing)}); delete it and make it again.")
    return listing


def _mapped(path: Path) -> np.ndarray:
    """A shard's values, mapped. Raises ValueError when it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:  # numpy reads the header as Python, whose parser raises whatever it likes
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and {path.stem}.json and run `segcompass precompute-features` "
            "again."
        ) from error


class ImageFeatureWriter:
    """Adds images to a cache, shard by shard; one process at a time.

    Args:
        folder: made if absent; resumes a folder written by the same encoder.
        encoder: `encoder_id(...)`.
        frame: where an image lies in the encoder's input.
        shard_size: images per shard; a killed run loses at most so many.

    Raises:
        ValueError: the folder holds another encoder's features, or a damaged list.
        FolderHeldError: another process writes into the folder; it is named.

    Example:
        >>> encoder = encoder_id(model.image_encoder, processor.encoder_image_processor)
        >>> writer = ImageFeatureWriter("runs/features", encoder, model.config.frame)
        >>> writer.add(image_key(image), model.get_image_embeddings(pixels)[0])
        >>> writer.close()
    """

    def __init__(self, folder: str | Path, encoder: str, frame: Frame, shard_size: int = 256):
        self.folder, self.shard_size = Path(folder), shard_size
        take_folder(self.folder)
        self._alone = True
        if (self.folder / META).exists():
            _read_meta(self.folder, encoder)
        else:
            placing = {"image_size": frame.side, "stretched": frame.stretched}
            meta = {"format": FORMAT, "encoder": encoder, **placing, "dtype": "float16"}
            write_whole(self.folder / META, signed_json(meta) + "\n")
        listed = sorted(self.folder.glob("shard-*.json"))
        self.known = {key for path in listed for key in _read_listing(path)["keys"]}
        self.number = int(listed[-1].stem.split("-")[1]) + 1 if listed else 0
        self.pending: list[tuple[str, np.ndarray]] = []

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def add(self, key: str, features: torch.Tensor) -> None:
        """Add one image's features.

        Args:
            key: `image_key(image)`.
            features: float (d_k, h, w).

        Raises:
            ValueError: they do not fit float16.
        """
        values = features.detach().to("cpu", torch.float16).contiguous().numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"the features of image {key} are not finite in float16, so they cannot be cached.")
        self.known.add(key)
        self.pending.append((key, values))
        if len(self.pending) == self.shard_size:
            self._write_shard()

    def close(self) -> None:
        """Write the images added since the last shard, and let others write into the folder."""
        if self.pending:
            self._write_shard()
        if self._alone:
            give_folder(self.folder)
            self._alone = False

    def _write_shard(self):
        name = f"shard-{self.number:05d}"
        values = np.stack([features for _, features in self.pending])
        write_whole(self.folder / f"{name}.npy", lambda part: np.save(part, values))
        listing = {
            "keys": [key for key, _ in self.pending],
            "shape": list(values.shape),
            "crc32": [zlib.crc32(row) for row in values],
        }
        write_whole(self.folder / f"{name}.json", signed_json(listing) + "\n")
        self.number += 1
        self.pending = []


class ImageFeatures:
    """A cache opened for reading; `open_image_features` makes one for a model.

    Shards are mapped, not loaded, and each image's checksum is compared whenever it is read.

    Args:
        folder: a cache's folder.
        encoder: `encoder_id(...)` of the model that will read the features.

    Raises:
        ValueError: no cache, or another encoder's, or a shard of another size than listed.

    Example:
        >>> features = open_image_features("runs/features", model, processor)
        >>> outputs = model.segment(**processor(image, text, image_encoder=False), **features.inputs([image]))
    """

    def __init__(self, folder: str | Path, encoder: str):
        self.folder = Path(folder)
        if not (self.folder / META).exists():
            raise ValueError(
                f"{self.folder} is no image feature cache (it has no {META}); make one with "
                "`segcompass precompute-features`."
            )
        meta = _read_meta(self.folder, encoder)
        self.frame = Frame(meta["image_size"], meta.get("stretched", False))  # caches of before knew padding only
        self._place_of: dict[str, tuple[str, int, int]] = {}
        self._shards: dict[str, np.ndarray] = {}
        listed: dict[tuple, str] = {}
        for path in sorted(self.folder.glob("shard-*.json")):
            listing = _read_listing(path)
            if (other := listed.setdefault(tuple(listing["keys"]), path.name)) != path.name:
                raise ValueError(
                    f"{path} lists the images of {other}; delete it and run `segcompass precompute-features` again."
                )
            shape = tuple(_mapped(path.with_suffix(".npy")).shape)
            if shape != tuple(listing["shape"]):
                raise ValueError(
                    f"{path.with_suffix('.npy')} has shape {shape}, its list says {listing['shape']}; delete both "
                    "files and run `segcompass precompute-features` again."
                )
            for row, (key, crc) in enumerate(zip(listing["keys"], listing["crc32"], strict=True)):
                self._place_of[key] = (path.stem, row, crc)

    def __len__(self):
        return len(self._place_of)

    def __getitem__(self, image: Image.Image) -> torch.Tensor:
        """The image's features.

        Args:
            image: what it shows is looked up, whatever its file.

        Returns:
            float16 (d_k, h, w).

        Raises:
            KeyError: the image is not in the cache.
            ValueError: what is stored does not have its checksum.
        """
        key = image_key(image)
        if key not in self._place_of:
            values = sorted(self.folder.glob("shard-*.npy"))
            alone = [path.stem for path in values if not path.with_suffix(".json").exists()]
            raise KeyError(
                f"an image of {image.size[0]} x {image.size[1]} pixels (key {key}) is not among the {len(self)} in "
                f"{self.folder}{''.join(f', where {name}.npy lacks its {name}.json' for name in alone[:3])}; run "
                "`segcompass precompute-features` on this data set, it adds what is missing."
            )
        shard, row, crc = self._place_of[key]
        if shard not in self._shards:
            self._shards[shard] = _mapped(self.folder / f"{shard}.npy")
        values = np.array(self._shards[shard][row])
        if zlib.crc32(values.data) != crc:
            raise ValueError(
                f"row {row} of {self.folder / shard}.npy is damaged (its checksum differs); delete {shard}.npy and "
                f"{shard}.json and run `segcompass precompute-features` again."
            )
        return torch.from_numpy(values)

    def inputs(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """In place of `processor.encoder_inputs(images)`.

        Args:
            images: B images.

        Returns:
            image_embeddings float16 (B, d_k, h, w); original_sizes and reshaped_input_sizes long (B, 2), (H, W).
        """
        sizes = [(image.height, image.width) for image in images]
        return {
            "image_embeddings": torch.stack([self[image] for image in images]),  # (B, d_k, h, w)
            "original_sizes": torch.tensor(sizes),  # (B, 2)
            "reshaped_input_sizes": torch.tensor([self.frame.reshaped_size(*size) for size in sizes]),
        }


def open_image_features(folder: str | Path, model: Any, processor: Any) -> ImageFeatures:
    """The cache in a folder, for the model that will read it.

    Args:
        folder: what `segcompass precompute-features` wrote.
        model: a SegCompassModel with whole weights.
        processor: its processor.

    Returns:
        The cache, opened.

    Raises:
        ValueError: no cache, or another encoder's, or a shard of another size than listed.
    """
    return ImageFeatures(folder, encoder_id(model.image_encoder, processor.encoder_image_processor))
