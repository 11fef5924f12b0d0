"""Objects that captions invent (CHAIR), and yes/no questions about objects (POPE)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..data.choices import ChoiceDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .choices import embed_choices


# What captions call COCO's categories beside their names: our own list, shorter than that of Rohrbach et al.
SYNONYMS = {
    "person": "man woman boy girl child kid baby toddler people lady guy player skier surfer skateboarder rider",
    "bicycle": "bike",
    "car": "automobile taxi suv sedan",
    "motorcycle": "motorbike scooter",
    "airplane": "plane jet aircraft",
    "train": "locomotive",
    "truck": "pickup",
    "boat": "ship canoe kayak sailboat",
    "traffic light": "stoplight",
    "bird": "duck seagull pigeon owl parrot goose",
    "cat": "kitten",
    "dog": "puppy",
    "horse": "pony foal",
    "sheep": "lamb",
    "cow": "bull calf cattle",
    "backpack": "rucksack",
    "handbag": "purse",
    "tie": "necktie",
    "suitcase": "luggage",
    "skis": "ski",
    "sports ball": "ball",
    "tennis racket": "racket racquet",
    "cup": "mug",
    "couch": "sofa",
    "potted plant": "houseplant",
    "dining table": "table desk",
    "tv": "television",
    "laptop": "computer",
    "cell phone": "phone cellphone smartphone",
    "refrigerator": "fridge",
    "donut": "doughnut",
    "hair drier": "hairdryer",
}
# Of words that are objects alone, but not in these.
OTHERWISE = (
    *("ball player", "ball game", "ball field", "ball park", "home plate", "train track", "train station"),
    *("ski slope", "bus stop", "toy car", "hot dog bun"),
)
PLURALS = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "knives": "knife",
    "geese": "goose",
    "buses": "bus",
}


def chair(
    captions: Sequence[str],
    objects: Sequence[Iterable[str]],
    references: Sequence[Sequence[str]],
    names: Iterable[str],
) -> dict[str, float]:
    """
    CHAIR (Rohrbach et al., 2018): what captions name that is neither among an image's objects nor in a reference.

    Args:
        captions: of the images.
        objects: names of the categories in each image, such as those of COCO's instances.
        references: texts that people wrote of it.
        names: all categories. COCO's are recognised by some synonyms too, others by their names.

    Returns:
        `caption_chair_i`, the share of the objects named that are not there, and `caption_chair_s`, the share of
        captions that name one.
    """
    words = object_words(names)
    invented = named = faulty = 0
    for caption, present, texts in zip(captions, objects, references, strict=True):
        there = {*present, *(name for text in texts for name in objects_named(text, words))}
        found = objects_named(caption, words)
        wrong = sum(name not in there for name in found)
        invented, named, faulty = invented + wrong, named + len(found), faulty + bool(wrong)
    return {"caption_chair_i": invented / max(named, 1), "caption_chair_s": faulty / max(len(captions), 1)}


def object_words(names: Iterable[str]) -> dict[tuple[str, ...], str]:
    """The words of every category and of its synonyms, and what they name; "" for [`OTHERWISE`]."""
    words = {tuple(phrase.split()): "" for phrase in OTHERWISE}
    for name in names:
        for phrase in (name.lower(), *SYNONYMS.get(name, "").split()):
            words[tuple(map(_singular, phrase.split()))] = name
    return words


def objects_named(text: str, words: dict[tuple[str, ...], str]) -> list[str]:
    """The categories that a text names, in their order; of overlapping words the longest count."""
    tokens = [_singular(token) for token in re.findall(r"[a-z]+", text.lower())]
    longest, found, i = max(map(len, words)), [], 0
    while i < len(tokens):
        length = next((n for n in range(longest, 0, -1) if tuple(tokens[i : i + n]) in words), 0)
        if length and (name := words[tuple(tokens[i : i + length])]):
            found.append(name)
        i += max(length, 1)
    return found


def _singular(word: str) -> str:
    if word in PLURALS:
        return PLURALS[word]
    for ending, kept in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + kept
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def evaluate_questions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: ChoiceDataset,
    template: str = "a photo of a {}.",
    batch_size: int = 64,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    POPE (Li et al., 2023): "Is there a dog in the image?" A model that writes captions says yes where the object's
    sentence is likelier with the image than without it: log P(text | image) > log P(text). If there are several
    processes, all must call it.

    Args:
        dataset: choices of one image and the object as their only text; their kind is the right answer, "yes" or "no".
        template: the sentence, with `{}` for the object.

    Returns:
        the metrics: `pope_accuracy`, `pope_precision`, `pope_recall` and `pope_f1` of yes, `pope_yes`, the share of
        yes, and the area under the ROC curve, which needs no threshold, by likelihood (`pope_auc`) and by cosine
        (`pope_cosine_auc`). And outputs: `indices` of the questions whose image can be read, and their `scores`.

    Raises:
        BadDataError: if no image can be read.
        ValueError: for a template without `{}`.
    """
    if "{}" not in template:
        raise ValueError(f"The template {template!r} has no {{}} for the name of the object.")
    sentences = [[template.replace("{}", text) for text in choice.texts] for choice in dataset.choices]
    indices, cosines, scores = embed_choices(model, processor, dataset, sentences, batch_size, alpha=1.0)
    questions = [dataset.choices[i] for i in indices]
    right = torch.tensor([question.kind == "yes" for question in questions])
    metrics = yes_no_metrics(scores > 0, right)
    metrics |= {"pope_auc": area_under_curve(scores, right), "pope_cosine_auc": area_under_curve(cosines, right)}
    return metrics, {"indices": indices, "scores": scores}


def yes_no_metrics(answers: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """POPE's figures of answers `(N,)` and right answers `(N,)`, True for yes."""
    hits, said, there = (int(x.sum()) for x in (answers & right, answers, right))
    precision, recall = hits / max(said, 1), hits / max(there, 1)
    return {
        "pope_accuracy": (answers == right).double().mean().item(),
        "pope_precision": precision,
        "pope_recall": recall,
        "pope_f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "pope_yes": said / len(answers),
    }


def area_under_curve(scores: torch.Tensor, right: torch.Tensor) -> float:
    """How often a right one has a higher score than a wrong one, equal scores counting half; 0.5 without either."""
    yes, no = scores[right], scores[~right]
    if not len(yes) or not len(no):
        return 0.5
    ordered = no.sort().values
    below, up_to = (torch.searchsorted(ordered, yes, right=side) for side in (False, True))
    return ((below + up_to).double() / 2 / len(no)).mean().item()
