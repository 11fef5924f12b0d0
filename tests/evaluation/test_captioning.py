"""Caption metrics against their formulas, written out slowly, and against others' code."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem.evaluation.captioning import best_constant_caption, bleu, cider_d, meteor_exact, rouge_l, tokenize


REFERENCES = [
    ["a dog runs on the beach", "the brown dog is running on sand", "a dog at the sea"],
    ["two people ride bicycles", "people on red bicycles in a street"],
    ["a cat sleeps on the red sofa", "the cat is asleep on a sofa", "a sleeping cat"],
    ["a boat in the harbour at night"],
]
CANDIDATES = ["a brown dog runs on sand", "two dogs ride on the beach", "a cat on a sofa a cat on a sofa", ""]


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d_by_definition(candidates, references):
    """Equations 1 to 4 of the CIDEr paper with the -D changes, one n at a time."""
    scores = []
    for candidate, of_image in zip(candidates, references):
        total = 0.0
        for n in range(1, 5):

            def weights(text, n=n):
                def idf(gram):
                    df = sum(any(gram in grams(r, n) for r in refs) for refs in references)
                    return math.log(len(references) / max(1, df))

                return {gram: count * idf(gram) for gram, count in grams(text, n).items()}

            c = weights(candidate)
            for reference in of_image:
                r = weights(reference)
                dot = sum(min(c[g], r[g]) * r[g] for g in c if g in r)
                norm = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in r.values()))
                difference = max(len(candidate.split()) - 1, 0) - max(len(reference.split()) - 1, 0)
                similarity = dot / norm if norm else 0.0
                total += similarity * math.exp(-(difference**2) / 72) / len(of_image) / 4
        scores.append(10 * total)
    return scores


def test_cider_d_equals_its_definition():
    mean, scores = cider_d(CANDIDATES, REFERENCES)
    np.testing.assert_allclose(scores, cider_d_by_definition(CANDIDATES, REFERENCES), atol=1e-12)
    assert mean == pytest.approx(scores.mean()) and scores[3] == 0


def test_best_constant_caption_is_the_best_of_all_references():
    rng = np.random.default_rng(0)
    words = ["a", "dog", "cat", "runs", "sleeps", "on", "the", "red", "blue", "sofa", "beach"]
    references = [[" ".join(rng.choice(words, rng.integers(3, 9))) for _ in range(3)] for _ in range(30)]
    means = {c: cider_d([c] * len(references), references)[0] for of_image in references for c in of_image}
    caption, score = best_constant_caption(references)
    assert score == pytest.approx(max(means.values())) and means[caption] == pytest.approx(score)


def test_cider_d_prefers_the_right_picture_and_is_10_at_best():
    perfect = [of_image[0] for of_image in REFERENCES]
    mean, scores = cider_d(perfect, REFERENCES)
    assert scores[3] == pytest.approx(10)
    assert cider_d(perfect[::-1], REFERENCES)[0] < mean / 5
    order = [2, 0, 3, 1]
    shuffled = cider_d([CANDIDATES[i] for i in order], [REFERENCES[i] for i in order])[1]
    np.testing.assert_allclose(shuffled, cider_d(CANDIDATES, REFERENCES)[1][order])


def test_cider_d_clips_repetition():
    once, many = (cider_d([text, *CANDIDATES[1:]], REFERENCES)[1][0] for text in ("dog sand", "dog dog dog dog sand"))
    assert many < once


def test_bleu_by_hand():
    # "the the the the" against "the cat the mat": 2 of 4 unigrams count.
    assert bleu(["the the the the"], [["the cat the mat"]])[0] == pytest.approx(0.5)
    # Equal to a reference: 1 at every order.
    assert bleu(["a dog runs on the beach"], [REFERENCES[0]]) == pytest.approx([1, 1, 1, 1])
    # Three of five words and one of four bigrams, no trigram; the closest reference is as long.
    scores = bleu(["a cat sat the mat"], [["a dog sat on the", "x"]])
    assert scores[0] == pytest.approx(3 / 5) and scores[1:] == pytest.approx([0, 0, 0])
    # Half as long as its reference: brevity penalty exp(1 - 2).
    assert bleu(["a dog runs"], [["a dog runs on the beach"]])[0] == pytest.approx(math.exp(-1))
    assert bleu([""], [["a dog"]]) == [0, 0, 0, 0]


def test_bleu_pools_counts_over_the_corpus():
    candidates, references = ["a dog runs", "the cat"], [["a dog runs fast"], ["the black cat", "a cat"]]
    bigrams = Counter(pairwise(["a", "dog", "runs"])), Counter(pairwise(["the", "cat"]))
    hits = 2 + 0
    assert sum(map(Counter.total, bigrams)) == 3
    expected = math.exp(1 - 6 / 5) * math.sqrt(5 / 5 * hits / 3)
    assert bleu(candidates, references, max_n=2)[1] == pytest.approx(expected)


def test_tokenize():
    assert tokenize("A man, in a T-shirt, doesn't run .") == ["a", "man", "in", "a", "t-shirt", "doesn't", "run"]
    assert tokenize("It doesn’t run") == ["it", "doesn't", "run"], "as with the other apostrophe"
    assert tokenize("一只狗在海滩 Café") == ["一", "只", "狗", "在", "海", "滩", "café"]


def test_tokenize_scripts_without_spaces_and_marks():
    assert tokenize("カメラを見る・ﾈｺ") == ["カ", "メ", "ラ", "を", "見", "る", "ﾈ", "ｺ"]
    assert tokenize("สุนัข") == ["สุ", "นั", "ข"] and tokenize("कुत्ता दौड़ता है") == ["कुत्ता", "दौड़ता", "है"]
    assert tokenize("cafe\u0301 \U00020000") == ["café", "\U00020000"]
    # Differing in a vowel sign is differing.
    assert cider_d(["वह का", "x"], [["वह की"], ["y z"]])[1][0] < 5


def test_errors_name_the_offender():
    with pytest.raises(ValueError, match="1 candidates and references for 2"):
        cider_d(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"references\[1\] is empty"):
        bleu(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="0 candidates"):
        cider_d([], [])


WORDS = ["a", "dog", "cat", "runs", "sleeps", "on", "the", "red", "blue", "sofa", "beach", "with", "two"]


def corpus(seed, pictures=30):
    """Captions and references of few words, so that many n-grams match."""
    rng = np.random.default_rng(seed)
    text = lambda: " ".join(rng.choice(WORDS, rng.integers(2, 12)))  # noqa: E731
    references = [[text() for _ in range(rng.integers(1, 6))] for _ in range(pictures)]
    return [text() if rng.random() < 0.7 else of[0] for of in references], references


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_coco_captions_own_python(seed):
    """Where its Java tokenizer has nothing to do: lower-case words with single spaces."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = corpus(seed)
    results = {i: [caption] for i, caption in enumerate(candidates)}
    of_images = dict(enumerate(references))
    mean, scores = Cider().compute_score(of_images, results)
    assert cider_d(candidates, references)[0] == pytest.approx(mean, rel=1e-6)
    np.testing.assert_allclose(cider_d(candidates, references)[1], scores, atol=1e-6)
    theirs, _ = Bleu(4).compute_score(of_images, results, verbose=0)
    assert bleu(candidates, references) == pytest.approx(theirs, abs=1e-6)
    mean, scores = Rouge().compute_score(of_images, results)
    np.testing.assert_allclose(rouge_l(candidates, references)[1], scores, atol=1e-9)
    assert rouge_l(candidates, references)[0] == pytest.approx(mean)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_equals_sacrebleu(seed):
    from sacrebleu.metrics import BLEU

    candidates, references = corpus(seed)
    longest = max(map(len, references))
    columns = [[of[i] if i < len(of) else None for of in references] for i in range(longest)]
    score = BLEU(tokenize="none", smooth_method="none").corpus_score(candidates, columns)
    assert bleu(candidates, references)[3] == pytest.approx(score.score / 100, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_meteors_exact_part_equals_nltks(seed):
    from nltk.translate.meteor_score import meteor_score

    class Nothing:
        def stem(self, word):
            return word

        def synsets(self, word):
            return []

    for candidate, of_image in zip(*corpus(seed, 100)):
        words = [reference.split() for reference in of_image]
        theirs = meteor_score(words, candidate.split(), stemmer=Nothing(), wordnet=Nothing())
        assert meteor_exact(candidate, of_image) == pytest.approx(theirs, abs=1e-9)


def test_rouge_l_and_meteor_by_hand():
    # Three of four words of the candidate, three of five of the reference, in order.
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(["a dog sees sand"], [["a brown dog on sand"]])[0] == pytest.approx(expected)
    assert rouge_l(["", "a dog"], [["a dog"], ["two cats"]])[0] == 0
    # Two matches in two chunks: 10 P R / (R + 9 P) of P = 1 and R = 2/3, halved.
    assert meteor_exact("dog a", ["a brown dog"]) == pytest.approx(10 * 2 / 3 / (2 / 3 + 9) * (1 - 0.5))
    assert meteor_exact("a dog", ["cats", "a dog"]) == pytest.approx(1 - 0.5 * (1 / 2) ** 3)
    assert meteor_exact("", ["a dog"]) == 0


def test_captions_without_spaces_are_scored_by_their_characters():
    references = [["一只狗在海滩上跑"], ["两个人骑自行车"], ["ねこが寝ている"]]
    perfect = [of[0] for of in references]
    assert cider_d(perfect, references)[0] == pytest.approx(10)
    assert bleu(perfect, references) == pytest.approx([1] * 4)
    near = ["一只狗在海滩上睡", *perfect[1:]]
    assert 0.7 < rouge_l(near, references)[1][0] < 1 and 0 < cider_d(near, references)[1][0] < 10


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.randoms(use_true_random=False))
def test_order_changes_nothing_and_a_perfect_caption_lowers_nothing(seed, order):
    candidates, references = corpus(seed, 8)
    references = [of_image[:1] for of_image in references]
    places = list(range(8))
    order.shuffle(places)
    shuffled = [[side[i] for i in places] for side in (candidates, references)]
    for metric in (cider_d, rouge_l):
        assert metric(*shuffled)[0] == pytest.approx(metric(candidates, references)[0])
    assert bleu(*shuffled) == pytest.approx(bleu(candidates, references))
    perfect = [references[0][0], *candidates[1:]]
    for metric in (cider_d, rouge_l):
        assert metric(perfect, references)[0] >= metric(candidates, references)[0] - 1e-9
    assert bleu(perfect, references)[0] >= bleu([references[0][0][:-1], *candidates[1:]], references)[0] - 1e-9
    assert rouge_l(perfect, references)[1][0] == pytest.approx(1)
