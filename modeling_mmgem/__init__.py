from .losses_mmgem import caption_loss, contrastive_loss, relational_distillation
from .modeling_mmgem import MMGEMModel, MMGEMOutput
from .negatives_mmgem import Negatives
from .pipelines_mmgem import RegionCaptioningPipeline
from .pooling_mmgem import PoolAggregator


__all__ = [
    "MMGEMModel",
    "MMGEMOutput",
    "Negatives",
    "PoolAggregator",
    "RegionCaptioningPipeline",
    "caption_loss",
    "contrastive_loss",
    "relational_distillation",
]
