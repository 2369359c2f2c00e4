"""Trainers: the cold start, the sparse autoencoder, and joint GRPO."""

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
