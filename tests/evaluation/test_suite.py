"""The suite as a user runs it: from Python, from the command line, in two processes."""

import dataclasses
import io
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
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation import METRICS
from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.evaluation.captioning import cider_d
from mmgem.evaluation.classification import classification_metrics
from mmgem.evaluation.data import load_labelled, load_pairs
from mmgem.evaluation.dense_captioning import dense_captioning_map
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.evaluation.retrieval import retrieval_metrics
from mmgem.evaluation.sharing import shard_range
from mmgem.evaluation.tasks import load_model, run_tasks
from mmgem.training.adapters import add_region_adapter
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import make_picture
from tests.evaluation.conftest import bold_model


ROOT = Path(__file__).parents[2]
ROWS = Features(
    {
        "image": Image(decode=False),
        "caption": Value("string"),
        "long_caption": Value("string"),
        "label": Value("int64"),
        "regions": List({"box": List(Value("float64")), "phrase": Value("string")}),
    }
)


def as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_two_processes_and_any_batch_give_the_same_figures(checkpoint, adapters, run, tmp_path):
    """
    From the command line, with torchrun: every task, an odd number of pictures, one of them unreadable. Captions are
    the model's own, so that CIDEr is 10 for those in their places alone.
    """
    table = [{**ScenesDataset("test", 11, 32)[i], "image": make_picture(i, (32, 32))} for i in range(11)]
    model, processor = MMGEMModel.from_pretrained(checkpoint).eval(), MMGEMProcessor.from_pretrained(checkpoint)
    inputs = processor(images=[row["image"] for row in table], task="caption", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    written = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert len(set(written)) > 5
    rows = {
        "image": [{"bytes": as_png(row["image"]) if i != 4 else b"?", "path": None} for i, row in enumerate(table)],
        "caption": written,
        "long_caption": [row["long_caption"] for row in table],
        "label": [row["label"] % 6 for row in table],
        "regions": [[{"box": r["box"], "phrase": r["phrase"]} for r in row["regions"]] for row in table],
    }
    Dataset.from_dict(rows, features=ROWS).to_parquet(tmp_path / "scenes.parquet")
    arguments = ["--model", checkpoint, "--adapters", *adapters, "--data_file", str(tmp_path / "scenes.parquet")]
    arguments += ["--tasks", "retrieval,classification,captioning,long_text,regions", "--draws", "2"]
    arguments += ["--max_length", "20", "--class_names", *"abcdef", "--rerank", "3", "--alpha", "0.5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    command += ["mmgem.evaluation", *arguments, "--batch_size", "2", "--output_dir", str(tmp_path / "two")]
    two = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, many = (run(*arguments, "--batch_size", size) for size in (1, 64))
    assert two.wait(timeout=300) == 0
    both = json.loads((tmp_path / "two" / "results.json").read_text())
    assert both["setting"]["processes"] == 2 and both["setting"]["sizes"] == one["setting"]["sizes"]
    assert one["setting"]["sizes"]["Captions"] == {"size": 10, "left_out": 1, "captioned": 10}
    assert one["metrics"]["caption_cider"] > 9 > 2 * one["metrics"]["caption_cider_shuffled"]
    for other in (many["metrics"], both["metrics"]):
        assert other.keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            exact = "R@" in name or "top" in name
            assert other[name] == pytest.approx(value, abs=0 if exact else 1e-4), name
    reports = [(tmp_path / folder / "report.md").read_text().split("## Setting")[0] for folder in ("two", "out")]
    assert reports[0] == reports[1], "captions drawn, sizes and figures"


@pytest.mark.parametrize(("count", "size"), [(7, 1), (7, 2), (2, 3), (0, 2), (9, 4)])
def test_parts_are_a_partition(monkeypatch, count, size):
    parts = []
    for rank in range(size):
        monkeypatch.setattr("mmgem.evaluation.sharing.rank_and_world_size", lambda rank=rank: (rank, size))
        parts.append(shard_range(count))
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_done_is_there_when_a_later_task_fails(checkpoint, run, tmp_path):
    with pytest.raises(SystemExit, match="give it to --adapters"):
        run("--model", checkpoint, "--tasks", "retrieval,fused", "--dataset_name", "scenes", "--max_samples", 6)
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert "text_to_image_R@1" in metrics and (tmp_path / "out" / "report.md").is_file()


def test_every_task_on_scenes(checkpoint, adapters, processor, run, tmp_path, capsys):
    results = run(
        *("--model", checkpoint, "--adapters", *adapters),
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
    expected, _ = evaluate_model(bold_model(processor), processor, PairDataset(ScenesDataset("test", 12, 32)))
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
    results = run("--model", checkpoint, "--tasks", "retrieval", *data)
    assert "10 images, 50 captions" in (tmp_path / "out" / "report.md").read_text()
    assert results["setting"]["sizes"]["Retrieval"] == {"size": 10, "left_out": 0}
    files = [str(tmp_path / "dataset_flickr8k.json")]
    options = EvaluationArguments(model="x", annotations=files, image_folders=[str(tmp_path / "images")])
    first = [f"picture 1 in words {k}" for k in range(5)]
    assert load_pairs(options, 32, max_captions=5).captions()[0] == first
    run("--model", checkpoint, "--tasks", "retrieval", *data, "--captions_per_image", 7)
    assert "10 images, 70 captions" in (tmp_path / "out" / "report.md").read_text()
    os.remove(tmp_path / "images" / "3.jpg")
    (tmp_path / "images" / "7.jpg").write_bytes(b"no picture")
    results = run("--model", checkpoint, "--tasks", "retrieval", *data)
    assert results["setting"]["sizes"]["Retrieval"] == {"size": 8, "left_out": 2}, "what is not there counts too"


def test_coco_annotations_leave_a_results_file_that_scores_the_same(checkpoint, run, tmp_path):
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(4):
        make_picture(i).save(tmp_path / "images" / f"{i:012}.jpg")
        domain = ("in-domain", "near-domain", "out-domain", "out-domain")[i]
        images.append({"id": i, "file_name": f"{i:012}.jpg", "domain": domain})
        annotations += [{"image_id": i, "caption": f"a dog on a beach {k} {i}"} for k in range(7)]
    references = tmp_path / "nocaps.json"
    references.write_text(json.dumps({"images": images, "annotations": annotations}))
    data = ["--annotations", references, "--image_folders", tmp_path / "images"]
    metrics = run("--model", checkpoint, "--tasks", "captioning", *data)["metrics"]
    file = tmp_path / "captions.json"
    os.replace(tmp_path / "out" / "captions.json", file)
    assert [row["image_id"] for row in json.loads(file.read_text())] == [0, 1, 2, 3]
    scored = run("--caption_results", file, "--caption_references", references)["metrics"]
    assert "caption_cider_out_domain" in scored and scored["caption_bleu1"] > 0
    assert scored == {name: pytest.approx(metrics[name]) for name in scored}, "all seven references, both ways"


def test_classification_of_a_suite(checkpoint, run, labelled):
    arguments = ["--model", checkpoint, "--tasks", "classification"]
    assert load_labelled(options_of(labelled), 32)[0].class_names == ["dog", "red bicycle", "cat"]
    metrics = run(*arguments, "--classification_suite", labelled / "suite.yaml")["metrics"]
    alone = run(*arguments, "--data_file", labelled / "pets.parquet")["metrics"]
    assert metrics["classification_pets_top1"] == alone["classification_top1"]
    mean = (metrics["classification_pets_top1"] + metrics["classification_others_top1"]) / 2
    assert metrics["classification_mean"] == pytest.approx(mean)
    assert (labelled / "out" / "classification_2.png").exists()
    for entry, message in (
        ({"name": "a", "dataset": "b"}, "unknown option 'dataset'"),
        ({"name": 1}, "name must be of type str, got 1"),
        ({"name": "a", "class_names": ["dog", None]}, "class_names must be a list of texts, but one is None"),
        ({"name": "a", "templates": [5]}, "templates must be a list of texts, but one is 5"),
        ({"name": "a", "max_samples": "5"}, "max_samples must be of type int"),
        ({"name": "a", "metric": "f1"}, "metric is top1 or mean_per_class"),
        ({"dataset_name": "a"}, "needs a name that no other has"),
        ({"name": "a"}, "exactly one of dataset_name"),
    ):
        (labelled / "suite.yaml").write_text(yaml.safe_dump([entry]))
        with pytest.raises(SystemExit, match=rf"Entry 0 of .*suite\.yaml: .*{message}"):
            run(*arguments, "--classification_suite", labelled / "suite.yaml")


def options_of(folder):
    return EvaluationArguments(model="x", tasks=["classification"], classification_suite=str(folder / "suite.yaml"))


def test_what_counts_of_each_dataset_of_a_suite(checkpoint, run, labelled):
    """Its own metric: eight dogs and a cat, of which the model takes all for one class."""
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "cat"])})
    rows = {"image": [make_picture(i) for i in range(9)], "label": [0] * 8 + [1]}
    Dataset.from_dict(rows, features=features).to_parquet(labelled / "pets.parquet")
    suite = [
        {"name": name, "data_file": str(labelled / "pets.parquet"), "metric": metric}
        for name, metric in (("first", "top1"), ("mean", "mean_per_class"))
    ]
    (labelled / "suite.yaml").write_text(yaml.safe_dump(suite))
    metrics = run(
        *("--model", checkpoint, "--tasks", "classification", "--classification_suite", labelled / "suite.yaml")
    )["metrics"]
    top1, mean = metrics["classification_first_top1"], metrics["classification_mean_mean_per_class"]
    assert top1 != mean
    assert metrics["classification_mean"] == pytest.approx((top1 + mean) / 2)


