"""Retrieval and captions of one model over a dataset of pairs, long captions included (the paper's L-DCI)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.collator import MODEL_INPUTS, PairCollator
from ..data.pairs import PairDataset
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.losses_mmgem import shortened
from ..processing import MMGEMProcessor
from .arguments import LIKELIHOOD_WEIGHT, MAX_LENGTHS
from .captioning import best_constant_caption, caption_scores, cider_d, has_cider, tokenize
from .embedding import (
    caption_cosines,
    caption_inputs,
    embed_all_texts,
    embed_dataset,
    embed_images,
    embed_pairs,
    evaluating,
    readable_batches,
)
from .likelihood import combined
from .retrieval import best_ranks, check_finite, retrieval_metrics
from .sharing import gather_parts, shard_range


BUCKETS = (0, 50, 100, 150, 200, 300, 10**9)  # words, from one to below the next


def evaluate_model(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    caption_samples: int = 0,
    **generation: Any,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    [`evaluate_retrieval`] and [`evaluate_captions`] in one. Images that cannot be read, or have no caption, are left
    out. If there are several processes, all must call it; each does its share, and gets the whole.

    Returns:
        the metrics and the outputs of both.

    Raises:
        BadDataError: if no example can be read.
    """
    metrics, outputs = evaluate_retrieval(model, processor, dataset, batch_size)
    readable = dataset.select(outputs["indices"])
    of_captions, captions = evaluate_captions(model, processor, readable, batch_size, caption_samples, **generation)
    return {**metrics, **of_captions}, {**outputs, **captions}


def evaluate_retrieval(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, Any]]:
    """[`retrieval_metrics`] of all images and all their captions, and what [`embed_pairs`] returns."""
    with evaluating(model):
        outputs = embed_pairs(model, processor, dataset, batch_size)
    return retrieval_metrics(outputs["text_embeds"], outputs["image_embeds"], outputs["text_to_image"]), outputs


def shorter_retrieval(outputs: dict[str, Any], dims: Sequence[int]) -> dict[str, float]:
    """`dim_{d}_…` as of [`retrieval_metrics`], of the first d numbers of the embeddings of [`evaluate_retrieval`]."""
    texts, images = outputs["text_embeds"], outputs["image_embeds"]
    metrics = {}
    for dim in dims:
        found = retrieval_metrics(shortened(texts, dim), shortened(images, dim), outputs["text_to_image"])
        metrics.update({f"dim_{dim}_{name}": value for name, value in found.items()})
    return metrics


