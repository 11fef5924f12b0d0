"""Captions that the model chooses itself: of several that it writes, the one that it embeds nearest to the image."""

import math
from typing import Any

import torch

from ..data.pairs import PairDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .captioning import cider_d, has_cider
from .embedding import embed_pictures, embed_texts, evaluating
from .sharing import gather_parts, own_part


def draw_captions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    count: int,
    draws: int,
    seed: int = 0,
    **generation: Any,
) -> list[list[tuple[str, float]]]:
    """
    Of each of the first `count` images `draws` captions, each with its cosine with the image (-1 for an empty
    one), the nearest first. What is drawn depends on the seed and the image's number alone, so images come one by
    one.

    Args:
        **generation: of `generate`; by default samples of the most probable 90 % (`top_p`).
    """
    options = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": processor.max_length, **generation}
    drawn = []
    for i in own_part(count):
        image = dataset.read(i)["image"]
        inputs = processor(images=[image], task="caption", return_tensors="pt").to(model.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + i)
            ids = model.generate(**inputs, num_return_sequences=draws, **options)
        captions = [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]
        own = embed_pictures(model, processor, [image])[0]
        written = sorted({caption for caption in captions if caption})
        cosines = dict(zip(written, (embed_texts(model, processor, written, draws) @ own).tolist()))
        if not all(map(math.isfinite, cosines.values())):
            raise ValueError(f"The embeddings of image {i} or of a caption drawn of it hold NaN.")
        ranked = [(caption, cosines.get(caption, -1.0)) for caption in captions]
        drawn.append(sorted(ranked, key=lambda item: -item[1]))
    return gather_parts(drawn)


def evaluate_reranking(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    count: int,
    draws: int,
    seed: int = 0,
    **generation: Any,
) -> tuple[dict[str, float], list[list[tuple[str, float]]]]:
    """
    CIDEr-D of the caption nearest to its image (`caption_cider_reranked`) beside the mean of all that were drawn
    (`caption_cider_drawn`), which is what one draw is worth, and the best that a choice could reach
    (`caption_cider_drawn_best`); and what [`draw_captions`] gives.
    """
    with evaluating(model):
        drawn = draw_captions(model, processor, dataset, count, draws, seed, **generation)
    references = dataset.captions()[: len(drawn)]
    if not has_cider(references, "drawn captions"):
        return {}, drawn
    # The nearest first: place k holds the caption of each image that is its k-th nearest.
    by_place = torch.tensor([cider_d([of[k][0] for of in drawn], references)[1].tolist() for k in range(draws)])
    metrics = {
        "caption_cider_reranked": by_place[0].mean().item(),
        "caption_cider_drawn": by_place.mean().item(),
        "caption_cider_drawn_best": by_place.amax(0).mean().item(),
    }
    return metrics, drawn
