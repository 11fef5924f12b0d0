"""
Scenes: drawn images of coloured shapes with captions and regions. No download, deterministic by seed.

Captions name the objects in order, the large ones first, then from left to right: "a large white cross below a small
blue star". So an image has one true caption. What is held out never occurs in training: a caption, read in either
direction, belongs to one split by its hash.
"""

import copy
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image


CANVAS = 64.0  # scenes are described in units of a 64-pixel canvas, whatever size they are drawn at
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (220, 45, 45),
    "green": (50, 170, 60),
    "blue": (55, 85, 235),
    "yellow": (240, 220, 50),
    "purple": (155, 60, 200),
    "orange": (245, 140, 30),
    "cyan": (60, 215, 225),
    "white": (240, 240, 240),
}
SIZES = {"small": 8.5, "large": 13.5}
TEXTURES = ("plain", "horizontally striped", "vertically striped", "dotted", "shaded")
TONES = {"very dark": 18, "dark": 38, "dim": 58}
SPLITS = ("train", "validation", "test", "single")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
GAP = 1.5  # least distance between two objects
MARGIN = 4.0  # |dx| and |dy| of neighbours in a caption differ by this much, so that the relation is plain


@dataclass(frozen=True)
class SceneObject:
    """One shape; its centre in canvas units."""

    size: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Half the side of the square it is drawn in."""
        return SIZES[self.size]

    @property
    def phrase(self) -> str:
        """As captions name it."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What there is to draw; `seed` is that of jitter and noise."""

    objects: tuple[SceneObject, ...]
    tone: str
    texture: str
    seed: int

    @property
    def caption(self) -> str:
        """Objects in order, joined by the relation of each to the next."""
        words = [f"a {self.objects[0].phrase}"]
        for first, second in zip(self.objects, self.objects[1:]):
            words.append(f"{relation(first, second)} a {second.phrase}")
        return " ".join(words)

    @cached_property
    def long_caption(self) -> str:
        """See [`describe`]."""
        return describe(self)

    @property
    def captions(self) -> list[str]:
        """The short and the long one."""
        return [self.caption, self.long_caption]

    @property
    def label(self) -> int:
        """The first object's colour and shape, an index into `CLASSES`."""
        return CLASSES.index(f"{self.objects[0].colour} {self.objects[0].shape}")

    @property
    def split(self) -> str:
        """Where this caption may occur: single objects and 8 of 10 others in train."""
        if len(self.objects) == 1:
            return "train"
        backwards = Scene(self.objects[::-1], self.tone, self.texture, self.seed)
        bucket = zlib.crc32(min(self.caption, backwards.caption).encode()) % 10
        return {0: "validation", 1: "test"}.get(bucket, "train")


