"""results.json, report.md and the figures of a whole evaluation."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.evaluator import caption_metrics, evaluate_model
from mmgem.evaluation.report import GREEN, Section, class_sheet, pair_sections, write_report
from tests.conftest import Table, make_model, make_picture


@pytest.fixture
def dataset():
    return PairDataset(ScenesDataset("test", 12, 32))


def test_evaluation_does_not_depend_on_the_batch_size(processor, dataset):
    model = make_model(processor).train()
    processor.max_length = 120
    few, one = (evaluate_model(model, processor, dataset, batch_size=b, caption_samples=4) for b in (5, 1))
    processor.max_length = 50
    assert model.training, "the mode it came in"
    assert few[0] == pytest.approx(one[0], abs=1e-5)
    assert few[1]["captions"] == one[1]["captions"] and len(few[1]["captions"]) == 4
    assert few[1]["text_embeds"].shape == few[1]["image_embeds"].shape == (12, 16)


def test_unreadable_pictures_are_left_out_with_their_captions(processor):
    rows = [{"image": make_picture(i), "caption": [f"number {i}", f"the {i}th of them"]} for i in range(6)]
    model = make_model(processor)
    expected, _ = evaluate_model(model, processor, PairDataset(Table(rows[:1] + rows[2:5])), 2, caption_samples=9)
    rows[1]["image"], rows[5]["caption"] = b"no picture", [" "]
    metrics, outputs = evaluate_model(model, processor, PairDataset(Table(rows)), 2, caption_samples=9)
    assert outputs["indices"] == [0, 2, 3, 4] and len(outputs["captions"]) == 4
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_report_holds_metrics_setting_and_pictures(processor, dataset, tmp_path):
    texts = torch.nn.functional.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    outputs = {
        "text_embeds": texts,
        "image_embeds": texts.clone(),
        "text_to_image": torch.arange(12),
        "indices": list(range(12)),
        "captions": [c[0] for c in dataset.captions()],
    }
    metrics = {"text_to_image_R@1": 1.0, "caption_cider": 2.5}
    sections = pair_sections(metrics, outputs, dataset)
    path = write_report(str(tmp_path / "new"), "Of a test", sections, {"seed": 3})
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results == {"metrics": metrics, "setting": {"seed": 3}}
    report = Path(path).read_text()
    assert "| text_to_image_R@1 | 1 |" in report and "| seed | 3 |" in report
    with pytest.raises(ValueError, match="Two sections have the metric caption_cider"):
        write_report(str(tmp_path / "new"), "Of a test", [*sections, sections[1]], {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(str(tmp_path / "nan"), "Of a test", [Section("A", {"a": float("nan")}, [], {})], {})
    for name in ("captions.png", "retrieval.png"):
        assert f"![]({name})" in report
        assert Image.open(tmp_path / "new" / name).size[0] > 600
    frame = [pixel for _, pixel in Image.open(tmp_path / "new" / "retrieval.png").getcolors(10**6)]
    assert GREEN in frame, "the right picture is marked"


def test_sheet_of_classes_marks_what_is_right(dataset):
    def colours(predicted):
        outputs = {"labels": torch.zeros(12), "predicted": torch.full((12,), float(predicted))}
        return {pixel for _, pixel in class_sheet(dataset, outputs, ["a dog", "a cat"]).getcolors(10**6)}

    assert GREEN in colours(0) and GREEN not in colours(1)


def test_object_f1_counts_pairs_over_the_whole_set():
    references = ["a small red star above a large blue circle", "a large white cross left of a small red star"]
    assert ScenesDataset.caption_metrics(references, references)["caption_object_f1"] == 1
    # 2 of 4 named are right: red star once, nothing in the second.
    captions = ["a large red star above a large red circle", "a small cyan star left of a small white star"]
    assert ScenesDataset.caption_metrics(captions, references)["caption_object_f1"] == pytest.approx(2 * 1 / (4 + 4))
    assert ScenesDataset.caption_metrics(["", ""], references)["caption_object_f1"] == 0


def test_perfect_captions_are_perfect(dataset):
    captions = [c[0] for c in dataset.captions()]
    metrics = caption_metrics(captions, dataset)
    assert metrics["caption_cider"] == pytest.approx(10)
    assert [metrics[f"caption_{name}"] for name in ("bleu4", "distinct", "object_f1", "exact")] == [1, 1, 1, 1]