def test_metrics_load_from_the_folder_and_know_nothing_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = lambda name: evaluate.load(os.path.join(METRICS, f"{name}.py"), cache_dir=str(tmp_path))  # noqa: E731
    texts = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    owners = [i % 11 for i in range(12)]
    several = [[i % 11, (i + 1) % 11] for i in range(12)]
    found = load("image_text_retrieval").compute(
        predictions=texts.numpy(), references=several, image_embeds=texts[:11].numpy()
    )
    assert found == retrieval_metrics(
        texts, texts[:11], torch.tensor([(i, j) for i, of in enumerate(several) for j in of])
    )
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
    (tmp_path / "evaluation.yaml").write_text("tasks: long_text\ndataset_name: scenes\nmax_samples: 12\n")
    args = MMGEMTrainingArguments(
        output_dir=str(tmp_path / "run"),
        evaluation_config=str(tmp_path / "evaluation.yaml"),
        per_device_train_batch_size=4,
        packing=False,
        report_to="none",
        use_cpu=True,
    )
    dataset = PairDataset(ScenesDataset("test", 12, 32))
    model = bold_model(processor).train()
    trainer = MMGEMTrainer(model, args, processor, dataset, dataset)
    logged = trainer.evaluate()
    assert model.training
    options = EvaluationArguments(model=checkpoint, tasks=["long_text"], dataset_name="scenes", max_samples=12)
    (section,) = run_tasks(bold_model(processor), processor, options)
    assert {name: logged[f"eval_suite_{name}"] for name in section.metrics} == pytest.approx(section.metrics)
    assert "eval_text_to_image_R@1" in logged
    for changes, message in (({"stage": "region-caption"}, "is for stage 1"), ({}, "has no adapters")):
        (tmp_path / "evaluation.yaml").write_text("dataset_name: scenes\nadapters: [a]\n")
        with pytest.raises(ValueError, match=message):
            MMGEMTrainingArguments(str(tmp_path), evaluation_config=str(tmp_path / "evaluation.yaml"), **changes)


