"""
CIDEr-D, BLEU, ROUGE-L and METEOR's exact part in pure Python, as coco-caption computes them (which needs Java for its
tokenizer and for METEOR).
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import regex
from transformers.utils import logging


logger = logging.get_logger(__name__)

TOKENIZER = "mmgem-words-3"

# A character of a script without spaces is a token of its own; everything else is cut into words.
_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{_NO_SPACES}]]"
_TOKEN = regex.compile(rf"(?V1)[[\p{{L}}\p{{N}}]&&[{_NO_SPACES}]]\p{{M}}*|{_LETTER}+(?:['-]{_LETTER}+)*")

Ngrams = Counter[tuple[str, ...]]
# The tf-idf weight of each n-gram, the norm per n `(4,)`, and the length, which coco-caption counts in bigrams.
Vector = tuple[dict[tuple[str, ...], float], np.ndarray, int]


def tokenize(text: str) -> list[str]:
    """
    Lower-cased words without punctuation; "don't" (with either apostrophe) and "t-shirt" are one word each. In scripts
    without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every character is a token, with its marks. This is
    not the PTB tokenizer: scores differ from coco-caption's in the third digit.
    """
    return _TOKEN.findall(unicodedata.normalize("NFC", text).lower().replace("’", "'"))


def has_cider(references: Sequence[object], of: str = "these captions") -> bool:
    """Whether CIDEr is defined. It weighs n-grams by how few images have them, which needs two images or more."""
    if len(references) == 1:
        logger.warning(f"CIDEr of {of} is left out: it is undefined for a single image. Evaluate two or more.")
    return len(references) != 1


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], of: str = "these captions"
) -> dict[str, float]:
    """
    `caption_cider` (if it is defined: see [`has_cider`]), `caption_bleu1` to 4 and `caption_rouge_l`.

    Raises:
        ValueError: as [`cider_d`].
    """
    return {
        **({"caption_cider": cider_d(candidates, references)[0]} if has_cider(references, of) else {}),
        **{f"caption_bleu{n}": value for n, value in enumerate(bleu(candidates, references), 1)},
        "caption_rouge_l": rouge_l(candidates, references)[0],
    }


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """
    CIDEr-D (Vedantam et al., 2015): n = 1 to 4, sigma = 6, counts clipped, document frequencies from these references.

    Args:
        candidates: one caption per image.
        references: per image its reference captions.

    Returns:
        the mean over the images and the score of each, on coco-caption's scale (0 to 10; papers print it x 100).

    Raises:
        ValueError: for lists of different length or empty ones, an image without a reference, and a single image, for
            which CIDEr is undefined.
    """
    _check(candidates, references)
    weigh, reference_vectors = _weighting(references)
    scores = np.array([_similarity(weigh(text), others) for text, others in zip(candidates, reference_vectors)])
    return float(scores.mean()), scores


def best_constant_caption(references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """
    The reference that has the highest mean CIDEr-D if every image gets it: a model that looks at its image must beat
    this.

    Args:
        references: per image its reference captions.

    Returns:
        the caption and its mean CIDEr-D.

    Raises:
        ValueError: as [`cider_d`].
    """
    _check(references, references)
    weigh, reference_vectors = _weighting(references)
    # Clipping and the length penalty only lower the score. Without them, the mean similarity is linear in the
    # candidate: an upper bound that is cheap to compute, so that only few candidates need the exact score.
    mean: dict[tuple[str, ...], float] = Counter()  # type: ignore[assignment]
    for others in reference_vectors:
        for vector, norms, _ in others:
            for ngram, weight in vector.items():
                if weight > 0:
                    mean[ngram] += weight / norms[len(ngram) - 1] / len(others) / len(references)
    bounds = {}
    for caption in {caption for of_image in references for caption in of_image}:
        vector, norms, _ = weigh(caption)
        bounds[caption] = sum(2.5 * w / norms[len(n) - 1] * mean[n] for n, w in vector.items() if w > 0)
    best, highest = references[0][0], 0.0
    for caption, bound in sorted(bounds.items(), key=lambda item: (-item[1], item[0])):
        if bound <= highest:
            break
        candidate = weigh(caption)
        score = float(np.mean([_similarity(candidate, others) for others in reference_vectors]))
        if score > highest:
            best, highest = caption, score
    return best, highest


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], max_n: int = 4) -> list[float]:
    """
    Corpus BLEU-1 to BLEU-`max_n` with the brevity penalty of the closest reference length, as coco-caption.

    Raises:
        ValueError: as [`cider_d`].
    """
    _check(candidates, references)
    hits, totals = np.zeros(max_n), np.zeros(max_n)
    candidate_length = reference_length = 0
    for candidate, of_image in zip(candidates, references):
        words = tokenize(candidate)
        reference_words = [tokenize(reference) for reference in of_image]
        candidate_length += len(words)
        reference_length += min((abs(len(r) - len(words)), len(r)) for r in reference_words)[1]
        most: Ngrams = Counter()
        for reference in reference_words:
            most |= _ngrams(reference, max_n)
        for ngram, count in _ngrams(words, max_n).items():
            totals[len(ngram) - 1] += count
            hits[len(ngram) - 1] += min(count, most[ngram])
    last = max_n if hits.all() else int(np.argmin(hits > 0))  # beyond this order nothing matched
    penalty = math.exp(min(0.0, 1 - reference_length / max(candidate_length, 1)))
    precisions = hits / np.maximum(totals, 1)
    return [penalty * float(np.exp(np.log(precisions[:n]).mean())) if n <= last else 0.0 for n in range(1, max_n + 1)]


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """
    ROUGE-L (Lin, 2004) as coco-caption has it: F with beta = 1.2 of the longest common subsequence's best precision
    and best recall over the references.

    Returns:
        mean over the images and the score of each, 0 to 1.

    Raises:
        ValueError: as [`cider_d`].
    """
    _check(candidates, references)
    scores = []
    for candidate, of_image in zip(candidates, references):
        words = tokenize(candidate)
        precision = recall = 0.0
        for reference in map(tokenize, of_image):
            common = _common_subsequence(words, reference)
            precision = max(precision, common / max(len(words), 1))
            recall = max(recall, common / max(len(reference), 1))
        denominator = recall + 1.2**2 * precision
        scores.append((1 + 1.2**2) * precision * recall / denominator if denominator else 0.0)
    return float(np.mean(scores)), np.array(scores)


def meteor_exact(candidate: str, references: Sequence[str]) -> float:
    """
    METEOR (Banerjee and Lavie, 2005) by exact matches, without stems and synonyms: 10 P R / (R + 9 P) times 1 minus
    half the cube of chunks per match; the best over the references, 0 to 1.
    """
    words = tokenize(candidate)
    best = 0.0
    for reference in map(tokenize, references):
        matches = _aligned(words, reference)
        if not matches:
            continue
        precision, recall = len(matches) / len(words), len(matches) / len(reference)
        chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in pairwise(matches))
        mean = 10 * precision * recall / (recall + 9 * precision)
        best = max(best, mean * (1 - 0.5 * (chunks / len(matches)) ** 3))
    return best


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for i, other in enumerate(second, 1):
            above = row[i]
            row[i] = diagonal + 1 if word == other else max(above, row[i - 1])
            diagonal = above
    return row[-1]


def _aligned(words: list[str], reference: list[str]) -> list[tuple[int, int]]:
    """Index pairs of equal words, each used once, in the order of `words`; matched from the last on, as NLTK does."""
    free = list(range(len(reference)))
    matches = []
    for i in reversed(range(len(words))):
        for place in reversed(free):
            if reference[place] == words[i]:
                matches.append((i, place))
                free.remove(place)
                break
    return matches[::-1]


def _ngrams(words: list[str], max_n: int = 4) -> Ngrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, max_n + 1) for i in range(len(words) - n + 1))


def _weighting(references: Sequence[Sequence[str]]) -> tuple[Callable[[str], Vector], list[list[Vector]]]:
    """A function from a text to its vector, by the document frequencies of the references, and their own vectors."""
    if len(references) == 1:
        raise ValueError("CIDEr is undefined for a single image. Evaluate two or more.")
    reference_ngrams = [[_ngrams(tokenize(reference)) for reference in of_image] for of_image in references]
    frequency: Ngrams = Counter()
    for of_image in reference_ngrams:
        frequency.update({ngram for counts in of_image for ngram in counts})
    log_size = math.log(len(references))

    def vector(counts: Ngrams) -> Vector:
        weights = {ngram: count * (log_size - math.log(max(1, frequency[ngram]))) for ngram, count in counts.items()}
        norms = np.zeros(4)
        for ngram, weight in weights.items():
            norms[len(ngram) - 1] += weight**2
        return weights, np.sqrt(norms), sum(count for ngram, count in counts.items() if len(ngram) == 2)

    return lambda text: vector(_ngrams(tokenize(text))), [
        [vector(c) for c in of_image] for of_image in reference_ngrams
    ]


def _similarity(candidate: Vector, references: Sequence[Vector]) -> float:
    """CIDEr-D of one candidate with one image's references, 0 to 10."""
    weights, norms, length = candidate
    total = 0.0
    for other_weights, other_norms, other_length in references:
        dot = np.zeros(4)
        for ngram, weight in weights.items():
            if ngram in other_weights:
                dot[len(ngram) - 1] += min(weight, other_weights[ngram]) * other_weights[ngram]
        product = norms * other_norms
        cosine = np.divide(dot, product, out=np.zeros(4), where=product > 0)
        total += cosine.mean() * math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))
    return 10 * total / len(references)


def _check(candidates: Sequence[object], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"There are {len(candidates)} candidates and references for {len(references)} images; one caption per "
            "image, and at least one, is needed."
        )
    for i, of_image in enumerate(references):
        if not of_image:
            raise ValueError(f"references[{i}] is empty; every image needs a reference.")
