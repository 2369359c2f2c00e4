"""SegCompass: reasoning segmentation whose path from words to masks can be looked at and intervened on.

    from segcompass import SegCompassModel, SegCompassProcessor

The public names are imported when they are first used, so that `import segcompass` and every `--help` are quick. The
parts are `segcompass.modeling_segcompass` (the model, as the Hub serves it), `segcompass.trainers`,
`segcompass.loaders` and `segcompass.hub_cards`.
"""

from importlib import import_module
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
if (_FOLDER.parent / "modeling_segcompass").is_dir():  # a clone: the parts lie beside this folder, not in it
    __path__.append(str(_FOLDER.parent))

__version__ = "0.2.0"

_PUBLIC = {
    "modeling_segcompass": (
        "ReasoningSegmentationPipeline",
        "SegCompassConfig",
        "SegCompassModel",
        "SegCompassOutput",
        "SegCompassProcessor",
        "SparseAutoencoder",
        "SparseAutoencoderConfig",
    ),
    "trainers": (
        "SegCompassGRPOConfig",
        "SegCompassGRPOTrainer",
        "SegCompassSFTConfig",
        "SegCompassSFTTrainer",
        "SparseAutoencoderTrainer",
        "SparseAutoencoderTrainerConfig",
    ),
    "loaders": ("METRIC", "load_rows"),
}
_PART_OF = {name: part for part, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_PART_OF]


def __getattr__(name: str) -> object:
    if name not in _PART_OF:
        raise AttributeError(f"module 'segcompass' has no attribute {name!r}; its public names are {__all__}.")
    return getattr(import_module(f"segcompass.{_PART_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