def test_regions_without_an_adapter_are_stage_1_as_beside_one(checkpoint, adapters, run):
    data = ["--model", checkpoint, "--tasks", "regions", "--dataset_name", "scenes", "--max_samples", 6]
    alone = run(*data)["metrics"]
    beside = run(*data, "--adapters", *adapters)["metrics"]
    assert {name: beside[f"stage_1_{name}"] for name in alone} == pytest.approx(alone)
    apart = {}
    for adapter in adapters:
        apart.update(run(*data, "--adapters", adapter)["metrics"])
    assert beside == pytest.approx(apart), "neither has a say in the other's figures"
    with pytest.raises(SystemExit, match="is a second region-caption"):
        run(*data, "--adapters", adapters[0], adapters[0])


def test_h4_touches_whole_images_by_their_box_alone(checkpoint, processor, run, tmp_path):
    adapter = add_region_adapter(bold_model(processor), "region-retrieval", 1)
    with torch.no_grad():
        adapter.base_model.model.region_projection.modules_to_save["default"].weight.normal_()
    adapter.save_pretrained(tmp_path / "h4")
    data = ["--dataset_name", "scenes", "--max_samples", 12, "--model", checkpoint]
    metrics = run(*data, "--tasks", "regions,retrieval", "--adapters", tmp_path / "h4")["metrics"]
    recalls = {
        name: value for name, value in metrics.items() if name.startswith(("text_to_image_R", "image_to_text_R"))
    }
    for prefix in ("whole_image_", "stage_1_whole_image_", "stage_1_whole_box_"):
        assert {name: metrics[prefix + name] for name in recalls} == recalls
    scenes = ScenesDataset("test", 12, 32)
    model = MMGEMModel.from_pretrained(checkpoint).eval()
    model.load_adapter(str(tmp_path / "h4"))
    with torch.no_grad():
        boxes = [[[0.0, 0.0, 32.0, 32.0]]] * 12
        images = [scenes[i]["image"] for i in range(12)]
        image_embeds = model.get_embedding(**processor(images=images, boxes=boxes, return_tensors="pt"))[:, 0]
        text_embeds = model.get_embedding(**processor(text=scenes["caption"], return_tensors="pt"))
    expected = retrieval_metrics(text_embeds, image_embeds, torch.arange(12))
    assert {name: metrics[f"whole_box_{name}"] for name in recalls} == {name: expected[name] for name in recalls}
    assert {name: expected[name] for name in recalls} != recalls


