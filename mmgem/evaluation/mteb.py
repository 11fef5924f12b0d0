"""
MM-GEM for MTEB and MIEB (`pip install "mmgem[mteb]"`).

    import mteb
    from mmgem.evaluation.mteb import MMGEMEncoder

    mteb.evaluate(MMGEMEncoder("org/mm-gem"), mteb.get_tasks(["Flickr30kT2IRetrieval", "STS17"]))
"""

from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from torch.nn.functional import normalize

from .._version import __version__
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import FUSED_ADAPTER
from ..modeling_mmgem.losses_mmgem import shortened
from ..processing import MMGEMProcessor
from ..processing.tokenization_mmgem import as_sentence
from .embedding import embed_images, embed_mixed, embed_texts


class MMGEMEncoder(AbsEncoder):
    """
    Embeds texts and images into one space. An input with both goes through the adapter of fused queries, or without
    one gets the normalised mean of its two embeddings. The model takes no instructions.

    Args:
        model (`str`): folder or Hub id.
        revision (`str`, *optional*): of the Hub.
        device (`str`, *optional*): by default the GPU if there is one.
        max_length (`int`, *optional*): tokens per text; the processor's own by default.
        adapter (`str`, *optional*): folder or Hub id of an adapter that `--stage fused-retrieval` trained.
        dim (`int`, *optional*): the first `dim` numbers of each embedding alone, see [`MMGEMModel.get_embedding`].
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        dim: int | None = None,
        adapter: str | None = None,
        **kwargs: Any,
    ):
        loaded: Any = MMGEMModel.from_pretrained(model, revision=revision or "main", **kwargs)
        self.model = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        if adapter is not None:
            self.model.load_adapter(adapter, adapter_name=FUSED_ADAPTER)
            if self.model._fused_adapter is None:
                raise ValueError(f"{adapter} is no adapter of fused queries (--stage fused-retrieval).")
        self.has_fused = adapter is not None
        self.processor = MMGEMProcessor.from_pretrained(model, revision=revision or "main")
        if max_length is not None:
            self.processor.max_length = self.processor.checked_length(max_length)
        if dim is not None and not 1 <= dim <= self.model.config.projection_dim:
            numbers = self.model.config.projection_dim
            raise ValueError(f"dim is {dim}, but embeddings have {numbers} numbers. Pass fewer.")
        self.dim = dim or self.model.config.projection_dim
        described = {
            "name": f"mmgem/{model.rstrip('/').split('/')[-1]}",
            "revision": revision or __version__,
            "n_parameters": self.model.num_parameters(),
            "max_tokens": self.processor.max_length,
            "embed_dim": self.dim,
            "open_weights": True,
            "framework": ["PyTorch", "Transformers"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
            "modalities": ["image", "text"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(described)

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        """`(N, D)` of batches with `text`, `image`, or both; unit norm, float32."""
        embeds = []
        for batch in inputs:
            parts = []
            # Some corpora have empty documents, which the processor refuses.
            texts = [text if as_sentence(text) else "." for text in batch.get("text", ())]
            if self.has_fused and texts and "image" in batch:
                given = [text if as_sentence(text) else "" for text in batch["text"]]
                parts.append(embed_mixed(self.model, self.processor, batch["image"], given))
            else:
                if texts:
                    parts.append(embed_texts(self.model, self.processor, texts, len(texts)))
                if "image" in batch:
                    parts.append(embed_images(self.model, self.processor, batch["image"]))
            if not parts:
                raise ValueError(f"MM-GEM embeds text and images; this batch has {', '.join(batch)}.")
            embeds.append(normalize(torch.stack([shortened(part, self.dim) for part in parts]).mean(0), dim=-1))
        return torch.cat(embeds).numpy()
