"""Zero-shot classification: the class whose sentences lie nearest to the image (Radford et al., 2021)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers.utils import logging

from ..data.pairs import PairDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from ..processing.tokenization_mmgem import as_sentence
from .embedding import embed_all_texts, embed_dataset, evaluating
from .retrieval import TIE, check_finite


logger = logging.get_logger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)
RESAMPLES = 1000


def classification_metrics(
    scores: torch.Tensor, labels: torch.Tensor, seed: int = 0, tie: float = 0.0
) -> dict[str, float]:
    """
    Args:
        scores (`torch.Tensor` of shape `(N, C)`): of each image for each class, such as cosines or probabilities.
        labels (`torch.LongTensor` of shape `(N,)`): the right classes.
        seed: of the bootstrap.
        tie: scores that differ by no more are equal.

    Returns:
        `top1` and `top5` (with more than five classes) as fractions of the images, a tie counting as wrong;
        `mean_per_class`, the mean top1 of the classes; and `top1_low` and `top1_high`, the 95 % interval of top1 over
        1,000 bootstrap resamples of the images.

    Raises:
        ValueError: for scores that are not finite, or a label that is no class.
    """
    scores, labels = scores.cpu(), labels.cpu()
    check_finite(scores, [f"image {i}" for i in range(len(scores))], "rows of scores")
    wrong = ((labels < 0) | (labels >= scores.shape[1])).nonzero().flatten().tolist()
    if len(labels) != len(scores) or not len(scores) or wrong:
        found = f"; label {int(labels[wrong[0]])} of image {wrong[0]} is none" if wrong else ""
        wanted = f"{len(scores)} images need as many labels, of {scores.shape[1]} classes"
        raise ValueError(f"{wanted}; there are {len(labels)}{found}.")
    own = scores.gather(1, labels[:, None])
    rank = (scores >= own - tie).sum(1)
    first = (rank == 1).double()
    sums = torch.zeros(scores.shape[1], dtype=torch.float64).index_add(0, labels, first)
    counts = torch.bincount(labels, minlength=scores.shape[1])
    # The number of right images among N drawn with replacement is binomial.
    resampled = np.random.default_rng(seed).binomial(len(first), first.mean().item(), RESAMPLES) / len(first)
    low, high = np.quantile(resampled, (0.025, 0.975)).tolist()
    metrics = {"top1": first.mean().item()}
    if scores.shape[1] > 5:
        metrics["top5"] = (rank <= 5).double().mean().item()
    metrics["mean_per_class"] = (sums / counts)[counts > 0].mean().item()
    return {**metrics, "top1_low": low, "top1_high": high}


def class_embeddings(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> torch.Tensor:
    """
    `(C, D)`: the normalised mean of each class's sentences.

    Raises:
        ValueError: for a class without a name, or a template without `{}`.
    """
    for i, name in enumerate(class_names):
        if not isinstance(name, str) or not as_sentence(name):
            raise ValueError(f"Class {i} has no name; give class_names, one for each label.")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no {{}} for the name of the class.")
    sentences = [template.replace("{}", as_sentence(name)) for name in class_names for template in templates]
    embeds = embed_all_texts(model, processor, sentences, batch_size)
    return normalize(embeds.view(len(class_names), len(templates), -1).mean(1), dim=-1)


def evaluate_classification(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    labels: Sequence[int],
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    [`classification_metrics`] of the images of `dataset` that can be read; `labels[i]` is the class of image i.
    Classes of the same name are merged, unlike in CLIP's evaluation, which counts the second "sunglasses" of ImageNet
    as wrong.

    Returns:
        the metrics, and `indices` of the images that were used, their `labels` and the classes `predicted`, as indices
        into the merged `class_names`, and their `cosines` `(N, C)`.
    """
    if wrong := [i for i, label in enumerate(labels) if label is None or not 0 <= label < len(class_names)]:
        raise ValueError(
            f"{len(wrong)} of {len(labels)} labels are no class from 0 to {len(class_names) - 1}, such as "
            f"{labels[wrong[0]]} of image {wrong[0]}."
        )
    names = list(dict.fromkeys(class_names))
    if len(names) < len(class_names):
        logger.warning(f"{len(class_names) - len(names)} classes have the name of another, and count as one.")
    number = {name: i for i, name in enumerate(names)}
    with evaluating(model):
        classes = class_embeddings(model, processor, names, templates, batch_size)
        indices, images = embed_dataset(model, processor, dataset, batch_size, read=dataset.image)
    cosines = images @ classes.T
    right = torch.tensor([number[class_names[labels[i]]] for i in indices])
    outputs = {"indices": indices, "labels": right, "predicted": cosines.argmax(1), "class_names": names}
    return classification_metrics(cosines, right, tie=TIE), {**outputs, "cosines": cosines}
