"""Trainers: the cold start, the sparse autoencoder, and joint GRPO."""

from . import tested_versions  # noqa: F401  # first: what follows may not even import with other versions
from .grpo_config import SegCompassGRPOConfig
from .grpo_trainer import SegCompassGRPOTrainer
from .sae_trainer import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig
from .sft_trainer import SegCompassSFTConfig, SegCompassSFTTrainer

__all__ = [
    "SegCompassGRPOConfig",
    "SegCompassGRPOTrainer",
    "SegCompassSFTConfig",
    "SegCompassSFTTrainer",
    "SparseAutoencoderTrainer",
    "SparseAutoencoderTrainerConfig",
]
