"""
MM-GEM, the Multi-Modal Generative Embedding Model: one language model that embeds sentences and captions pictures.

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from ._version import __version__
from .configuration import MMGEMConfig
from .hub.pipelines import RegionCaptioningPipeline
from .modeling_mmgem import MMGEMModel, MMGEMOutput, PoolAggregator
from .processing import MMGEMProcessor


AutoConfig.register("mmgem", MMGEMConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForZeroShotImageClassification):
    auto_class.register(MMGEMConfig, MMGEMModel, exist_ok=True)
AutoProcessor.register(MMGEMConfig, MMGEMProcessor, exist_ok=True)

__all__ = [
    "MMGEMConfig",
    "MMGEMModel",
    "MMGEMOutput",
    "MMGEMProcessor",
    "PoolAggregator",
    "RegionCaptioningPipeline",
    "__version__",
]
