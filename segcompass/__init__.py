"""SegCompass: reasoning segmentation whose path from words to masks can be looked at and intervened on.

    from segcompass import SegCompassModel, SegCompassProcessor

The public names are imported when they are first used, so that `import segcompass` and every `--help` are quick. The
parts are `segcompass.modeling_segcompass` (the model, as the Hub serves it), `segcompass.trainers`,
`segcompass.loaders` and `segcompass.hub_cards`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

_FOLDER = Path(__file__).resolve().parent
if (_FOLDER.parent / "modeling_segcompass").is_dir():  # a clone: the parts lie beside this folder, not in it
    __path__.append(str(_FOLDER.parent))

__version__ = "0.2.0"

if TYPE_CHECKING:  # IDEs and type checkers do not run `__getattr__`
    from segcompass.loaders import METRIC as METRIC
    from segcompass.loaders import load_rows as load_rows
    from segcompass.modeling_segcompass import ReasoningSegmentationPipeline as ReasoningSegmentationPipeline
    from segcompass.modeling_segcompass import SegCompassConfig as SegCompassConfig
    from segcompass.modeling_segcompass import SegCompassModel as SegCompassModel
    from segcompass.modeling_segcompass import SegCompassOutput as SegCompassOutput
    from segcompass.modeling_segcompass import SegCompassProcessor as SegCompassProcessor
    from segcompass.modeling_segcompass import SparseAutoencoder as SparseAutoencoder
    from segcompass.modeling_segcompass import SparseAutoencoderConfig as SparseAutoencoderConfig
    from segcompass.trainers import SegCompassGRPOConfig as SegCompassGRPOConfig
    from segcompass.trainers import SegCompassGRPOTrainer as SegCompassGRPOTrainer
    from segcompass.trainers import SegCompassSFTConfig as SegCompassSFTConfig
    from segcompass.trainers import SegCompassSFTTrainer as SegCompassSFTTrainer
    from segcompass.trainers import SparseAutoencoderTrainer as SparseAutoencoderTrainer
    from segcompass.trainers import SparseAutoencoderTrainerConfig as SparseAutoencoderTrainerConfig

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
