"""SegCompass as the Hub serves it: torch, transformers and numpy, nothing else."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_segcompass import SegCompassConfig, SparseAutoencoderConfig
from .modeling_segcompass import SegCompassModel
from .modeling_sparse_autoencoder import SparseAutoencoder
from .outputs import SegCompassOutput
from .pipeline_segcompass import ReasoningSegmentationPipeline
from .processing_segcompass import SegCompassProcessor

AutoConfig.register(SegCompassConfig.model_type, SegCompassConfig)
AutoConfig.register(SparseAutoencoderConfig.model_type, SparseAutoencoderConfig)
AutoModel.register(SegCompassConfig, SegCompassModel)
AutoModel.register(SparseAutoencoderConfig, SparseAutoencoder)
AutoModelForImageTextToText.register(SegCompassConfig, SegCompassModel)
AutoProcessor.register(SegCompassConfig, SegCompassProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "reasoning-segmentation", pipeline_class=ReasoningSegmentationPipeline, pt_model=AutoModel, type="multimodal"
)

__all__ = [
    "ReasoningSegmentationPipeline",
    "SegCompassConfig",
    "SegCompassModel",
    "SegCompassOutput",
    "SegCompassProcessor",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
]
