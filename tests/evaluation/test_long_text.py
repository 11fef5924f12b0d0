"""Long captions, and captions that the model chooses itself."""

import pytest
import torch

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.captioning import cider_d
from mmgem.evaluation.evaluator import draw_captions, evaluate_long_text, evaluate_reranking
from mmgem.evaluation.retrieval import retrieval_metrics
from tests.conftest import Table, make_model, make_picture


@torch.no_grad()
def test_long_text_at_each_length_and_by_words(processor):
    model = make_model(processor)
    texts = [" ".join(["dog"] * 30 + [word]) for word in ("cat", "beach", "snow", "mat")]
    texts[3] = " ".join(["people"] * 120)
    rows = Table([{"image": make_picture(i), "caption": text} for i, text in enumerate(texts)])
    rows.insert(1, {"image": b"no picture", "caption": "a dog"})
    metrics, outputs = evaluate_long_text(model, processor, PairDataset(rows), 2, max_lengths=(20, 100))
    assert outputs["indices"] == [0, 2, 3, 4] and outputs["words"] == [31, 31, 31, 120]
    images = model.get_embedding(**processor(images=[make_picture(i) for i in range(4)], return_tensors="pt"))
    embeds = model.get_embedding(**processor(text=texts, max_length=100, return_tensors="pt"))
    expected = retrieval_metrics(embeds, images, torch.arange(4))
    assert {k: metrics[f"long_text_100_{k}"] for k in expected} == expected
    cut = model.get_embedding(**processor(text=texts, max_length=20, truncation=True, return_tensors="pt"))
    expected = retrieval_metrics(cut, images, torch.arange(4))
    assert {k: metrics[f"long_text_20_{k}"] for k in expected} == expected
    assert not torch.equal(cut[0], embeds[0]) and torch.equal(cut[0], cut[1]), "cut before they differ"
    assert metrics["long_text_20_cut"] == 1 and metrics["long_text_100_cut"] == 0.25
    best = (embeds @ images.T).argmax(1) == torch.arange(4)
    assert metrics["long_text_100_R@1_0_to_49_words"] == pytest.approx(best[:3].float().mean().item())
    assert metrics["long_text_100_R@1_100_to_149_words"] == float(best[3])
    assert not any("whole_box" in name for name in metrics)
    rows[0]["caption"] = "狗在雪地上" * 12
    _, outputs = evaluate_long_text(model, processor, PairDataset(rows), 2, max_lengths=(20,))
    assert outputs["words"] == [60, 31, 31, 120], "in scripts without spaces a character is a word"
    for i, words in enumerate((49, 50, 100, 149)):
        rows[i + (i > 0)]["caption"] = " ".join(["dog"] * words)
    metrics, outputs = evaluate_long_text(model, processor, PairDataset(rows), 2, max_lengths=(20,))
    assert outputs["words"] == [49, 50, 100, 149]
    of_words = [name.removeprefix("long_text_20_R@1_") for name in metrics if name.endswith("_words")]
    assert of_words == ["0_to_49_words", "50_to_99_words", "100_to_149_words"]
    rows[0]["caption"] = " ".join(["dog"] * 50)
    metrics, _ = evaluate_long_text(model, processor, PairDataset(rows), 2, max_lengths=(20,))
    assert "long_text_20_R@1_0_to_49_words" not in metrics


@torch.no_grad()
def test_whole_box_goes_through_h4(processor):
    model = make_model(processor)
    dataset = PairDataset(ScenesDataset("test", 6, 32), caption_column="long_caption")
    options = {"max_lengths": (200,), "whole_image_box": True}
    same, _ = evaluate_long_text(model, processor, dataset, 4, **options)
    with torch.no_grad():
        model.region_projection.weight.copy_(-torch.eye(16))
    turned, _ = evaluate_long_text(model, processor, dataset, 4, **options)
    for name, value in same.items():
        if "whole_box" not in name:
            assert turned[name] == value
    images = model.get_embedding(**processor(images=[dataset[i]["image"] for i in range(6)], return_tensors="pt"))
    texts = [of[0] for of in dataset.captions()]
    embeds = model.get_embedding(**processor(text=texts, max_length=200, return_tensors="pt"))
    for metrics, pictures in ((same, images), (turned, -images)):
        expected = retrieval_metrics(embeds, pictures, torch.arange(6))
        assert {name: metrics[f"long_text_200_whole_box_{name}"] for name in expected} == expected


@torch.no_grad()
def test_draws_depend_on_seed_and_picture_alone_and_the_nearest_comes_first(processor):
    model = make_model(processor)
    dataset = PairDataset(ScenesDataset("test", 4, 32))
    before = torch.random.get_rng_state()
    drawn = draw_captions(model, processor, dataset, 4, 5, max_new_tokens=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn[2:3] == draw_captions(model, processor, dataset.select([0, 1, 2]), 3, 5, max_new_tokens=6)[2:]
    assert drawn != draw_captions(model, processor, dataset, 4, 5, seed=1, max_new_tokens=6)
    for i, of_picture in enumerate(drawn):
        cosines = [of.cosine for of in of_picture]
        assert len(cosines) == 5 and cosines == sorted(cosines, reverse=True)
        picture = dataset[i]["image"]
        image = model.get_embedding(**processor(images=[picture], return_tensors="pt"))[0]
        first = next(of for of in of_picture if of.text)
        text = model.get_embedding(**processor(text=[first.text], return_tensors="pt"))[0]
        assert first.cosine == pytest.approx(float(image @ text), abs=1e-5)
        inputs = processor(images=[picture], text=[first.text], task="score", return_tensors="pt")
        assert first.likelihood == pytest.approx(float(model.score(**inputs)), abs=1e-4)


def test_figures_of_reranking(processor):
    model = make_model(processor).train()
    dataset = PairDataset(ScenesDataset("test", 4, 32))
    metrics, drawn = evaluate_reranking(model, processor, dataset, 4, 3, max_new_tokens=6)
    assert model.training
    references = dataset.captions()
    scores = [cider_d([of[k].text for of in drawn], references)[1] for k in range(3)]
    scale = float(model.logit_scale.weight.exp())
    best = [max(range(3), key=lambda k: scale * of[k].cosine + 8 * of[k].likelihood) for of in drawn]
    chosen = sum(scores[k][i] for i, k in enumerate(best)) / 4
    assert metrics["caption_cider_reranked_both"] == pytest.approx(chosen, abs=1e-6)
    assert metrics["caption_cider_reranked"] == pytest.approx(scores[0].mean(), abs=1e-6)
    assert metrics["caption_cider_drawn"] == pytest.approx(sum(s.mean() for s in scores) / 3, abs=1e-6)
    assert metrics["caption_cider_drawn_best"] >= metrics["caption_cider_reranked"]
