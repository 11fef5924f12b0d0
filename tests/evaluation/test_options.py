"""The suite's options: each reaches its task, and what is wrong with one ends in a line."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value

from mmgem.evaluation.captioning import TOKENIZER
from tests.conftest import make_picture


ROOT = Path(__file__).parents[2]


def test_options_reach_their_tasks(checkpoint, run, tmp_path):
    data = ["--model", checkpoint, "--dataset_name", "scenes", "--max_samples", 6]
    metrics = run(*data, "--tasks", "long_text", "--max_lengths", 10, 30)["metrics"]
    assert metrics["long_text_10_cut"] == 1 and "long_text_30_text_to_image_R@1" in metrics
    drawn = []
    for changes in ([], ["--seed", 1]):
        run(*data, "--tasks", "captioning", "--draws", 3, *changes)
        drawn.append((tmp_path / "out" / "report.md").read_text().split("## Setting")[0])
    assert drawn[0] != drawn[1]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    annotations = [{"image_id": i, "caption": f"a dog {i}"} for i in range(3)]
    (tmp_path / "references.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for i in range(3):
        make_picture(i).save(tmp_path / f"{i}.jpg")
    data = ["--model", checkpoint, "--annotations", tmp_path / "references.json", "--image_folders", tmp_path]
    written = []
    for beams in (1, 3):
        run(*data, "--tasks", "captioning", "--num_beams", beams)
        written.append((tmp_path / "out" / "captions.json").read_text())
    assert written[0] != written[1] and "with 3 beams" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "captions.json").write_text('[{"image_id": 1, "caption": "a dog 1"}]')
    files = ["--caption_results", tmp_path / "captions.json", "--caption_references", tmp_path / "references.json"]
    results = run(*files, "--caption_subset", "true")
    assert results["metrics"]["caption_bleu2"] == 1
    assert results["setting"]["caption_subset"] is True and results["setting"]["caption_tokenizer"] == TOKENIZER
    with pytest.raises(SystemExit, match="2 of 3 images have no caption"):
        run(*files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "retrieval"], "Give --model"),
        (["--model", "x", "--dataset_name", "scenes", "--tasks", "regions,regions"], "named twice"),
        (["--model", "x", "--caption_results", "a", "--caption_references", "b"], "not both"),
        (["--model", "x"], "exactly one of dataset_name"),
        (["--model", "x", "--dataset_name", "scenes", "--tasks", "capshoning"], "Unknown task 'capshoning'"),
        (["--model", "x", "--dataset_name", "scenes", "--task", "retrieval"], "did you mean 'tasks'"),
        (["--model", "x", "--annotations", "a.json"], "--image_folders"),
        (["--caption_results", "a.json"], "give both"),
        (["--model", str(ROOT / "configs"), "--dataset_name", "scenes"], "configs is no checkpoint"),
    ],
)
def test_bad_options_end_with_a_line(run, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("batch_size:", "batch_size needs a value"),
        ("max_lengths: ['50']", "max_lengths takes a list of int, but one is '50'"),
        ("tasks: [5]", "tasks takes a list of str, but one is 5"),
        ("on: 1", "must hold a mapping of names"),
        ("seed: [1]", "seed takes one value, not a list"),
        ("model: \xe9", "is no YAML"),
        ("a: " + "[" * 10_000, "is no YAML: maximum recursion"),
    ],
)
def test_bad_settings_end_with_a_line(run, tmp_path, settings, message):
    (tmp_path / "evaluation.yaml").write_bytes(settings.encode("latin-1"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run("--config", tmp_path / "evaluation.yaml")


def test_an_output_dir_that_is_none_shows_before_the_work(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match=r"^error: .*File exists.*out"):
        run("--model", "nothing", "--dataset_name", "scenes")


def test_missing_columns_are_named(checkpoint, run, labelled):
    table = ["--model", checkpoint, "--data_file", labelled / "pets.parquet"]
    with pytest.raises(SystemExit, match=r"no column 'caption'; its columns are image, label\. Set --caption_column"):
        run(*table, "--tasks", "retrieval")
    with pytest.raises(SystemExit, match="no column 'regions'"):
        run(*table, "--tasks", "regions")
    with pytest.raises(SystemExit, match="no column 'species'"):
        run(*table, "--tasks", "classification", "--label_column", "species")
    rows = {"image": [make_picture(0)], "caption": ["a dog"]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")})).to_parquet(
        labelled / "captions.parquet"
    )
    table = ["--model", checkpoint, "--data_file", labelled / "captions.parquet", "--tasks", "long_text"]
    with pytest.raises(SystemExit, match=r"no column 'longer'.*Set --long_caption_column"):
        run(*table, "--long_caption_column", "longer")


def test_an_adapter_is_no_model(checkpoint, adapters, run):
    for adapter in adapters:
        with pytest.raises(SystemExit, match=r"region-\w+ is an adapter; give it to --adapters"):
            run("--model", adapter, "--dataset_name", "scenes", "--tasks", "regions")


def test_labels_must_be_numbers_of_classes(checkpoint, run, tmp_path):
    rows = {"image": [make_picture(0)], "label": ["dog"]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("string")})).to_parquet(
        tmp_path / "pets.parquet"
    )
    with pytest.raises(SystemExit, match=r"must hold the numbers of classes.*class_encode_column"):
        run(
            *("--model", checkpoint, "--tasks", "classification", "--data_file", tmp_path / "pets.parquet"),
            *("--class_names", "dog", "cat"),
        )
