"""Choices between texts, and between images, by cosine, by likelihood and by both: compositionality, questions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..data.choices import Choice, ChoiceDataset
from ..data.pairs import BadDataError
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .arguments import LIKELIHOOD_WEIGHT
from .embedding import embed_all_texts, embed_dataset, evaluating
from .likelihood import combined, logit_scale_of, pair_likelihoods
from .report import BLACK, CELL, GREEN, GREY, LINE, Section, empty_sheet, evenly_spaced, paste, table, write_text
from .retrieval import TIE


WAYS = ("cosine", "likelihood", "both")


def evaluate_choices(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: ChoiceDataset,
    batch_size: int = 64,
    weight: float = LIKELIHOOD_WEIGHT,
    alpha: float = 0.0,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    How often the right text has the highest score, for an image, a tie counting as wrong. Scores are cosines,
    [`MMGEMModel.score`] ("likelihood"), and cosine / tau + `weight` x likelihood ("both"). If there are several
    processes, all must call it.

    Args:
        alpha: of the prior, as in [`MMGEMModel.score`]; without it, likelihood prefers the likelier sentence.

    Returns:
        the metrics: `choices_{way}` over all images; `choices_{way}_mean_per_kind`, the mean over the choices' kinds
        if there are several (ARO's macro accuracy also leaves out symmetric and rare relations); and for choices of as
        many images as texts, as Winoground defines them, `choices_{way}_text`, `_image` and `_group`: the share of
        choices in which the right texts win for all images, the right images for all texts, and both. And outputs:
        `indices` of the choices whose images can be read, per way their `scores`, each `(images, texts)`, and `ties`,
        the differences that are none.

    Raises:
        BadDataError: if no choice can be used.
    """
    found = embed_choices(model, processor, dataset, [choice.texts for choice in dataset.choices], batch_size, alpha)
    choices = [dataset.choices[i] for i in found.indices]
    by_way = {"cosine": found.cosines.double(), "likelihood": found.likelihoods.double()}
    by_way["both"] = combined(model, found.cosines, found.likelihoods, weight)
    ties = dict(zip(WAYS, (TIE, TIE, TIE * (logit_scale_of(model) + weight))))
    sizes = [len(choice.images) * len(choice.texts) for choice in choices]
    metrics: dict[str, float] = {}
    scores: dict[str, list[torch.Tensor]] = {}
    for way, of_pairs in by_way.items():
        parts = of_pairs.split(sizes)
        scores[way] = [part.view(len(choice.images), -1) for part, choice in zip(parts, choices)]
        of_way = _metrics(scores[way], choices, ties[way])
        metrics.update({f"choices_{way}{name}": value for name, value in of_way.items()})
    return metrics, {"indices": found.indices, "scores": scores, "ties": ties}


class EmbeddedChoices(NamedTuple):
    """Of the choices whose images can be read (`indices`): scores of all pairs of image and text, image by image."""

    indices: list[int]
    cosines: torch.Tensor
    likelihoods: torch.Tensor


def embed_choices(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: ChoiceDataset,
    sentences: Sequence[Sequence[str]],
    batch_size: int,
    alpha: float,
) -> EmbeddedChoices:
    """
    Args:
        sentences: the texts of each choice, as the model is to read them.

    Raises:
        BadDataError: if no choice can be used.
    """
    with evaluating(model):
        readable, images = embed_dataset(model, processor, dataset, batch_size, read=dataset.image)
        place = {index: i for i, index in enumerate(readable)}
        used = [i for i, choice in enumerate(dataset.choices) if all(index in place for index in choice.images)]
        if not used:
            raise BadDataError("No choice has all of its images: some of each cannot be read.")
        texts = list(dict.fromkeys(text for i in used for text in sentences[i]))
        column = {text: i for i, text in enumerate(texts)}
        named = ((image, text) for i in used for image in dataset.choices[i].images for text in sentences[i])
        pairs = torch.tensor([(place[image], column[text]) for image, text in named])
        embeds = embed_all_texts(model, processor, texts, batch_size)
        shown = dataset.select(readable)
        likelihoods = pair_likelihoods(model, processor, shown, texts, pairs, batch_size, alpha, read=shown.image)
    return EmbeddedChoices(used, (images[pairs[:, 0]] * embeds[pairs[:, 1]]).sum(-1), likelihoods)