def test_whole_images_are_captioned_by_stage_1(checkpoint, processor, run, tmp_path):
    adapter = add_region_adapter(bold_model(processor), "region-caption", 1)
    with torch.no_grad():
        adapter.base_model.model.caption_projection.modules_to_save["default"].weight.normal_()
    adapter.save_pretrained(tmp_path / "h3")
    data = ["--dataset_name", "scenes", "--max_samples", 6, "--model", checkpoint, "--tasks", "captioning"]
    assert run(*data, "--adapters", tmp_path / "h3")["metrics"] == pytest.approx(run(*data)["metrics"])


def test_adapters_are_on_again_after_a_fault(checkpoint, adapters, tmp_path):
    make_picture(0).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a dog"}))
    options = EvaluationArguments(
        model=checkpoint, adapters=adapters, tasks=["captioning"], data_file=str(tmp_path / "rows.jsonl")
    )
    model, processor = load_model(options)
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="caption loss is nan"):
        list(run_tasks(model, processor, options))
    assert not model.caption_projection._disable_adapters
    with pytest.raises(ValueError, match="the first that of 'image 0'"):
        list(run_tasks(model, processor, dataclasses.replace(options, tasks=["retrieval"])))
    with pytest.raises(ValueError, match=r"region .* of image 0"):
        scenes = dataclasses.replace(options, tasks=["regions"], data_file=None, dataset_name="scenes", max_samples=2)
        list(run_tasks(model, processor, scenes))
    assert {*model.active_adapters()} == {"region-caption", "region-retrieval"}


def test_annotations_with_regions_and_short_and_long_captions(checkpoint, adapters, run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "caption").mkdir()
    for i in range(3):
        make_picture(i).save(tmp_path / "images" / f"{i}.jpg")
        (tmp_path / "caption" / f"{i}.txt").write_text(" ".join(["a long one"] * 20 + [str(i)]))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    annotations = [{"image_id": i, "caption": f"the short one {i}"} for i in range(3)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    data = ["--annotations", tmp_path / "coco.json", tmp_path / "caption", "--image_folders", tmp_path / "images"]
    metrics = run("--model", checkpoint, "--tasks", "long_text", *data)["metrics"]
    assert "long_text_200_R@1_50_to_99_words" in metrics and "long_text_200_R@1_0_to_49_words" not in metrics
    box = {"image_id": 2, "category_id": 1, "bbox": [0, 0, 20, 20]}
    instances = {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": [box]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    data.insert(1, tmp_path / "instances.json")
    results = run("--model", checkpoint, "--tasks", "retrieval,regions", "--adapters", adapters[1], *data)
    metrics, sizes = results["metrics"], results["setting"]["sizes"]
    assert "3 images, 3 captions" in (tmp_path / "out" / "report.md").read_text()
    assert sizes["Regions"] == {"size": 1, "left_out": 2, "regions": 1}
    for way in ("text_to_image", "image_to_text"):
        assert metrics[f"whole_image_{way}_R@1"] == metrics[f"{way}_R@1"] < 1, "pictures without a region too"
