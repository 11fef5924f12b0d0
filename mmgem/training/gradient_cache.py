"""GradCache (Gao et al., 2021, arXiv 2101.06983): a large contrastive batch at the memory of a small one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


Embeddings = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # texts (N, D), images (N, D), 1 / tau


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
    embed: Callable[[dict[str, Any]], Embeddings],
    contrastive: Callable[..., torch.Tensor],
    forward: Callable[[dict[str, Any]], tuple[Embeddings, torch.Tensor | None]],
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
        embed: returns the embeddings of a mini-batch, rows in pairs.
        contrastive: returns the loss from all texts, all images and the scale.
        forward: returns the embeddings of a mini-batch and its own loss (None without one).
        backward: backpropagates a scalar.
        no_sync: prevents the exchange of gradients between processes, which the last mini-batch alone needs.

    Returns:
        the contrastive loss, detached.
    """
    with torch.no_grad():
        parts = [embed(mini_batch) for mini_batch in mini_batches]
    texts, images = (torch.cat([part[k].float() for part in parts]).requires_grad_() for k in (0, 1))
    logit_scale = parts[-1][2].clone().requires_grad_()
    with torch.enable_grad():
        loss = contrastive(texts, images, logit_scale)
    text_gradient, image_gradient, scale_gradient = torch.autograd.grad(loss, (texts, images, logit_scale))
    start = 0
    for k, mini_batch in enumerate(mini_batches):
        is_last = k == len(mini_batches) - 1
        with nullcontext() if is_last else no_sync():
            (text_embeds, image_embeds, scale), own_loss = forward(mini_batch)
            rows = slice(start, start + len(text_embeds))
            total = (text_embeds * text_gradient[rows]).sum() + (image_embeds * image_gradient[rows]).sum()
            if own_loss is not None:
                total = total + own_loss
            if is_last:
                total = total + scale * scale_gradient
            backward(total)
        start = rows.stop
    return loss.detach()