def _metrics(scores: Sequence[torch.Tensor], choices: Sequence[Choice], tie: float) -> dict[str, float]:
    by_text = [right_texts(matrix, tie) for matrix in scores]
    metrics = {"": torch.cat(by_text).double().mean().item()}
    of_kind: dict[str, list[torch.Tensor]] = {}
    for choice, right in zip(choices, by_text):
        of_kind.setdefault(choice.kind, []).append(right)
    if len(of_kind) > 1:
        means = [torch.cat(rights).double().mean() for rights in of_kind.values()]
        metrics["_mean_per_kind"] = torch.stack(means).mean().item()
    square = [i for i, choice in enumerate(choices) if len(choice.images) > 1]
    if square:
        texts = torch.stack([by_text[i].all() for i in square])
        images = torch.stack([right_texts(scores[i].T, tie).all() for i in square])
        shares = {"_text": texts, "_image": images, "_group": texts & images}
        metrics.update({name: right.double().mean().item() for name, right in shares.items()})
    return metrics


def right_texts(scores: torch.Tensor, tie: float) -> torch.Tensor:
    """`(N,)` of scores `(N, M)`: whether score i of row i is above all others of its row."""
    own = scores.diagonal()
    return (scores >= own[:, None] - tie).sum(1) == 1


def choices_section(metrics: dict[str, float], outputs: dict[str, Any], dataset: ChoiceDataset) -> Section:
    """A table of the metrics and of the kinds, and `choices.png`; both are those of [`evaluate_choices`]."""
    choices = [dataset.choices[i] for i in outputs["indices"]]
    kinds = list(dict.fromkeys(choice.kind for choice in choices))
    lines = [*table(metrics), ""]
    if 1 < len(kinds) <= 50:
        lines += [f"| kind | choices | {' | '.join(WAYS)} |", "|---" * 5 + "|"]
        for kind in kinds:
            own = [i for i, choice in enumerate(choices) if choice.kind == kind]
            scores, ties = outputs["scores"], outputs["ties"]
            shares = [torch.cat([right_texts(scores[way][i], ties[way]) for i in own]) for way in WAYS]
            lines.append(f"| {kind} | {len(own)} | {' | '.join(f'{s.double().mean():.3f}' for s in shares)} |")
        lines.append("")
    lines.append(
        "Of each image the right text and the others, with cosine and log P per token; green where both choose it."
    )
    return Section("Choices", metrics, lines, {"choices.png": choices_sheet(dataset, outputs)})


def choices_sheet(dataset: ChoiceDataset, outputs: dict[str, Any], count: int = 12) -> Image.Image:
    """Images with their texts and scores."""
    chosen = evenly_spaced(count, len(outputs["indices"]))
    sheet, corners = empty_sheet(len(chosen), 2, CELL + 330, CELL + 16)
    for row, (left, top) in zip(chosen, corners):
        choice = dataset.choices[outputs["indices"][row]]
        cosines, likelihoods, both = (outputs["scores"][way][row][0] for way in WAYS)
        paste(sheet, dataset.image(choice.images[0]), left, top)
        below = top
        for i, text in enumerate(choice.texts[:5]):
            colour = GREY if i else GREEN if int(both.argmax()) == 0 else BLACK
            figures = f"({cosines[i]:.2f}, {likelihoods[i]:.2f})"
            below = write_text(sheet, f"{text} {figures}", left + CELL + 10, below, colour, 48, 3) + LINE // 2
    return sheet