def evaluate_long_text(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    max_lengths: Sequence[int] = MAX_LENGTHS,
    whole_image_box: bool = False,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Retrieval with the captions of `dataset` truncated to each of `max_lengths` tokens.

    Args:
        whole_image_box: also evaluate every image as the region that covers it, through h4: the paper's path for long
            captions once "region-retrieval" is loaded.

    Returns:
        the metrics: `long_text_{max_length}_…` as of [`retrieval_metrics`], with `_whole_box` after the length for
        that path; `long_text_{max_length}_R@1_{words}_words`, text to image among all images, by the captions' number
        of words; `long_text_{max_length}_cut`, the share of captions that were truncated. And outputs: `indices` of
        the images that were used, and the number of `words` of each caption.
    """
    with evaluating(model):
        indices, plain = embed_dataset(model, processor, dataset, batch_size)
        dataset = dataset.select(indices)
        images = {"": plain}
        if whole_image_box:
            images["_whole_box"] = embed_dataset(model, processor, dataset, batch_size, whole_image_box=True)[1]
        of_images = dataset.captions()
        texts = [caption for captions in of_images for caption in captions]
        owners = torch.tensor([i for i, captions in enumerate(of_images) for _ in captions])
        words = torch.tensor([len(tokenize(text)) for text in texts])
        tokens = [len(row) for row in processor.sentence_ids(texts)]
        metrics: dict[str, float] = {}
        for length in max_lengths:
            embeds = embed_all_texts(model, processor, texts, batch_size, max_length=length)
            for path, image_embeds in images.items():
                ranks = retrieval_metrics(embeds, image_embeds, owners)
                metrics.update({f"long_text_{length}{path}_{name}": value for name, value in ranks.items()})
            metrics.update(_by_words(f"long_text_{length}_R@1", embeds, plain, owners, words))
            metrics[f"long_text_{length}_cut"] = sum(count > length for count in tokens) / len(tokens)
    return metrics, {"indices": indices, "words": words.tolist()}


def _by_words(
    name: str, texts: torch.Tensor, images: torch.Tensor, owners: torch.Tensor, words: torch.Tensor
) -> dict[str, float]:
    found = best_ranks(texts, images, torch.stack([torch.arange(len(owners)), owners], 1)) == 1
    metrics = {}
    for low, high in pairwise(BUCKETS):
        here = (words >= low) & (words < high)
        if here.any():
            label = f"{low}_to_{high - 1}" if high < BUCKETS[-1] else f"{low}_and_more"
            metrics[f"{name}_{label}_words"] = found[here].double().mean().item()
    return metrics


def evaluate_captions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    caption_samples: int = 0,
    **generation: Any,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Held-out L_Gen over all captions, and the metrics of captions of the first `caption_samples` images (0: none),
    greedy unless `generation` says otherwise, which are among the outputs as `captions`. Every image must be
    readable: select those that are.
    """
    with evaluating(model):
        metrics = {"caption_loss": held_out_caption_loss(model, processor, dataset, batch_size)}
        if not caption_samples:
            return metrics, {}
        count = min(caption_samples, len(dataset))
        captions = generate_captions(model, processor, dataset, count, batch_size, **generation)
    return {**metrics, **caption_metrics(captions, dataset)}, {"captions": captions}


@torch.inference_mode()
def held_out_caption_loss(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, batch_size: int
) -> float:
    """L_Gen in nats per token, EOS included, over all captions of the dataset."""
    collate = PairCollator(processor, "caption")
    sums = []
    for examples in readable_batches(dataset, dataset.__getitem__, batch_size, faults=[]):
        # The ViT runs once over each image, however many captions it has.
        pixels = collate.pixel_values([example["image"] for _, example in examples])
        features = model.compact_features(pixels.to(model.device), model.config.image_grid_size)
        pairs = [
            {**example, **{name: values[i] for name, values in features.items()}, "caption": caption}
            for i, (_, example) in enumerate(examples)
            for caption in example["captions"]
        ]
        pairs.sort(key=lambda pair: len(pair["caption"]))  # alike lengths need little padding
        for start in range(0, len(pairs), batch_size):
            batch = collate(pairs[start : start + batch_size])
            inputs = {name: batch[name].to(model.device) for name in MODEL_INPUTS if name in batch}
            loss = float(model(**inputs, num_items_in_batch=1, logits_to_keep=1).caption_loss)
            sums.append((loss, len(batch["label_positions"])))
    losses, tokens = zip(*gather_parts(sums))
    loss = sum(losses) / sum(tokens)
    if not math.isfinite(loss):
        raise ValueError(f"The held-out caption loss is {loss}: the model diverged, or its dtype is too small for it.")
    return loss


def generate_captions(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, count: int, batch_size: int, **generation: Any
) -> list[str]:
    """Captions of the first `count` images; greedy unless `generation` says otherwise."""
    captions: list[str] = []
    dataset = dataset.select(range(count))
    for examples in readable_batches(dataset, dataset.__getitem__, batch_size, faults=[]):
        images = [example["image"] for _, example in examples]
        inputs = processor(images=images, task="caption", return_tensors="pt")
        captions += caption_inputs(model, processor, inputs, **generation)
    return gather_parts(captions)


def caption_metrics(captions: list[str], dataset: PairDataset) -> dict[str, float]:
    """
    [`caption_scores`], how many captions are distinct, how many empty, and the metrics that the dataset brings.
    `caption_cider_shuffled`, these captions given to other images, and `caption_cider_constant`, the best caption for
    all, say what CIDEr is worth here; of a single image all three are left out.
    """
    references = dataset.captions()[: len(captions)]
    metrics = {
        **caption_scores(captions, references),
        "caption_distinct": len(set(captions)) / len(captions),
        "caption_empty": sum(not caption for caption in captions) / len(captions),
    }
    if "caption_cider" in metrics:
        order, other = np.random.default_rng(0).permutation(len(captions)), np.empty(len(captions), dtype=int)
        other[order] = np.roll(order, 1)  # one ring, so that no image keeps its own
        metrics["caption_cider_shuffled"] = cider_d([captions[i] for i in other], references)[0]
        metrics["caption_cider_constant"] = best_constant_caption(references)[1]
    if own_metrics := getattr(dataset.table, "caption_metrics", None):
        metrics.update(own_metrics(captions, [of_image[0] for of_image in references]))
    return metrics


class DrawnCaption(NamedTuple):
    """A caption, its cosine with its image, and its [`MMGEMModel.score`]; -1 and -inf for an empty one."""

    text: str
    cosine: float
    likelihood: float


def draw_captions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    count: int,
    draws: int,
    seed: int = 0,
    alpha: float = 0.0,
    **generation: Any,
) -> list[list[DrawnCaption]]:
    """
    Samples `draws` captions of each of the first `count` images, those nearest to it first. What is drawn depends on
    the seed and the image's index alone, so images come one by one.

    Args:
        alpha: weight of the prior, see [`MMGEMModel.score`].
        **generation: of `generate`; by default samples of the most probable 90 % (`top_p`).
    """
    drawn = []
    for i in shard_range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + i)
            drawn.append(draw_captions_of(model, processor, dataset.read(i)["image"], draws, alpha, **generation))
    return gather_parts(drawn)


