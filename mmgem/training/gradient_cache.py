"""GradCache (Gao et al., 2021, arXiv 2101.06983): a large contrastive batch at the memory of a small one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


Embeddings = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # texts (N, D), pictures (N, D), 1 / tau


def refuse_dropout(model: nn.Module) -> None:
    """
    The two passes over a mini-batch must see the same model.

    Raises:
        ValueError: naming the first module that drops anything.
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
    Gradients of contrastive(all embeddings) + sum of what `forward` adds, one mini-batch with a graph at a time.

    First all embeddings without a graph, then the loss between them and its gradient with respect to each, then each
    mini-batch once more: its embeddings times these gradients is a sum whose gradient is the loss's.

    Args:
        mini_batches: parts of the batch.
        embed: embeddings of one of them, rows in pairs.
        contrastive: the loss from all texts, all images and the scale.
        forward: embeddings of one of them and whatever loss it has of its own (None for none).
        backward: of a scalar.
        no_sync: holds back the exchange of gradients between processes until the last mini-batch.

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
