"""Retrieval between texts and pictures: R@k and the median rank, both ways."""

from collections.abc import Sequence

import torch


def retrieval_metrics(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """
    The protocol of COCO and Flickr30k: a text has one right picture, a picture any number of right texts, of which
    the best-ranked one counts. An item as near as the right one counts as nearer, so that a constant embedding does
    not score.

    Args:
        text_embeds (`torch.Tensor` of shape `(T, D)`), image_embeds (`torch.Tensor` of shape `(N, D)`): unit norm.
        text_to_image (`torch.LongTensor` of shape `(T,)`): the picture that each text describes.
        ks: ranks to report recall at.
        chunk_size: queries at a time; memory grows with it, not with T x N.

    Returns:
        `text_to_image_R@k` and `image_to_text_R@k` as fractions, `…_median_rank` from 1 on.

    Raises:
        ValueError: for embeddings that are not finite (a NaN would rank first), or a picture without a text.
    """
    for side, embeds in (("text", text_embeds), ("image", image_embeds)):
        bad = int((~embeds.isfinite()).any(-1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(embeds)} {side} embeddings hold NaN or infinity; nothing can be ranked.")
    counts = torch.bincount(text_to_image, minlength=len(image_embeds))
    unknown = list(range(len(image_embeds), len(counts)))[-1:]
    if wrong := unknown or (counts == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"text_to_image must name each of the {len(image_embeds)} pictures at least once and no other; picture "
            f"{wrong[0]} is wrong."
        )
    texts, images = text_embeds.float(), image_embeds.float()
    ranks = {
        "text_to_image": _text_ranks(texts, images, text_to_image, chunk_size),
        "image_to_text": _image_ranks(texts, images, text_to_image, chunk_size),
    }
    metrics = {}
    for direction, rank in ranks.items():
        metrics.update({f"{direction}_R@{k}": (rank <= k).float().mean().item() for k in ks})
        metrics[f"{direction}_median_rank"] = rank.float().median().item()
    return metrics


def _text_ranks(texts: torch.Tensor, images: torch.Tensor, owners: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Rank of each text's picture, `(T,)`."""
    ranks = []
    for start in range(0, len(texts), chunk_size):
        similarity = texts[start : start + chunk_size] @ images.T
        own = similarity.gather(1, owners[start : start + chunk_size, None])
        ranks.append((similarity >= own).sum(1))
    return torch.cat(ranks)


def _image_ranks(texts: torch.Tensor, images: torch.Tensor, owners: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Rank of each picture's best text among the texts of other pictures, `(N,)`."""
    ranks = []
    for start in range(0, len(images), chunk_size):
        similarity = images[start : start + chunk_size] @ texts.T
        is_own = owners[None] == torch.arange(start, start + len(similarity))[:, None]
        best = similarity.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((similarity >= best) & ~is_own).sum(1))
    return torch.cat(ranks)