def draw_captions_of(
    model: MMGEMModel, processor: MMGEMProcessor, image: Any, draws: int, alpha: float = 0.0, **generation: Any
) -> list[DrawnCaption]:
    """
    `draws` captions of an image, those nearest to it first; options as of [`draw_captions`].

    Raises:
        ValueError: for a model whose embeddings are not finite.
    """
    options = {"do_sample": True, "top_p": 0.9, "top_k": 0, "num_return_sequences": draws, **generation}
    inputs = processor(images=[image], task="caption", return_tensors="pt")
    captions = caption_inputs(model, processor, inputs, **options)
    embeds = embed_images(model, processor, [image]).expand(draws, -1)
    cosines = caption_cosines(model, processor, captions, list(embeds), draws)
    if not all(map(math.isfinite, cosines)):
        raise ValueError("The embeddings of an image or of a caption drawn of it hold NaN.")
    likelihoods = _likelihoods(model, processor, image, captions, alpha)
    return sorted(map(DrawnCaption, captions, cosines, likelihoods), key=lambda of: -of.cosine)


def _likelihoods(
    model: MMGEMModel, processor: MMGEMProcessor, image: Any, captions: list[str], alpha: float
) -> list[float]:
    written = sorted({caption for caption in captions if caption})
    if not written:
        return [-math.inf] * len(captions)
    inputs = processor(images=[image], text=written, truncation=True, task="score", return_tensors="pt")
    scores = model.score(**inputs.to(model.device), alpha=alpha)[0]
    check_finite(scores[:, None], written, "scores")
    found = dict(zip(written, scores.tolist()))
    return [found.get(caption, -math.inf) for caption in captions]


def evaluate_reranking(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    count: int,
    draws: int,
    weight: float = LIKELIHOOD_WEIGHT,
    **options: Any,
) -> tuple[dict[str, float], list[list[DrawnCaption]]]:
    """
    CIDEr-D of the caption nearest to its image (`caption_cider_reranked`) and of the best by cosine and likelihood
    (`caption_cider_reranked_both`, `weight` as of [`rerank`]) beside the mean of all that were drawn
    (`caption_cider_drawn`), which is what one draw is worth, and the best that a choice could reach
    (`caption_cider_drawn_best`); and what [`draw_captions`] returns, to which the options go.
    """
    with evaluating(model):
        drawn = draw_captions(model, processor, dataset, count, draws, **options)
    references = dataset.captions()[: len(drawn)]
    if not has_cider(references, "drawn captions"):
        return {}, drawn
    # Row k holds the scores of the captions that are the k-th nearest to their image.
    scores = torch.tensor([cider_d([of[k].text for of in drawn], references)[1].tolist() for k in range(draws)])
    cosines, likelihoods = (
        torch.tensor([[getattr(caption, name) for caption in of] for of in drawn]) for name in ("cosine", "likelihood")
    )
    both = combined(model, cosines, likelihoods, weight).masked_fill(likelihoods.isinf(), -torch.inf)
    chosen = both.argmax(1)
    metrics = {
        "caption_cider_reranked": scores[0].mean().item(),
        "caption_cider_reranked_both": scores.gather(0, chosen[None]).mean().item(),
        "caption_cider_drawn": scores.mean().item(),
        "caption_cider_drawn_best": scores.amax(0).mean().item(),
    }
    return metrics, drawn
