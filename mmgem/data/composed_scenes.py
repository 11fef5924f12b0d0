"""
Composed scenes: a drawn scene, a change in words, and the scene after it. No download, deterministic by seed.

    query    a scene, and "but the star is blue", "without the circle" or "with the square above the star"
    target   the scene after this change, drawn anew: another tint, other noise
    negative a near miss: the same scene after another change, of the same kind where there is one

All three belong to the same split (see `scenes.py`): no held-out combination of objects occurs in training.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .scenes import (
    CANVAS,
    COLOURS,
    SPLITS,
    Scene,
    SceneObject,
    are_apart,
    draw,
    in_order,
    is_plain,
    relation,
    sample_scene,
)


TRIES = 20  # at a change of a scene before another scene is drawn


class Triplet(NamedTuple):
    """A scene, the change in words, the scene after it, and a near miss."""

    query: Scene
    text: str
    target: Scene
    negative: Scene


# Of one object under its name: the change in words and the objects after it, or None where it does not fit.
Change = Callable[[Scene, SceneObject, str, np.random.Generator], tuple[str, Sequence[SceneObject]] | None]


class ComposedScenesDataset(torch.utils.data.Dataset):
    """
    `size` triplets of a split, "train", "validation" or "test", with the columns of a [`TripletDataset`]. In the
    held-out splits, the captions of all targets and near misses are distinct.

    Raises:
        ValueError: for an unknown split.
    """

    column_names = ("query_image", "query_text", "target_image", "negative_image")

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0):
        if split not in SPLITS[:3]:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS[:3])}.")
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.held_out: list[Triplet] = []
        if split == "train":  # whose triplets are made when they are needed
            return
        taken: set[str] = set()
        for index in range(size):
            rng = self._generator(index)
            while True:
                triplet = _sample_triplet(rng, split)
                captions = {triplet.target.caption, triplet.negative.caption}
                if not captions & taken:
                    break
            taken |= captions
            self.held_out.append(triplet)

    def __len__(self) -> int:
        return self.size

    def triplet(self, index: int) -> Triplet:
        """The scenes of example `index`, and the change in words."""
        return self.held_out[index] if self.held_out else _sample_triplet(self._generator(index), self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        query, text, target, negative = self.triplet(index)
        images = (Image.fromarray(draw(scene, self.image_size)[0]) for scene in (query, target, negative))
        return {"query_text": text, **dict(zip(("query_image", "target_image", "negative_image"), images))}

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, 1])


def _sample_triplet(rng: np.random.Generator, split: str) -> Triplet:
    at_least = 1 if split == "train" else 2  # single objects are all in train
    while True:
        scene = sample_scene(rng, at_least, 4)
        for _ in range(TRIES if scene.split == split else 0):
            kind = CHANGES[rng.integers(len(CHANGES))]
            changed = changed_scene(scene, kind, rng)
            if changed is not None and changed[1].split == split:
                near = _near_miss(scene, kind, *changed, rng)
                if near is not None:
                    return Triplet(scene, *changed, near)


def _near_miss(scene: Scene, kind: Change, text: str, target: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene after another change, of the same kind if one is found, in the split of the target."""
    for attempt in range(4 * TRIES):
        changed = changed_scene(scene, kind if attempt < 2 * TRIES else CHANGES[rng.integers(len(CHANGES))], rng)
        if changed is None or changed[0] == text or changed[1].caption == target.caption:
            continue
        if changed[1].split == target.split:
            return changed[1]
    return None


def changed_scene(scene: Scene, change: Change, rng: np.random.Generator) -> tuple[str, Scene] | None:
    """A change of one object in words, and the scene after it; None where it does not fit or cannot be told."""
    item = scene.objects[rng.integers(len(scene.objects))]
    name = _name(item, scene.objects)
    found = None if name is None else change(scene, item, name, rng)
    if found is None:
        return None
    text, objects = found
    after = in_order(objects)
    if not all(is_plain(a, b) for a, b in pairwise(after)):
        return None
    changed = replace(scene, objects=tuple(after), seed=int(rng.integers(2**31)))
    return None if changed.caption == scene.caption else (text, changed)


def recolour(
    scene: Scene, item: SceneObject, name: str, rng: np.random.Generator
) -> tuple[str, Sequence[SceneObject]] | None:
    colours = [colour for colour in COLOURS if colour != item.colour]
    colour = colours[rng.integers(len(colours))]
    objects = [replace(other, colour=colour) if other is item else other for other in scene.objects]
    return f"but the {name} is {colour}", objects


def remove(
    scene: Scene, item: SceneObject, name: str, rng: np.random.Generator
) -> tuple[str, Sequence[SceneObject]] | None:
    rest = [other for other in scene.objects if other is not item]
    return (f"without the {name}", rest) if rest else None


def move(
    scene: Scene, item: SceneObject, name: str, rng: np.random.Generator
) -> tuple[str, Sequence[SceneObject]] | None:
    rest = [other for other in scene.objects if other is not item]
    if not rest:
        return None
    beside = rest[rng.integers(len(rest))]
    beside_name = _name(beside, scene.objects)
    if beside_name is None:
        return None
    for _ in range(20):
        x, y = rng.uniform(item.radius + 1, CANVAS - item.radius - 1, 2)
        moved = replace(item, x=float(x), y=float(y))
        is_new = relation(moved, beside) != relation(item, beside) and is_plain(moved, beside)
        if is_new and all(are_apart(moved, other) for other in rest):
            return f"with the {name} {relation(moved, beside)} the {beside_name}", [*rest, moved]
    return None


CHANGES: tuple[Change, ...] = (recolour, remove, move)


def _name(item: SceneObject, objects: Sequence[SceneObject]) -> str | None:
    """The shortest words that fit no other object: "star", "red star", "small red star"."""
    for start in (2, 1, 0):
        words = item.phrase.split()[start:]
        if sum(other.phrase.split()[start:] == words for other in objects) == 1:
            return " ".join(words)
    return None
