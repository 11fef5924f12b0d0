from .losses_mmgem import caption_loss, contrastive_loss
from .modeling_mmgem import MMGEMModel, MMGEMOutput
from .pooling_mmgem import PoolAggregator


__all__ = ["MMGEMModel", "MMGEMOutput", "PoolAggregator", "caption_loss", "contrastive_loss"]
