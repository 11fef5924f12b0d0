"""The model card: what it says of the model, and that its code runs."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from mmgem.hub.export import export
from mmgem.hub.model_card import CardOptions
from mmgem.hub.remote_code import add_to_json

from ..conftest import make_picture
from .conftest import REGION_RESULTS, REPO_ID, RESULTS, TRAINING, environment, run_clean, write_json


def test_metadata(exported):
    data = ModelCard.load(exported / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", None)
    assert data.base_model == TRAINING["base_models"] and data.datasets == TRAINING["dataset_ids"]
    assert data.model_name == "mm-gem" and "sentence-transformers" in data.tags
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    expected = {("pairs.parquet", name): value for name, value in RESULTS["metrics"].items()}
    expected |= {("scenes", name): value for name, value in REGION_RESULTS["metrics"].items()}
    assert found == expected
    assert {r.dataset_type for r in data.eval_results} == {"unknown"}, "neither is on the Hub"
    tasks = {r.metric_name: r.task_type for r in data.eval_results}
    assert tasks["text_to_image_R@1"] == "image-text-retrieval" and tasks["caption_cider"] == "image-to-text"
    assert tasks["region_caption_exact"] == tasks["stage_1_region_caption_exact"] == "region-captioning"


def test_text(exported, trained):
    text = (exported / "README.md").read_text()
    assert "of/somebody" not in text and str(trained) not in text, "nobody's folders"
    assert "| region_caption_exact | 0 | 0.75 |" in text, "before and after"
    assert "| steps x batch size | 5 x 8 |" in text and "a card of the test's" in text and "0.2 min" in text
    assert "clip_vision_model, 2 layers of 32, 32 px in patches of 8" in text
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (exported / link).is_file()
    assert "2405.19333" in text and "prompt `<image>[CAP]`" in text
    assert "an image is one visual token, a region" in text


def test_a_model_of_which_nothing_is_known(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (run / name).write_bytes((trained / name).read_bytes())
    for name in ("config.json", "processor_config.json"):
        add_to_json(run / name, {"image_grid_size": 2})
    options = CardOptions(license="mit", language=["en", "de"], limits="Never saw a cat.")
    export(str(run), REPO_ID, str(tmp_path / "hub"), options=options)
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert card.data.license == "mit" and card.data.language == ["en", "de"] and card.data.eval_results is None
    for sentence in ("is not recorded", "was not evaluated", "Never saw a cat."):
        assert sentence in card.text
    assert "an image is 2 x 2 visual tokens" in card.text
    assert "region-caption" not in card.text and "images/" not in card.text
    export(str(run), REPO_ID, str(tmp_path / "hub"))
    assert ModelCard.load(tmp_path / "hub/README.md").data.license is None, "who knows where it comes from"
    write_json(run / "training.json", {**TRAINING, "base_models": [], "from_scratch": True})
    export(str(run), REPO_ID, str(tmp_path / "hub"))
    assert ModelCard.load(tmp_path / "hub/README.md").data.license == "apache-2.0"
    assert (tmp_path / "hub/LICENSE").exists() and not (tmp_path / "hub/LICENSE_CODE").exists()
    assert "auto_map" in json.loads((tmp_path / "hub/config.json").read_text())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", {"metrics": []}, r"run.results\.json: metrics must be numbers"),
        ("results.json", {"metrics": {"R@1": None}}, r"run.results\.json: metrics must be numbers"),
        ("results.json", {"metrics": {"R@1": float("nan")}}, r"run.results\.json: metrics must be numbers"),
        ("training.json", {**TRAINING, "base_models": None}, r"run.training\.json is not as train\.py writes it"),
        ("results.json", {"setting": None}, r"run.results\.json: setting must be an object"),
        ("results.json", [1], r"run.results\.json must hold a JSON object"),
        ("training.json", {"steps": "five"}, r"run.training\.json is not as train\.py writes it"),
        ("training.json", {**TRAINING, "settings": None}, r"run.training\.json is not as train\.py writes it"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_named(trained, tmp_path, file, content, message):
    shutil.copytree(trained, tmp_path / "run")
    write_json(tmp_path / "run" / file, content)
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))


def test_metrics_of_a_suite_are_not_said_to_be_of_the_dataset(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    setting = {"dataset": "org/pairs", "dataset_id": "org/pairs", "classification_suite": [{"name": "birds"}]}
    metrics = {"text_to_image_R@1": 0.5, "classification_birds_top1": 0.25}
    write_json(tmp_path / "run/results.json", {"metrics": metrics, "setting": setting})
    export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"), adapters=[])
    results = ModelCard.load(tmp_path / "hub/README.md").data.eval_results
    found = {r.metric_name: (r.dataset_name, r.dataset_type) for r in results}
    assert found["text_to_image_R@1"] == ("org/pairs", "org/pairs")
    assert found["classification_birds_top1"] == ("a suite of data sets", "unknown")


def test_data_of_an_adapter_is_not_taken_for_the_models(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    write_json(tmp_path / "run/region-caption/training.json", {**TRAINING, "data": ["scenes"]})
    export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))
    assert "knows nothing else" not in (tmp_path / "hub/README.md").read_text()
    write_json(tmp_path / "run/training.json", {**TRAINING, "data": ["scenes"]})
    export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))
    assert "knows nothing else" in (tmp_path / "hub/README.md").read_text()


def test_a_card_of_ones_own(trained, tmp_path):
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    export(str(trained), REPO_ID, str(tmp_path / "hub"), options=CardOptions(model_card=str(tmp_path / "mine.md")))
    assert (tmp_path / "hub/README.md").read_text().endswith("# Mine\n")
    (tmp_path / "mine.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="metadata at the top of the model card"):
        export(str(trained), REPO_ID, str(tmp_path / "hub"), options=CardOptions(model_card=str(tmp_path / "mine.md")))


@pytest.mark.slow  # a process that imports everything
def test_every_example_runs_where_mmgem_is_not_installed(pushed, tmp_path):
    hub, _, home = pushed
    make_picture(2).save(tmp_path / "picture.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (home / "hub/README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    result = run_clean("\n".join(blocks), tmp_path, environment(hub, tmp_path / "home"))
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tensor([[") and lines[1].startswith("['") and "'caption':" in result.stdout
    assert "Traceback" not in result.stderr
