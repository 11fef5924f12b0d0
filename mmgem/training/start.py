"""The start of new projections between pretrained towers, from statistics of training images and their captions."""

import math
from typing import Any

import torch
from torch import nn

from ..data.collator import PairCollator
from ..data.pairs import PairDataset
from ..data.shards import ShardStream
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.vision_mmgem import EncodedImages
from ..processing import MMGEMProcessor


IMAGES = 2048  # several times as many as a ViT has features
FLOOR = 0.01  # of the mean variance: keeps directions that hardly vary from being amplified
RIDGE = 0.1  # of the mean variance


@torch.no_grad()
def start_projections(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset | ShardStream,
    batch_size: int = 64,
    images: int = IMAGES,
) -> None:
    """
    Gives h1 and h3, which are new between two pretrained towers, weights that fit the training data.

    h1 whitens what images are embedded from. DINOv2's features have a mean that is longer than their differences, so
    that two images have a cosine of 0.66, which the contrastive loss would have to unlearn first. With
    `image_pooling="tower"` h1 stays the tower's own. h3 predicts the mean of the token embeddings of an image's
    captions (ridge regression), and its outputs have the norm of a token embedding: the language model reads visual
    tokens as if they were words.

    Args:
        model: from [`MMGEMModel.from_vision_text_pretrained`]; LoRA may be beside it already.
        dataset: training images with captions. If it holds features of the frozen tower, the ViT does not run.
        batch_size: images that go through the ViT at a time.
        images: number of training images to look at.
    """
    was_training = model.training
    model.eval()
    examples = list(dataset.some_examples(images))
    encoded = _encode(model, processor, examples, batch_size)
    if model.config.image_pooling != "tower":
        whiten(_active(model.visual_projection), encoded.pooled)
    sources = model._caption_sources(encoded)
    input_embeddings: Any = model.get_input_embeddings()
    embeddings = input_embeddings.weight.detach().float()
    words = _mean_embeddings(embeddings, processor, [example["captions"] for example in examples])
    predict(_active(model.caption_projection), sources.float(), words, embeddings.norm(dim=1).mean())
    model.train(was_training)


def whiten(projection: nn.Linear, inputs: torch.Tensor) -> None:
    """
    Sets a projection such that its outputs `(N, D)` for `inputs` `(N, C)` have zero mean and, up to `FLOOR`, unit
    covariance: the D directions of largest variance if D < C, and all of them in a random rotation if D > C.
    """
    inputs = inputs.cpu().double()  # of few numbers; not every accelerator has float64
    mean = inputs.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(inputs.T, correction=0))
    kept = min(projection.out_features, len(variances))
    scale = (variances + FLOOR * variances.mean()).rsqrt()
    weight = (directions * scale)[:, -kept:].T
    if kept < projection.out_features:
        rotation = torch.linalg.qr(torch.randn(projection.out_features, kept, dtype=torch.float64)).Q
        weight = rotation @ weight * math.sqrt(projection.out_features / kept)
    projection.weight.copy_(weight)
    projection.bias.copy_(-weight @ mean)


def predict(projection: nn.Linear, cells: torch.Tensor, targets: torch.Tensor, norm: torch.Tensor) -> None:
    """
    Sets a projection to the ridge regression of `targets` `(N, H)` on the mean over cells `(N, cells, D)`. About the
    mean target, its outputs for the cells are scaled to this mean `norm`.
    """
    inputs, centre = cells.mean(1), cells.mean((0, 1))
    deviations, mean = inputs - centre, targets.mean(0)
    covariance = deviations.T @ deviations / len(inputs)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), device=covariance.device)
    slopes = torch.linalg.solve(covariance + ridge, deviations.T @ (targets - mean) / len(inputs))
    scale = norm / ((cells - centre) @ slopes).norm(dim=-1).mean()
    projection.weight.copy_((slopes * scale).T)
    projection.bias.copy_(mean - centre @ slopes * scale)


def _encode(
    model: MMGEMModel, processor: MMGEMProcessor, examples: list[dict[str, Any]], batch_size: int
) -> EncodedImages:
    """The examples after the ViT, with V reduced to the k x k cells that captions see."""
    collator, k = PairCollator(processor), model.config.image_grid_size
    pooled, cells = [], []
    for start in range(0, len(examples), batch_size):
        batch = collator.images(examples[start : start + batch_size])
        images = {name: tensor.to(model.device) for name, tensor in batch.items()}
        encoded = model._encode_images(
            images.get("pixel_values"), pooled=images.get("pooled_features"), patches=images.get("patch_features")
        )
        pooled.append(encoded.pooled.float())
        if k > 1:
            cells.append(model.pool_aggregator(encoded.features, encoded.grid, grid_size=k).float())
    return EncodedImages(torch.cat(pooled), torch.cat(cells).unflatten(1, (k, k)) if cells else None)


def _mean_embeddings(embeddings: torch.Tensor, processor: MMGEMProcessor, captions: list[list[str]]) -> torch.Tensor:
    """`(N, H)`: the mean embedding of all tokens of an image's captions, without BOS and [EMB]."""
    start = int(bool(processor.bos))
    means = []
    for texts in captions:
        ids = [i for row in processor.sentence_ids(texts) for i in row[start:-1]]
        means.append(embeddings[torch.tensor(ids, device=embeddings.device)].mean(0))
    return torch.stack(means)


def _active(module: Any) -> nn.Linear:
    """The module itself, or PEFT's copy of it that is trained."""
    return module.modules_to_save[module.active_adapters[0]] if hasattr(module, "modules_to_save") else module
