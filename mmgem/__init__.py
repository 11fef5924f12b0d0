"""
MM-GEM, the Multi-Modal Generative Embedding Model: one language model that embeds sentences and captions images.

Importing this package registers the model with transformers' Auto classes, and the pipeline `region-captioning`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from ._version import __version__
from .configuration import MMGEMConfig
from .modeling_mmgem import MMGEMModel, MMGEMOutput, PoolAggregator, RegionCaptioningPipeline
from .processing import MMGEMProcessor


AutoConfig.register("mmgem", MMGEMConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForZeroShotImageClassification):
    auto_class.register(MMGEMConfig, MMGEMModel, exist_ok=True)
AutoProcessor.register(MMGEMConfig, MMGEMProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "region-captioning",
    pipeline_class=RegionCaptioningPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)

__all__ = [
    "MMGEMConfig",
    "MMGEMModel",
    "MMGEMOutput",
    "MMGEMProcessor",
    "PoolAggregator",
    "RegionCaptioningPipeline",
    "__version__",
]
