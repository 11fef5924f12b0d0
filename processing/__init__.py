from .processing_mmgem import MMGEMProcessor, set_image_size
from .tokenization_mmgem import to_mmgem_tokenizer


__all__ = ["MMGEMProcessor", "set_image_size", "to_mmgem_tokenizer"]
