"""The suite as a user runs it: from Python, from the command line, in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation import METRICS
from mmgem.evaluation.__main__ import main
from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.evaluation.captioning import cider_d
from mmgem.evaluation.classification import classification_metrics
from mmgem.evaluation.dense_captioning import dense_captioning_map
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.evaluation.retrieval import retrieval_metrics
from mmgem.evaluation.sharing import own_part
from mmgem.training.region_adapters import add_region_adapter
from tests.conftest import make_model, make_picture
from tests.evaluation.two_processes import all_metrics


ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(processor, tmp_path):
    make_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command line, in this process; returns results.json's content."""

    def run(*arguments):
        command = ["mmgem.evaluation", *map(str, arguments), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        main()
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def test_two_processes_and_any_batch_give_the_same_figures(processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = ["-m", "tests.evaluation.two_processes", str(tmp_path / "processor"), str(tmp_path)]
    run = subprocess.Popen([*command, *script], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    length, processor.max_length = processor.max_length, 20
    one, many = all_metrics(processor, 1), all_metrics(processor, 64)
    processor.max_length = length
    assert run.wait(timeout=300) == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "both have the whole"
    for other in (many, first):
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, abs=0 if "R@" in name or "top" in name else 1e-4), name


def test_parts_are_a_partition():
    assert list(own_part(7)) == list(range(7))


def test_every_task_on_scenes(checkpoint, processor, run, tmp_path, capsys):
    for stage in ("region-caption", "region-retrieval"):
        adapter = add_region_adapter(make_model(processor), stage, 1)
        adapter.save_pretrained(tmp_path / stage)
    results = run(
        *("--model", checkpoint, "--adapters", tmp_path / "region-caption", tmp_path / "region-retrieval"),
        *("--tasks", "retrieval,classification,captioning", "long_text", "regions", "--dataset_name", "scenes"),
        *("--max_samples", 12, "--max_length", 20, "--draws", 2, "--caption_samples", 4),
    )
    metrics = results["metrics"]
    wanted = {"text_to_image_R@1", "classification_top1", "caption_cider", "caption_cider_reranked", "caption_loss"}
    wanted |= {"long_text_50_text_to_image_R@1", "long_text_200_whole_box_text_to_image_R@1", "pointing_game"}
    wanted |= {"region_caption_exact", "stage_1_region_caption_exact", "dense_captioning_map", "caption_rouge_l"}
    assert wanted <= metrics.keys()
    setting = results["setting"]
    assert setting["dataset"] == "scenes" and setting["max_length"] == 20 and setting["processes"] == 1
    report = (tmp_path / "out" / "report.md").read_text()
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["captions.png", "classification.png", "heat_maps.png", "regions.png", "retrieval.png"]
    assert all(f"![]({name})" in report and PILImage.open(tmp_path / "out" / name).size[0] > 300 for name in pictures)
    assert "text_to_image_R@1" in capsys.readouterr().out
    length, processor.max_length = processor.max_length, 20
    expected, _ = evaluate_model(make_model(processor), processor, PairDataset(ScenesDataset("test", 12, 32)))
    processor.max_length = length
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_karpathy_protocol_takes_five_captions_of_each_picture(checkpoint, run, tmp_path):
    (tmp_path / "images").mkdir()
    images = []
    for i in range(11):
        make_picture(i).save(tmp_path / "images" / f"{i}.jpg")
        sentences = [{"raw": f"picture {i} in words {k}"} for k in range(7)]
        images.append({"filename": f"{i}.jpg", "split": "test" if i else "train", "sentences": sentences})
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    data = ["--annotations", tmp_path / "dataset_flickr8k.json", "--image_folders", tmp_path / "images"]
    run("--model", checkpoint, "--tasks", "retrieval", *data)
    assert "10 pictures, 50 captions" in (tmp_path / "out" / "report.md").read_text()
    run("--model", checkpoint, "--tasks", "retrieval", *data, "--captions_per_image", 7)
    assert "10 pictures, 70 captions" in (tmp_path / "out" / "report.md").read_text()


def test_coco_annotations_leave_a_results_file_that_scores_the_same(checkpoint, run, tmp_path):
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(4):
        make_picture(i).save(tmp_path / "images" / f"{i:012}.jpg")
        domain = ("in-domain", "near-domain", "out-domain", "out-domain")[i]
        images.append({"id": i, "file_name": f"{i:012}.jpg", "domain": domain})
        annotations += [{"image_id": i, "caption": f"a dog on a beach {k} {i}"} for k in range(2)]
    references = tmp_path / "nocaps.json"
    references.write_text(json.dumps({"images": images, "annotations": annotations}))
    data = ["--annotations", references, "--image_folders", tmp_path / "images"]
    metrics = run("--model", checkpoint, "--tasks", "captioning", *data)["metrics"]
    file = tmp_path / "captions.json"
    os.replace(tmp_path / "out" / "captions.json", file)
    assert [row["image_id"] for row in json.loads(file.read_text())] == [0, 1, 2, 3]
    scored = run("--caption_results", file, "--caption_references", references)["metrics"]
    assert "caption_cider_out_domain" in scored
    assert scored == {name: pytest.approx(metrics[name]) for name in scored}


@pytest.fixture
def labelled(tmp_path):
    """A folder of `datasets` with pictures of three classes, and a suite of it twice."""
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "red_bicycle", "cat"])})
    rows = {"image": [make_picture(i) for i in range(9)], "label": [i % 3 for i in range(9)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pets.parquet")
    other = {"templates": ["{} on a beach"], "class_names": ["snow", "mat", "people"]}
    suite = [
        {"name": "pets", "data_file": str(tmp_path / "pets.parquet")},
        {"name": "others", "data_file": str(tmp_path / "pets.parquet"), **other},
    ]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    return tmp_path


def test_classification_of_a_suite(checkpoint, run, labelled):
    arguments = ["--model", checkpoint, "--tasks", "classification"]
    metrics = run(*arguments, "--classification_suite", labelled / "suite.yaml")["metrics"]
    alone = run(*arguments, "--data_file", labelled / "pets.parquet")["metrics"]
    assert metrics["classification_pets_top1"] == alone["classification_top1"]
    mean = (metrics["classification_pets_top1"] + metrics["classification_others_top1"]) / 2
    assert metrics["classification_mean_top1"] == pytest.approx(mean)
    assert (labelled / "out" / "classification_others.png").exists()
    (labelled / "suite.yaml").write_text("- name: a\n  dataset: b\n")
    with pytest.raises(SystemExit, match=r"Entry 0 of .*suite\.yaml has the unknown option 'dataset'"):
        run(*arguments, "--classification_suite", labelled / "suite.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "retrieval"], "Give --model"),
        (["--model", "x"], "one of the three"),
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


def test_missing_columns_are_named(checkpoint, run, labelled):
    table = ["--model", checkpoint, "--data_file", labelled / "pets.parquet"]
    with pytest.raises(SystemExit, match=r"no column 'caption'; its columns are image, label\. Set --caption_column"):
        run(*table, "--tasks", "retrieval")
    with pytest.raises(SystemExit, match="no column 'regions'"):
        run(*table, "--tasks", "regions")
    with pytest.raises(SystemExit, match="no column 'species'"):
        run(*table, "--tasks", "classification", "--label_column", "species")


def test_metrics_load_from_the_folder_and_know_nothing_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = lambda name: evaluate.load(os.path.join(METRICS, f"{name}.py"), cache_dir=str(tmp_path))  # noqa: E731
    texts = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    owners = [i % 11 for i in range(12)]
    found = load("image_text_retrieval").compute(
        predictions=texts.numpy(), references=owners, image_embeds=texts[:11].numpy()
    )
    assert found == retrieval_metrics(texts, texts[:11], torch.tensor(owners))
    captions, references = ["a dog runs", "two cats"], [["a dog runs", "the dog"], ["two red cats"]]
    found = load("image_captioning").compute(predictions=captions, references=references)
    assert found["cider"] == cider_d(captions, references)[0] and set(found) >= {"bleu4", "rouge_l"}
    scores, labels = np.random.default_rng(0).random((20, 7), dtype=np.float32), [i % 7 for i in range(20)]
    found = load("zero_shot_classification").compute(predictions=scores, references=labels)
    assert found == classification_metrics(torch.from_numpy(scores), torch.tensor(labels))
    boxes = [[{"box": [0.0, 0.0, 4.0, 4.0], "caption": "a dog", "score": 0.5}]]
    truth = [[{"box": [0.0, 0.0, 4.0, 5.0], "phrase": "a dog"}]]
    assert load("dense_captioning").compute(predictions=boxes, references=truth) == dense_captioning_map(boxes, truth)


def test_suite_while_training_is_the_suite_behind_it(checkpoint, processor, tmp_path, labelled):
    from mmgem.training.arguments import MMGEMTrainingArguments
    from mmgem.training.trainer import MMGEMTrainer

    (tmp_path / "evaluation.yaml").write_text("tasks: long_text\ndataset_name: scenes\nmax_samples: 12\n")
    args = MMGEMTrainingArguments(
        output_dir=str(tmp_path / "run"),
        evaluation_config=str(tmp_path / "evaluation.yaml"),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
    )
    dataset = PairDataset(ScenesDataset("test", 12, 32))
    trainer = MMGEMTrainer(make_model(processor), args, processor, dataset, dataset)
    logged = trainer.evaluate()
    options = EvaluationArguments(model=checkpoint, tasks=["long_text"], dataset_name="scenes", max_samples=12)
    from mmgem.evaluation.tasks import run_tasks

    (section,) = run_tasks(make_model(processor), processor, options)
    assert {name: logged[f"eval_{name}"] for name in section.metrics} == pytest.approx(section.metrics)
    assert "eval_text_to_image_R@1" in logged