class ScenesDataset(torch.utils.data.Dataset):
    """
    `size` scenes of a split: "train" (1 to 4 objects), "validation" or "test" (2 to 4, all captions distinct), or
    "single" (one each, to be classified; such captions occur in training, these images do not).

    An example is `{"image", "caption", "long_caption", "captions", "label", "regions"}`: a PIL image of `image_size`
    pixels per side, the caption, 100 to 200 words, both in a list, the place of the first object's colour and shape in
    `CLASSES`, and per object `{"box": [x0, y0, x1, y1], "mask": (height, width) bool, "phrase", "label"}`, in pixels.
    `dataset["caption"]` gives a whole column of `features` without drawing anything.

    A built-in dataset (`mmgem.data.loading.BUILT_IN`) has `column_names`, `features` and `select_columns` like a
    `datasets.Dataset`, the split and the templates of its zero-shot classification, and, if it has metrics of its own,
    `caption_metrics` and `region_caption_metrics`, which the evaluation calls with texts and their references.

    Raises:
        ValueError: for an unknown split or column.
    """

    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "long_caption": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    column_names = ("image", *features, "regions")
    labelled_split = "single"
    class_templates = ("a small {}", "a large {}")

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        self.image_size = image_size
        self.split = split
        self.scenes: list[Scene] = []
        taken: set[str] = set()
        counts = {"train": (1, 4), "single": (1, 1)}.get(split, (2, 4))
        for index in range(size):
            rng = np.random.default_rng([seed, SPLITS.index(split), index])
            scene = sample_scene(rng, *counts)
            while split != "single" and (scene.split != split or (split != "train" and scene.caption in taken)):
                scene = sample_scene(rng, *counts)
            taken.add(scene.caption)
            self.scenes.append(scene)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            if index not in self.features:
                raise ValueError(f"Scenes have no column {index!r}; without drawing: {', '.join(self.features)}.")
            return [getattr(scene, index) for scene in self.scenes]
        scene = self.scenes[index]
        pixels, masks = draw(scene, self.image_size)
        example: dict[str, Any] = {"image": Image.fromarray(pixels)}
        example |= {name: getattr(scene, name) for name in self.features if name in self.column_names}
        if "regions" in self.column_names:
            example["regions"] = [
                {"box": box_of(mask), "mask": mask, "phrase": f"a {item.phrase}", "label": item.shape}
                for item, mask in zip(scene.objects, masks)
            ]
        return example

    def select_columns(self, column_names: Sequence[str]) -> "ScenesDataset":
        """The same scenes, whose examples have the image and these columns; the others are not made."""
        chosen = copy.copy(self)
        chosen.column_names = tuple(name for name in self.column_names if name in ("image", *column_names))
        return chosen

    @staticmethod
    def caption_metrics(captions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """F1 of the (colour, shape) pairs named, counted over the whole set, and the share of exact captions."""
        hits = named = present = 0
        for found, expected in zip(map(parse_objects, captions), map(parse_objects, references)):
            hits += (found & expected).total()
            named += found.total()
            present += expected.total()
        exact = sum(caption == reference for caption, reference in zip(captions, references))
        return {"caption_object_f1": 2 * hits / max(named + present, 1), "caption_exact": exact / len(captions)}

    @staticmethod
    def region_caption_metrics(captions: Sequence[str], phrases: Sequence[str]) -> dict[str, float]:
        """How often size, colour and shape are named right."""
        metrics = {}
        for name, words in {"size": {*SIZES}, "colour": {*COLOURS}, "shape": {*SHAPES}}.items():
            pairs = zip(captions, phrases)
            right = sum({*caption.split()} & words == {*phrase.split()} & words for caption, phrase in pairs)
            metrics[f"region_caption_{name}"] = right / len(captions)
        return metrics


def parse_objects(caption: str) -> Counter[tuple[str, str]]:
    """The (colour, shape) pairs that a text names; a colour counts with the next shape, unless another one follows."""
    pairs: Counter[tuple[str, str]] = Counter()
    colour = None
    for word in re.findall(r"[a-z]+", caption.lower()):
        if word in COLOURS:
            colour = word
        elif word in SHAPES and colour is not None:
            pairs[colour, word] += 1
            colour = None
    return pairs


def relation(first: SceneObject, second: SceneObject) -> str:
    """Where `first` lies, seen from `second`: the larger offset decides."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def sample_scene(rng: np.random.Generator, at_least: int = 1, at_most: int = 4) -> Scene:
    """1 to 4 objects (weights 1:3:2:1) that fit without touching, those that the caption relates plainly placed."""
    weights = np.array([1, 3, 2, 1])[at_least - 1 : at_most]
    count = int(rng.choice(np.arange(at_least, at_most + 1), p=weights / weights.sum()))
    colours, sizes = list(COLOURS), list(SIZES)
    while True:
        objects: list[SceneObject] = []
        for _ in range(40):
            size = sizes[rng.integers(len(sizes))]
            low, high = SIZES[size] + 1, CANVAS - SIZES[size] - 1
            x, y = rng.uniform(low, high, 2)
            colour, shape = colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))]
            new = SceneObject(size, colour, shape, float(x), float(y))
            if all(are_apart(new, other) for other in objects):
                objects.append(new)
            if len(objects) == count:
                objects = in_order(objects)
                if not all(is_plain(a, b) for a, b in itertools.pairwise(objects)):
                    break
                tone = list(TONES)[rng.integers(len(TONES))]
                texture = TEXTURES[rng.integers(len(TEXTURES))]
                return Scene(tuple(objects), tone, texture, int(rng.integers(2**31)))


def in_order(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """As captions name them: the large ones first, then from left to right."""
    return sorted(objects, key=lambda item: (item.size == "small", item.x))


def are_apart(a: SceneObject, b: SceneObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + GAP


def is_plain(a: SceneObject, b: SceneObject) -> bool:
    return abs(abs(a.x - b.x) - abs(a.y - b.y)) >= MARGIN


def draw(scene: Scene, image_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The image `(image_size, image_size, 3)` uint8 and each object's mask `(image_size, image_size)` bool."""
    rng = np.random.default_rng(scene.seed)
    scale = image_size / CANVAS
    pixels = _background(scene, image_size, rng)
    masks = []
    for item in scene.objects:
        colour = np.array(COLOURS[item.colour]) * rng.uniform(0.75, 1.0) + rng.uniform(-10, 10, 3)
        reach = item.radius + 1
        left, right = max(int((item.x - reach) * scale), 0), min(int((item.x + reach + 1) * scale), image_size)
        top, bottom = max(int((item.y - reach) * scale), 0), min(int((item.y + reach + 1) * scale), image_size)
        u = (np.arange(left, right) + 0.5) / scale - item.x
        v = (np.arange(top, bottom) + 0.5) / scale - item.y
        depth = inside(item.shape, u[None], v[:, None], item.radius) * scale
        cover = np.clip(depth + 0.5, 0, 1)[..., None]  # anti-aliased edge, one pixel wide
        window = pixels[top:bottom, left:right]
        window += cover * (colour - window)
        mask = np.zeros((image_size, image_size), dtype=bool)
        mask[top:bottom, left:right] = depth >= 0
        masks.append(mask)
    pixels += rng.integers(-8, 9, pixels.shape, dtype=np.int8)
    return pixels.clip(0, 255).astype(np.uint8), masks


def inside(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the edge in canvas units, positive inside; (u, v) from the centre, v downwards."""
    if shape == "circle":
        return radius - np.hypot(u, v)
    if shape == "square":
        return 0.85 * radius - np.maximum(abs(u), abs(v))
    if shape == "diamond":
        return (radius - abs(u) - abs(v)) / np.sqrt(2)
    if shape == "cross":
        arm = 0.32 * radius
        across = np.minimum(radius - abs(u), arm - abs(v))
        return np.maximum(across, np.minimum(arm - abs(u), radius - abs(v)))
    if shape == "triangle":
        slope = np.array([2.0, 1.0]) / np.sqrt(5)
        sides = slope[0] * (radius / 2 - abs(u)) + slope[1] * v
        return np.minimum(sides, 0.9 * radius - v)
    # A five-pointed star is what lies within at least four of its five edge lines.
    angles = -np.pi / 2 + 2 * np.pi * np.arange(5) / 5
    lines = radius * np.cos(2 * np.pi / 5) - (np.cos(angles) * u[..., None] + np.sin(angles) * v[..., None])
    return np.sort(lines, -1)[..., 1]


def _background(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """A dark ground of random hue with a faint texture, `(size, size, 3)` float."""
    tint = TONES[scene.tone] * rng.uniform(0.4, 1.6, 3)
    axis = np.arange(size) * (CANVAS / size)
    row, column = axis[:, None], axis[None]
    period = 2 * np.pi / rng.uniform(6, 12)
    wave = {
        "plain": lambda: np.zeros((1, 1)),
        "horizontally striped": lambda: np.sign(np.sin(row * period)),
        "vertically striped": lambda: np.sign(np.sin(column * period)),
        "dotted": lambda: np.sign(np.sin(row * period) * np.sin(column * period) - 0.5),
        "shaded": lambda: (row + column) / CANVAS - 1,
    }[scene.texture]()
    ground = np.empty((size, size, 3), dtype=np.float32)
    ground[:] = tint + 9.0 * wave[..., None]
    return ground


def box_of(mask: np.ndarray) -> list[float]:
    """`[x0, y0, x1, y1]` around a mask, in pixels; x1 and y1 are the far edges."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def describe(scene: Scene) -> str:
    """100 to 200 words: the ground, and every object's place, size, colour, shape and nearest neighbour."""
    rng = np.random.default_rng([scene.seed, 1])
    count = len(scene.objects)
    number = ("one object", "two objects", "three objects", "four objects")[count - 1]
    ground = f"a {scene.tone}, {scene.texture} ground"
    sentences = [
        (
            f"This is a computer drawing of {number} on {ground}.",
            f"On {ground} one can see {number}, drawn by a program.",
        )[rng.integers(2)]
    ]
    for item in scene.objects:
        text = (
            f"Near the {place(item)} of the picture there is a {item.shape}, which is {item.size} and {item.colour}",
            f"A {item.shape} of {item.size} size, {item.colour} all over, lies at the {place(item)} of the picture",
        )[rng.integers(2)]
        others = [other for other in scene.objects if other is not item]
        if others:
            nearest = min(others, key=lambda other: (other.x - item.x) ** 2 + (other.y - item.y) ** 2)
            text += f"; the object nearest to it is the {nearest.phrase}, and it is {relation(item, nearest)} that one"
        sentences.append(text + ".")
    colours = sorted({item.colour for item in scene.objects})
    absent = [shape for shape in SHAPES if all(item.shape != shape for item in scene.objects)]
    larges = sum(item.size == "large" for item in scene.objects)
    details = [
        f"The ground behind is {scene.texture} and {scene.tone}, with a little noise over every part of it.",
        f"Of the objects {larges} are large and {count - larges} are small.",
        f"The colours of the objects are {', '.join(colours)}, and no other colour stands out from the dark behind.",
        "All edges are clean, nothing covers anything else, and every object is wholly inside the frame.",
        f"There is no {', no '.join(absent)} anywhere in this picture.",
        "There are no people, animals or letters, only flat shapes as in a child's book about forms and colours.",
        "The light is even, nothing throws a shadow, and nothing suggests that any of the shapes is about to move.",
    ]
    for detail in details:
        if len(" ".join(sentences).split()) >= 120:
            break
        sentences.append(detail)
    return " ".join(sentences)


def place(item: SceneObject) -> str:
    """Which ninth of the image the centre lies in: "top left", "right", "centre"."""
    vertical = ("top", "", "bottom")[int(item.y * 3 / CANVAS)]
    horizontal = ("left", "", "right")[int(item.x * 3 / CANVAS)]
    return f"{vertical} {horizontal}".strip() or "centre"
