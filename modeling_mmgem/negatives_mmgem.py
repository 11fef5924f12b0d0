"""Which negatives the contrastive loss sees, and how much they weigh."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Negatives:
    """
    What is done to the negatives of each row of L_Emb, in this order. By default they all count alike.

    Args:
        margin: beta of UniME (arXiv 2504.17432, section 3.2): a negative whose cosine is above that of the row's
            positive by more than beta is taken for a false one, and left out.
        hardness: alpha of LLaVE (arXiv 2503.04812): `alpha` times the cosine, without a gradient, is added to the
            logits of negatives, so that hard ones weigh more.
        hardest: k of UniME: only the k negatives of the highest logits count. Where fewer are left, they are repeated
            in their order until there are k; a negative that was left out, or the positive, never stands in for one.
    """

    margin: float | None = None
    hardness: float = 0.0
    hardest: int = 0

    def __bool__(self) -> bool:
        return self.margin is not None or self.hardness > 0 or self.hardest > 0


ALL_ALIKE = Negatives()


def choose_negatives(
    logits: torch.Tensor, targets: torch.Tensor, logit_scale: torch.Tensor, negatives: Negatives
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits with the negatives that count, and the column of each row's positive among them.

    Args:
        logits (`torch.FloatTensor` of shape `(N, M)`): cosines over tau; -inf for what is no negative.
        targets (`torch.LongTensor` of shape `(N,)`): column of each row's positive.
        logit_scale (`torch.FloatTensor`, scalar): 1 / tau.
    """
    if not negatives:
        return logits, targets
    is_positive = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, targets[:, None], True)
    cosines = (logits / logit_scale).detach()
    if negatives.margin is not None:
        false = cosines > cosines.gather(1, targets[:, None]) + negatives.margin
        logits = logits.masked_fill(false & ~is_positive, -torch.inf)
    if negatives.hardness:
        added = (negatives.hardness * cosines).masked_fill(is_positive | cosines.isinf(), 0.0)
        logits = logits + added
    if negatives.hardest:
        positives = logits.gather(1, targets[:, None])
        others = logits.masked_fill(is_positive, -torch.inf)
        logits = torch.cat([positives, hardest_of_rows(others, negatives.hardest)], 1)
        targets = torch.zeros_like(targets)
    return logits, targets


def sigmoid_loss(logits: torch.Tensor, targets: torch.Tensor, logit_bias: torch.Tensor) -> torch.Tensor:
    """
    SigLIP's loss (Zhai et al., 2023, arXiv 2303.15343, equation 1), summed over the rows: -log sigmoid(x + b) of each
    row's positive, -log sigmoid(-(x + b)) of every other column, of which -inf is none.

    Args:
        logits, targets: see [`choose_negatives`].
        logit_bias (`torch.FloatTensor`, scalar): b.
    """
    signs = torch.full_like(logits, -1.0).scatter_(1, targets[:, None], 1.0)
    return -F.logsigmoid(signs * (logits + logit_bias.to(logits.dtype))).sum()


def hardest_of_rows(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`(N, k)`: the k highest logits of each row; where fewer are finite, these again in turn; -inf where none is."""
    found = logits.topk(min(k, logits.shape[1])).values
    count = found.isfinite().sum(1, keepdim=True).clamp(min=1)
    return found.gather(1, torch.arange(k, device=logits.device) % count)


__all__ = ["ALL_ALIKE", "Negatives", "choose_negatives", "hardest_of_rows", "sigmoid_loss"]
