from .losses_mmgem import caption_loss, contrastive_loss
from .modeling_mmgem import MMGEMModel, MMGEMOutput
from .pipelines_mmgem import RegionCaptioningPipeline
from .pooling_mmgem import PoolAggregator


__all__ = [
    "MMGEMModel",
    "MMGEMOutput",
    "PoolAggregator",
    "RegionCaptioningPipeline",
    "caption_loss",
    "contrastive_loss",
]
