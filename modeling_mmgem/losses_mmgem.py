"""The two losses of MM-GEM, pure functions of tensors. L = L_Emb + L_Gen, unweighted (paper, equation 4)."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


BLOCK_SIZE = 2**22  # similarities of one direction that exist at a time: 16 MiB


def contrastive_loss(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    all_text_embeds: torch.Tensor | None = None,
    all_image_embeds: torch.Tensor | None = None,
    offset: int = 0,
    pair_ids: torch.Tensor | None = None,
    all_pair_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    L_Emb = L_v2t + L_t2v (paper, equation 2): InfoNCE both ways, the plain sum. Each half is a mean over the rows.

    With the embeddings gathered from all processes (with gradient) as `all_*`, the local rows stand against all
    columns; averaged over processes of equal batch size this is the loss, and its gradient, of one process that holds
    the whole batch. A large matrix of similarities never exists whole: it comes in blocks of rows, computed once more
    in the backward pass.

    Args:
        text_embeds, image_embeds (`torch.FloatTensor` of shape `(N, D)`): unit norm, row i belongs to row i.
        logit_scale (`torch.FloatTensor`, scalar): 1 / tau.
        all_text_embeds, all_image_embeds (`torch.FloatTensor` of shape `(M, D)`, *optional*): the columns.
        offset (`int`): column of the first local row.
        pair_ids (`torch.LongTensor` of shape `(N, K)`, *optional*): K numbers by which the pairs are known, such as
            hashes of caption and picture. Another column that shares one of them with the row is no negative, and left
            out.
        all_pair_ids (`torch.LongTensor` of shape `(M, K)`, *optional*): those of the columns.

    Returns:
        `torch.FloatTensor`, scalar, in nats.
    """
    all_text_embeds = text_embeds if all_text_embeds is None else all_text_embeds
    all_image_embeds = image_embeds if all_image_embeds is None else all_image_embeds
    all_pair_ids = pair_ids if all_pair_ids is None else all_pair_ids
    rows = max(1, BLOCK_SIZE // len(all_text_embeds))
    total = text_embeds.new_zeros((), dtype=torch.float32)
    for start in range(0, len(text_embeds), rows):
        end = start + rows
        block = (
            text_embeds[start:end],
            image_embeds[start:end],
            logit_scale,
            all_text_embeds,
            all_image_embeds,
            offset + start,
            None if pair_ids is None else pair_ids[start:end],
            all_pair_ids,
        )
        if len(text_embeds) <= rows:
            total = total + _block_loss(*block)
        else:
            total = total + checkpoint(_block_loss, *block, use_reentrant=False, preserve_rng_state=False)
    return total / len(text_embeds)


def _block_loss(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    all_text_embeds: torch.Tensor,
    all_image_embeds: torch.Tensor,
    offset: int,
    pair_ids: torch.Tensor | None,
    all_pair_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Both cross-entropies, summed over a block of rows."""
    logits_per_text = similarity_logits(text_embeds, all_image_embeds, logit_scale)
    logits_per_image = similarity_logits(image_embeds, all_text_embeds, logit_scale)
    targets = torch.arange(len(text_embeds), device=text_embeds.device) + offset
    if pair_ids is not None and all_pair_ids is not None:
        duplicates = torch.zeros_like(logits_per_text, dtype=torch.bool)
        for ids, all_ids in zip(pair_ids.unbind(-1), all_pair_ids.unbind(-1)):
            duplicates |= ids[:, None] == all_ids
        duplicates.scatter_(1, targets[:, None], False)
        logits_per_text = logits_per_text.masked_fill(duplicates, -torch.inf)
        logits_per_image = logits_per_image.masked_fill(duplicates, -torch.inf)
    return F.cross_entropy(logits_per_text, targets, reduction="sum") + F.cross_entropy(
        logits_per_image, targets, reduction="sum"
    )


def similarity_logits(queries: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """
    Scaled cosine similarities `(N, M)` in float32 at least, under autocast too: at 1 / tau = 100 the eight bits of
    bfloat16 leave steps of half a nat.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        return logit_scale.to(dtype) * queries.to(dtype) @ keys.to(dtype).T


def caption_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    L_Gen (paper, equation 3): next-token cross-entropy of the caption; the mean over caption tokens is our
    reading.

    Args:
        logits (`torch.FloatTensor` of shape `(N, vocab_size)`): predictions of the tokens in `targets`.
        targets (`torch.LongTensor` of shape `(N,)`): the tokens that follow.
        num_items_in_batch (`int` or scalar tensor, *optional*): divides the sum instead of N, where the mean runs
            over more than this call sees (gradient accumulation, several processes).

    Returns:
        `torch.FloatTensor`, scalar, in nats per token; 0 (with a graph) where there is no target.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)


__all__ = ["caption_loss", "contrastive_loss", "similarity_logits"]
