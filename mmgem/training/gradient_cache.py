"""GradCache (Gao et al., 2021, arXiv 2101.06983): a large contrastive batch at the memory of a small one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn


class Embeddings(NamedTuple):
    """
    What L_Emb is computed from: queries and keys `(N, D)` in pairs (in stage 1 images and their texts), the scalars
    1 / tau and the bias of a model that has one, and hard negatives `(K, D)` beside the keys.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None
    negatives: torch.Tensor | None = None


def refuse_dropout(model: nn.Module) -> None:
    """
    Checks that two passes over a mini-batch compute the same.

    Raises:
        ValueError: naming the first module with active dropout.
    """
    for name, module in model.named_modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for option, value in vars(module).items():
            if ("drop" in option or (is_dropout and option == "p")) and isinstance(value, float) and value > 0:
                raise ValueError(
                    f"{name}.{option} is {value}: with active dropout --mini_batch_size, and --gradient_checkpointing "
                    "of a frozen model, would be wrong. Set it to 0 in the configuration, or train without."
                )


def cached_backward(
    mini_batches: Sequence[dict[str, Any]],
    embed: Callable[[dict[str, Any]], Sequence[torch.Tensor | None]],
    contrastive: Callable[..., torch.Tensor],
    forward: Callable[[dict[str, Any]], tuple[Sequence[torch.Tensor | None], torch.Tensor | None]],
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """
    Computes the gradient of contrastive(all embeddings) + the losses of the mini-batches, and holds the graph of one
    mini-batch at a time.

    First it embeds all mini-batches without a graph, then takes the contrastive loss and its gradient with respect to
    each embedding. Then it embeds each mini-batch once more: the sum of the embeddings times these gradients has the
    gradient of the loss.

    Args:
        mini_batches: parts of the batch.
        embed: returns what a mini-batch has of [`Embeddings`]: rows, scalars that all share, and None.
        contrastive: returns the loss from the same of the whole batch.
        forward: returns what `embed` does, and the mini-batch's own loss (None without one).
        backward: backpropagates a scalar.
        no_sync: prevents the exchange of gradients between processes, which the last mini-batch alone needs.

    Returns:
        the contrastive loss, detached.
    """
    with torch.no_grad():
        parts = list(zip(*(embed(mini_batch) for mini_batch in mini_batches)))
    leaves = [None if part[0] is None else _whole(part) for part in parts]
    tensors = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    with torch.enable_grad():
        loss = contrastive(*leaves)
    found = iter(torch.autograd.grad(loss, tensors))
    # Gradients of rows in the order of the mini-batches, whose last takes those of scalars.
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    starts = [0] * len(leaves)
    for k, mini_batch in enumerate(mini_batches):
        is_last = k == len(mini_batches) - 1
        with nullcontext() if is_last else no_sync():
            embeds, total = forward(mini_batch)
            for i, (tensor, gradient) in enumerate(zip(embeds, gradients)):
                if tensor is None or gradient is None or not (tensor.ndim or is_last):
                    continue
                if tensor.ndim:
                    gradient = gradient[starts[i] : starts[i] + len(tensor)]
                    starts[i] += len(tensor)
                own = (tensor * gradient).sum()
                total = own if total is None else total + own
            assert total is not None
            backward(total)
    return loss.detach()


def _whole(part: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all mini-batches, in float32 at least; of a scalar, which all share, a copy."""
    if not part[0].ndim:
        return part[-1].clone()
    return torch.cat(list(part)).to(torch.promote_types(part[0].dtype, torch.float32))
