"""Swapped scenes: a drawn scene, its caption, and the caption of a scene with the same words in other places."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from .choices import Choice, ChoiceDataset
from .composed_scenes import TRIES, changed_scene, move, remove
from .scenes import SPLITS, Scene, SceneObject, are_apart, draw, sample_scene


KINDS = ("colour", "relation", "count")


def swapped_scenes(split: str, size: int, image_size: int = 64, seed: int = 0) -> ChoiceDataset:
    """
    `size` choices between two captions, in turn with swapped colours of two objects, another relation between two, and
    an object more or less. Both captions are those of scenes of the split, so that no text alone gives itself away.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS[:3]:
        raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS[:3])}.")
    images, choices = [], []
    for index in range(size):
        rng = np.random.default_rng([seed, SPLITS.index(split), index, 2])
        kind = KINDS[index % len(KINDS)]
        scene, other = _sample_pair(rng, split, kind)
        images.append({"image": Image.fromarray(draw(scene, image_size)[0])})
        choices.append(Choice([index], [scene.caption, other.caption], kind))
    return ChoiceDataset(images, choices)


def _sample_pair(rng: np.random.Generator, split: str, kind: str) -> tuple[Scene, Scene]:
    change = {"colour": _swap_colours, "relation": move, "count": _add_or_remove}[kind]
    while True:
        scene = sample_scene(rng, 2, 4)
        for _ in range(TRIES if scene.split == split else 0):
            changed = changed_scene(scene, change, rng)
            if changed is not None and changed[1].split == split:
                return scene, changed[1]


def _swap_colours(
    scene: Scene, item: SceneObject, name: str, rng: np.random.Generator
) -> tuple[str, Sequence[SceneObject]] | None:
    others = [other for other in scene.objects if other.colour != item.colour]
    if not others:
        return None
    other = others[rng.integers(len(others))]
    swapped = {item: replace(item, colour=other.colour), other: replace(other, colour=item.colour)}
    return "", [swapped.get(one, one) for one in scene.objects]


def _add_or_remove(
    scene: Scene, item: SceneObject, name: str, rng: np.random.Generator
) -> tuple[str, Sequence[SceneObject]] | None:
    if len(scene.objects) > 2 and rng.random() < 0.5:
        return remove(scene, item, name, rng)
    if len(scene.objects) == 4:
        return None
    new = sample_scene(rng, 1, 1).objects[0]
    return ("", [*scene.objects, new]) if all(are_apart(new, other) for other in scene.objects) else None
