"""
A phrase with another attribute: a hard negative that differs in one word. FG-CLIP 2 (Xie et al., 2025) has a language
model write such captions of regions; here a word of colour, size, number, age, material or pattern is replaced by
another of its kind.
"""

import re

import numpy as np


KINDS = (
    ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "black", "brown", "grey", "pink"),
    ("small", "large"),
    ("big", "little"),
    ("tall", "short"),
    ("one", "two", "three", "four", "five"),
    ("young", "old"),
    ("wooden", "metal", "plastic", "stone"),
    ("striped", "dotted", "plain"),
)
OTHERS = {word: tuple(other for other in kind if other != word) for kind in KINDS for word in kind}
ATTRIBUTE = re.compile(rf"\b({'|'.join(OTHERS)})\b")


def other_attributes(phrase: str, count: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` versions of a phrase, each with one attribute replaced; none of a phrase without attributes."""
    versions = [
        f"{_with_article(phrase[: match.start()], other)}{other}{phrase[match.end() :]}"
        for match in ATTRIBUTE.finditer(phrase)
        for other in OTHERS[match[0]]
    ]
    return [versions[i] for i in rng.permutation(len(versions))[:count]]


def _with_article(opening: str, word: str) -> str:
    """What stands before a word, with "a" or "an" as the word needs it: grammar must not give a version away."""
    return re.sub(r"\b([Aa])n? $", rf"\1{'n' if word[0] in 'aeiou' and word != 'one' else ''} ", opening)
