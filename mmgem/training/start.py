"""The start of new projections between pretrained towers, from statistics of training images and their captions."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..data.collator import PairCollator
from ..data.pairs import PairDataset
from ..data.shards import ShardStream
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.embedding_mmgem import unit_norm
from ..modeling_mmgem.inputs_mmgem import batches_by_length
from ..modeling_mmgem.vision_mmgem import EncodedImages
from ..processing import MMGEMProcessor


IMAGES = 2048  # several times as many as a ViT has features
# Measured on Flickr8k (docs/pretrained.md); the first two of the mean variance.
FLOOR = 1.0  # with less, directions that hardly vary are amplified, and with them noise
RIDGE = 0.3
NORM = 0.5  # by how much visual tokens differ from their mean, in norms of a token embedding


@torch.no_grad()
def start_projections(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset | ShardStream,
    batch_size: int = 64,
    images: int = IMAGES,
) -> None:
    """
    Gives h1, h2 and h3, which are new between two pretrained towers, weights that fit the training data.

    h1 whitens what images are embedded from. DINOv2's features have a mean that is longer than their differences, so
    that two images have a cosine of 0.66, which the contrastive loss would have to unlearn first. With
    `image_pooling="tower"` h1 stays the tower's own. h2 predicts an image's embedding from the state at [EMB] of its
    caption. h3 predicts the mean of the token embeddings of an image's captions, and visual tokens differ from their
    mean by half the norm of a token embedding: the language model reads them as if they were words. Both predictions
    are ridge regressions; h2 and h3 stay as they are if they are frozen, as some objectives leave them.

    Args:
        model: from [`MMGEMModel.from_vision_text_pretrained`]; LoRA may be beside it already.
        dataset: training images with captions. If it holds features of the frozen tower, the ViT does not run.
        batch_size: images, and captions, that go through the towers at a time.
        images: number of training images to look at.
    """
    was_training = model.training
    model.eval()
    encoded, texts = _encode(model, processor, dataset.some_examples(images), batch_size)
    if model.config.image_pooling != "tower":
        whiten(_active(model.visual_projection), encoded.pooled)
    h2, h3 = _active(model.text_projection), _active(model.caption_projection)
    if h2.weight.requires_grad:
        targets = unit_norm(model._image_embeds(encoded))
        states = _text_states(model, processor, [text["caption"] for text in texts], batch_size)
        predict(h2, states[:, None], targets)
    if h3.weight.requires_grad:
        input_embeddings: Any = model.get_input_embeddings()
        embeddings = input_embeddings.weight.detach().float()
        words = _mean_embeddings(embeddings, processor, [text["captions"] for text in texts])
        norm = NORM * float(embeddings.norm(dim=1).mean())
        predict(h3, model._caption_sources(encoded), words, norm)
    model.train(was_training)


def whiten(projection: nn.Linear, inputs: torch.Tensor) -> None:
    """
    Sets a projection such that its outputs `(N, D)` for `inputs` `(N, C)` have zero mean and no correlation. Of the C
    directions the D of largest variance are kept, or if D > C all of them, rotated at random. A direction of variance
    v comes out with the variance v / (v + floor).
    """
    # In double precision, which autocast leaves alone, on the CPU, since not every accelerator has it.
    inputs = inputs.cpu().double()
    mean = inputs.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(inputs.T, correction=0))
    kept = min(projection.out_features, len(variances))
    scale = (variances + FLOOR * variances.mean()).rsqrt()
    weight = (directions * scale)[:, -kept:].T
    if kept < projection.out_features:
        rotation = torch.linalg.qr(torch.randn(projection.out_features, kept, dtype=torch.float64)).Q
        weight = rotation @ weight
    projection.weight.copy_(weight)
    projection.bias.copy_(-weight @ mean)


def predict(projection: nn.Linear, sources: torch.Tensor, targets: torch.Tensor, norm: float | None = None) -> None:
    """
    Sets a projection to the ridge regression of `targets` `(N, H)` on the mean of each image's `sources`
    `(N, cells, D)`. Its outputs for the sources differ from the mean target by vectors of this mean `norm`; by default
    that of the targets.
    """
    sources, targets = sources.cpu().double(), targets.cpu().double()
    centre, mean = sources.mean((0, 1)), targets.mean(0)
    inputs = sources.mean(1) - centre
    covariance = inputs.T @ inputs / len(inputs)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    slopes = torch.linalg.solve(covariance + ridge, inputs.T @ (targets - mean) / len(inputs))
    norm = float((targets - mean).norm(dim=1).mean()) if norm is None else norm
    slopes *= norm / ((sources - centre) @ slopes).norm(dim=-1).mean()
    projection.weight.copy_(slopes.T)
    projection.bias.copy_(mean - centre @ slopes)


def _encode(
    model: MMGEMModel, processor: MMGEMProcessor, examples: Iterator[dict[str, Any]], batch_size: int
) -> tuple[EncodedImages, list[dict[str, Any]]]:
    """The examples after the ViT, with V reduced to the k x k cells that captions see, and their captions."""
    collator = PairCollator(processor)
    parts, texts = [], []
    while batch := list(islice(examples, batch_size)):
        texts += [{name: example[name] for name in ("caption", "captions")} for example in batch]
        images = collator.images(batch)
        if "pixel_values" in images:
            pixels = images["pixel_values"].to(model.device)
            images = model.compact_features(pixels, model.config.image_grid_size)
        parts.append({name: tensor.float().to(model.device) for name, tensor in images.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return EncodedImages(joined["pooled_features"], joined.get("patch_features")), texts


def _text_states(model: MMGEMModel, processor: MMGEMProcessor, texts: list[str], batch_size: int) -> torch.Tensor:
    """The hidden states at [EMB] `(N, H)`, texts of similar length in a batch."""
    rows = processor(text=texts, padding=False, truncation=True)["input_ids"]
    states = torch.empty(len(rows), model.config.text_config.hidden_size)
    for batch in batches_by_length([len(row) for row in rows], batch_size, None):
        own = {"input_ids": [rows[i] for i in batch]}
        inputs = processor.tokenizer.pad(own, padding_side="right", return_tensors="pt").to(model.device)
        hidden: Any = model.get_text_features(**inputs).last_hidden_state
        last = torch.tensor([len(rows[i]) - 1 for i in batch])
        states[batch] = hidden[torch.arange(len(batch)), last].float().cpu()
    return states


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
