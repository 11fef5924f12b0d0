from .processing_mmgem import MMGEMProcessor
from .tokenization_mmgem import to_mmgem_tokenizer


__all__ = ["MMGEMProcessor", "to_mmgem_tokenizer"]
