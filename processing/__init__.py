from .image_processors_mmgem import set_image_size
from .processing_mmgem import MMGEMProcessor
from .tokenization_mmgem import to_mmgem_tokenizer


__all__ = ["MMGEMProcessor", "set_image_size", "to_mmgem_tokenizer"]
