"""CIDEr-D and BLEU in pure Python, as coco-caption computes them (which needs Java for its tokenizer)."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


TOKENIZER = "mmgem-words-1"

# A character of a script without spaces is a token of its own (CJK, kana); everything else is cut into words.
_TOKEN = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_぀-ヿ㐀-䶿一-鿿豈-﫿]+(?:['’-][^\W_]+)*")

Ngrams = Counter[tuple[str, ...]]


def tokenize(text: str) -> list[str]:
    """
    Lower-cased words without punctuation, "don't" and "t-shirt" whole; one token per CJK character. The same for
    references and candidates, but not the PTB tokenizer: figures differ from coco-caption's in the third digit.
    """
    return _TOKEN.findall(text.lower())


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """
    CIDEr-D (Vedantam et al., 2015): n = 1 to 4, sigma = 6, counts clipped, document frequencies from these references.

    Args:
        candidates: one caption per picture.
        references: per picture its reference captions.

    Returns:
        mean over the pictures and the score of each, on coco-caption's scale (0 to 10; papers print it x 100).

    Raises:
        ValueError: for lists of different length, empty ones, or a picture without a reference.
    """
    _check(candidates, references)
    reference_ngrams = [[_ngrams(tokenize(reference)) for reference in of_image] for of_image in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for of_image in reference_ngrams:
        frequency.update({ngram for counts in of_image for ngram in counts})
    log_size = math.log(len(references))
    scores = np.zeros(len(candidates))
    for i, candidate in enumerate(candidates):
        vector, norms, length = _tf_idf(_ngrams(tokenize(candidate)), frequency, log_size)
        for counts in reference_ngrams[i]:
            other, other_norms, other_length = _tf_idf(counts, frequency, log_size)
            dot = np.zeros(4)
            for ngram, weight in vector.items():
                if ngram in other:
                    dot[len(ngram) - 1] += min(weight, other[ngram]) * other[ngram]
            product = norms * other_norms
            similarity = np.divide(dot, product, out=np.zeros(4), where=product > 0)
            scores[i] += similarity.mean() * math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))
        scores[i] *= 10 / len(reference_ngrams[i])
    return float(scores.mean()), scores


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
    penalty = (
        1.0 if candidate_length >= reference_length else math.exp(1 - reference_length / max(candidate_length, 1))
    )
    precisions = hits / np.maximum(totals, 1)
    return [penalty * float(np.exp(np.log(precisions[:n]).mean())) if n <= last else 0.0 for n in range(1, max_n + 1)]


def _ngrams(words: list[str], max_n: int = 4) -> Ngrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, max_n + 1) for i in range(len(words) - n + 1))


def _tf_idf(
    counts: Ngrams, frequency: Counter[tuple[str, ...]], log_size: float
) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
    """Weight of each n-gram, norm per n `(4,)`, and the length, which coco-caption counts in bigrams."""
    vector = {ngram: count * (log_size - math.log(max(1, frequency[ngram]))) for ngram, count in counts.items()}
    norms = np.zeros(4)
    length = 0
    for ngram, weight in vector.items():
        norms[len(ngram) - 1] += weight**2
        length += counts[ngram] if len(ngram) == 2 else 0
    return vector, np.sqrt(norms), length


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"There are {len(candidates)} candidates and references for {len(references)} pictures; one caption per "
            "picture, and at least one, is needed."
        )
    for i, of_image in enumerate(references):
        if not of_image:
            raise ValueError(f"references[{i}] is empty; every picture needs a reference.")
