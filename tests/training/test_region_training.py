"""Stage 2 as a user runs it: what moves and what does not, cached features, resume, learning, faults."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainerCallback

from mmgem import MMGEMModel
from mmgem.data.collator import MODEL_INPUTS
from mmgem.data.pairs import BadDataError
from mmgem.data.regions import RegionDataset
from mmgem.evaluation.regions import evaluate_regions
from mmgem.modeling_mmgem import Negatives, contrastive_loss
from mmgem.modeling_mmgem.adapters_mmgem import REGION_ADAPTERS
from mmgem.training.adapters import add_lora, add_region_adapter
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.checkpoints import CheckpointError
from mmgem.training.feature_cache import DiskFullError
from mmgem.training.region_trainer import RegionTrainer
from tests.conftest import Table, make_model, make_picture

from .test_cli import train  # noqa: F401


PHRASES = ["a dog", "the cat sat", "two people", "red bicycles", "snow", "a mountain", "the mat", "a beach"]
BOXES = [[0, 0, 24, 20], [24, 20, 48, 40]]
STAGES = list(REGION_ADAPTERS)


def four_pictures(**options) -> RegionDataset:
    """Two regions each, all of different phrases."""
    rows = []
    for i in range(4):
        regions = [{"box": box, "phrase": PHRASES[2 * i + j]} for j, box in enumerate(BOXES)]
        rows.append({"image": make_picture(i), "regions": regions, "caption": f"picture {i} of them"})
    return RegionDataset(Table(rows), **{"max_regions": 4, **options})


def arguments(tmp_path, stage, **options) -> MMGEMTrainingArguments:
    defaults = {
        "output_dir": str(tmp_path),
        "stage": stage,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MMGEMTrainingArguments(**{**defaults, **options})


def checksums(model):
    """Of every tensor that is no adapter's, by its name in the base."""
    return {
        name.replace("original_module.", ""): hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if "modules_to_save" not in name
    }


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_named_tensors_get_a_gradient_and_move(processor, tmp_path, stage):
    model = make_model(processor, attention_dropout=0.5)
    before = checksums(model)
    seen = {"gradients": set(), "training": set()}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen["gradients"] |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            seen["training"] |= {name for name, module in model.named_modules() if module.training}

    trainer = RegionTrainer(model, arguments(tmp_path, stage), processor, four_pictures())
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.add_callback(Look())
    trainer.train()
    expected = {
        "region-caption": ["caption_projection.weight", "caption_projection.bias", "soft_prompts.weight"],
        "region-retrieval": ["region_projection.weight", "region_projection.bias"],
    }[stage]
    own = {name.replace(".", ".modules_to_save.default.") for name in expected}
    assert seen["gradients"] == own
    assert seen["training"] == set(), "dropout is off, all is in eval mode"
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])} == own
    assert checksums(model) == before


def test_dropout_is_off_where_features_are_cached_and_refused_beside_checkpointing(processor, tmp_path):
    features = []
    for seed in range(2):
        model = make_model(processor)
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.dropout = 0.5
        args = arguments(tmp_path / str(seed), "region-retrieval", cache_features=True, max_steps=1)
        trainer = RegionTrainer(model, args, processor, four_pictures())
        torch.manual_seed(seed)
        model.train()
        trainer.train()
        features.append(trainer.train_dataset.features.part(0)[0]["patch_features"])
    assert torch.equal(*features)
    args = arguments(tmp_path, "region-caption", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="attention_dropout is"):
        RegionTrainer(make_model(processor, attention_dropout=0.5), args, processor, four_pictures())


def test_eval_mode_leaves_gradient_checkpointing_on(processor, tmp_path):
    losses = []
    for checkpointing in (False, True):
        args = arguments(tmp_path, "region-caption", gradient_checkpointing=checkpointing)
        model = make_model(processor)
        trainer = RegionTrainer(model, args, processor, four_pictures())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
        assert bool(layers) == checkpointing
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_cached_features_train_the_same_and_the_vit_runs_once(processor, tmp_path, stage):
    losses, calls = [], []
    for cache in (False, True):
        model = make_model(processor)
        model.vision_model.register_forward_hook(lambda *_: calls.append(len(losses)))
        args = arguments(tmp_path, stage, cache_features=cache, max_steps=5, per_device_train_batch_size=2)
        trainer = RegionTrainer(model, args, processor, four_pictures(whole_image_weight=0.5))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3), "features are kept in float16"
    assert calls.count(0) == 5 and calls.count(1) == 1, "one batch of all four pictures"


def test_cached_features_pass_over_what_cannot_be_read(processor, tmp_path, caplog):
    dataset = four_pictures()
    dataset.table.append({"image": b"no picture", "regions": [{"box": [0, 0, 9, 9], "phrase": "a"}], "caption": "a"})
    dataset = RegionDataset(dataset.table, max_regions=4)
    args = arguments(tmp_path, "region-retrieval", cache_features=True, max_bad_fraction=0.5)
    RegionTrainer(make_model(processor), args, processor, dataset).train()
    assert "1 training examples could not be read" in caplog.text
    with pytest.raises(BadDataError, match="UnidentifiedImageError"):
        args = arguments(tmp_path, "region-retrieval", cache_features=True, max_bad_fraction=0.1)
        RegionTrainer(make_model(processor), args, processor, dataset).train()


def test_retrieval_learns_eight_regions_by_heart(processor, tmp_path):
    model = make_model(processor)
    before, _ = evaluate_regions(model, processor, four_pictures(max_regions=0), "region-retrieval")
    args = arguments(tmp_path, "region-retrieval", max_steps=100, learning_rate=3e-2, logging_steps=50)
    RegionTrainer(model, args, processor, four_pictures(max_regions=2)).train()
    after, _ = evaluate_regions(model, processor, four_pictures(max_regions=0), "region-retrieval")
    assert before["region_to_phrase_R@1"] < 0.5
    assert after["region_to_phrase_R@1"] == after["phrase_to_region_R@1"] == 1


def test_captions_come_to_follow_the_region(processor, tmp_path, monkeypatch):
    """Each of two boxes of a picture makes its own phrase likelier, even in a language model that learned nothing."""
    monkeypatch.setattr(processor, "region_grid_size", 2)
    model = make_model(processor)
    with torch.no_grad():  # as it starts, its input hardly matters, and no word gets ahead of the others
        model.lm_head.weight.mul_(30)
        for layer in model.language_model.layers:
            for parameter in layer.parameters():
                parameter.mul_(4 if parameter.ndim == 2 else 1)
    dataset = four_pictures(max_regions=2).select([0])
    args = arguments(tmp_path, "region-caption", max_steps=100, per_device_train_batch_size=1, learning_rate=3e-2)
    trainer = RegionTrainer(model, args, processor, dataset)
    trainer.train()
    batch = trainer.data_collator([dataset[0]])
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    with torch.no_grad():
        right = model(**inputs).caption_loss
        wrong = model(**{**inputs, "boxes": batch["boxes"].flip(1)}).caption_loss
    assert right < 0.5 * trainer.state.log_history[0]["caption_loss"] and right < 0.5 * wrong


def test_equal_phrases_are_no_negatives_and_regions_of_a_picture_are(processor, tmp_path):
    regions = [{"box": box, "phrase": phrase} for box, phrase in zip([*BOXES, [4, 4, 30, 30]], ["a", "b", "a"])]
    dataset = RegionDataset(Table([{"image": make_picture(0), "regions": regions}] * 2), max_regions=3)
    model = make_model(processor)
    args = arguments(tmp_path, "region-retrieval", per_device_train_batch_size=2, max_steps=1)
    trainer = RegionTrainer(model, args, processor, dataset)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([dataset[0], dataset[1]])
    phrases = [*dataset[0]["phrases"], *dataset[1]["phrases"]]
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        images = model.get_embedding(pixel_values=batch["pixel_values"], boxes=batch["boxes"]).flatten(0, 1)
        texts = model.get_embedding(**processor(text=phrases, return_tensors="pt"))
        logits = model.logit_scale.weight.exp() * texts @ images.T
    expected = 0.0
    for matrix in (logits, logits.T):
        for i, phrase in enumerate(phrases):
            columns = [j for j, other in enumerate(phrases) if j == i or other != phrase]
            expected += torch.logsumexp(matrix[i, columns], 0) - matrix[i, i]
    torch.testing.assert_close(loss, expected / len(phrases), atol=1e-4, rtol=0)


def test_retrieval_has_the_negatives_and_the_temperature_of_the_options(processor, tmp_path):
    dataset, model = four_pictures(), make_model(processor)
    options = {"false_negative_margin": 0.0, "hardness_weight": 3.0, "temperature": 0.05}
    args = arguments(tmp_path, "region-retrieval", max_steps=1, learning_rate=0.0, **options)
    trainer = RegionTrainer(model, args, processor, dataset)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([dataset[i] for i in range(4)])
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        regions = model.get_embedding(pixel_values=batch["pixel_values"], boxes=batch["boxes"]).flatten(0, 1)
        phrases = [phrase for i in range(4) for phrase in dataset[i]["phrases"]]
        texts = model.get_embedding(**processor(text=phrases, return_tensors="pt"))
    negatives = Negatives(margin=0.0, hardness=3.0)
    expected = contrastive_loss(regions, texts, torch.tensor(20.0), negatives=negatives)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    for scale, other in ((20.0, Negatives()), (float(model.logit_scale.scale), negatives)):
        assert abs(contrastive_loss(regions, texts, torch.tensor(scale), negatives=other) - loss) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_resume_equals_the_uninterrupted_run(processor, tmp_path, stage):
    def run(folder, resume=None, **options):
        args = arguments(folder, stage, max_steps=4, per_device_train_batch_size=2, **options)
        model = MMGEMModel.from_pretrained(tmp_path / "base")
        trainer = RegionTrainer(model, args, processor, four_pictures(whole_image_weight=0.5))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return load_file(folder / "adapter_model.safetensors")

    make_model(processor).save_pretrained(tmp_path / "base")
    cache = {"cache_features": True, "feature_cache_dir": str(tmp_path / "features")}
    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=2, **cache)
    again = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"), **cache)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in (tmp_path / "whole").iterdir()}
    assert not (tmp_path / "whole" / "README.md").exists() and not (tmp_path / "whole" / "config.json").exists()
    make_model(processor, seed=1).save_pretrained(tmp_path / "other")
    other = RegionTrainer(
        MMGEMModel.from_pretrained(tmp_path / "other"),
        arguments(tmp_path, stage, max_steps=4, per_device_train_batch_size=2),
        processor,
        four_pictures(),
    )
    with pytest.raises(CheckpointError, match="checkpoint-2 was trained with base_revision"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.fixture
def base(processor, tmp_path):
    make_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "report.md").write_text("# Evaluation\n\nof stage 1\n")
    return tmp_path / "base"


@pytest.fixture
def regions_file(tmp_path):
    rows = []
    for i in range(6):
        make_picture(i).save(tmp_path / f"{i}.png")
        regions = [{"box": [float(c) for c in box], "phrase": PHRASES[i % 4 + j]} for j, box in enumerate(BOXES)]
        rows.append({"image": f"{i}.png", "regions": regions[: i % 3], "caption": f"picture {i}"})
    Dataset.from_list(rows).to_parquet(tmp_path / "regions.parquet")
    return tmp_path / "regions.parquet"


OPTIONS = ["--max_steps", 2, "--per_device_train_batch_size", 3, "--report_to", "none", "--use_cpu", "true"]


@pytest.mark.parametrize("stage", STAGES)
def test_train_py_writes_an_adapter_that_loads_and_a_report_beside_stage_1(train, base, regions_file, tmp_path, stage):  # noqa: F811
    data = ["--train_file", regions_file, "--validation_file", regions_file]
    output = base / stage
    grid_size = ["--region_grid_size", 2] if stage == "region-caption" else []
    for _ in range(2):  # the second run replaces the section of the first
        train("--stage", stage, "--init_from", base, *data, *OPTIONS, "--output_dir", output, *grid_size)
    results = json.loads((output / "results.json").read_text())
    metrics = results["metrics"]
    assert {name for name in metrics if f"stage_1_{name}" in metrics} | {
        name for name in metrics if name.startswith("stage_1_")
    } == set(metrics)
    assert results["setting"]["regions"] == 6 and results["setting"]["base"] == str(base)
    picture = "regions.png" if stage == "region-caption" else "heat_maps.png"
    assert (output / picture).stat().st_size > 1000
    report = (base / "report.md").read_text()
    assert report.startswith("# Evaluation\n\nof stage 1\n") and report.count("\n## Region ") == 1
    assert f"![]({stage}/{picture})" in report
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert isinstance(model, MMGEMModel)
    assert processor.region_grid_size == model.region_grid_size == (2 if stage == "region-caption" else 1)
    inputs = processor(images=[make_picture(0)], boxes=[BOXES], task="region-caption", return_tensors="pt")
    assert len(model.generate(**inputs, max_new_tokens=3)) == 2


@pytest.mark.parametrize(
    "make", [lambda model: add_region_adapter(model, "region-caption", 1), lambda m: add_lora(m, LoraConfig(r=2))]
)
def test_a_base_in_a_folder_is_never_asked_of_the_hub(base, tmp_path, monkeypatch, make):
    """An adapter finds it from any working directory; where the folder is gone, nobody else may supply the base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *args, **kwargs: pytest.fail(f"{host} was asked"))
    make(MMGEMModel.from_pretrained("base")).save_pretrained("adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert isinstance(AutoModel.from_pretrained("../adapter"), MMGEMModel)
    base.rename(tmp_path / "renamed")
    with pytest.raises(OSError, match=str(base)):
        AutoModel.from_pretrained("../adapter")


def test_a_table_without_captions_is_evaluated_too(train, base, regions_file, tmp_path):  # noqa: F811
    Dataset.from_parquet(str(regions_file)).remove_columns("caption").to_parquet(tmp_path / "bare.parquet")
    data = ["--train_file", tmp_path / "bare.parquet", "--validation_file", tmp_path / "bare.parquet"]
    options = ["--per_device_train_batch_size", 2, "--max_bad_fraction", 0.5, *OPTIONS[:2], *OPTIONS[4:]]
    train("--stage", "region-retrieval", "--init_from", base, *data, *options, "--output_dir", "out")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert "region_to_phrase_R@1" in metrics and "text_to_image_R@1" not in metrics


@pytest.mark.parametrize(
    "change, message",
    [
        (["--init_from", "base", "--lora_rank", 4], "lora_rank is for other stages"),
        (["--init_from", "base", "--objective", "caption"], "objective is for other stages"),
        (["--init_from", "base", "--mini_batch_size", 2], "mini_batch_size is for other stages"),
        (["--init_from", "base", "--freeze", "lm_head"], "freeze is for other stages"),
        (["--init_from", "base", "--generation_num_beams", 3], "generation_num_beams is for other stages"),
        ([], "give --init_from"),
        (["--init_from", "base", "--image_size", 64], "image_size would change the model"),
        (["--init_from", "base", "--image_grid_size", 2], "image_grid_size would change the model"),
        (["--init_from", "base", "--regions_column", "regoins"], "no column 'regoins'"),
        (["--init_from", "base", "--region_grid_size", 0], "region_grid_size must be"),
        (["--init_from", "base", "--region_grid_size", 2], "region_grid_size is for captions"),
        (["--init_from", "base", "--augmentation_scale", 0.5], "augmentation_scale is for stage 1"),
        (["--init_from", "base", "--dry_run", "true"], "dry run"),
        (["--init_from", "adapter"], "is an adapter"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(train, base, regions_file, tmp_path, change, message):  # noqa: F811
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=message):
        train("--stage", "region-retrieval", "--train_file", regions_file, *OPTIONS, "--output_dir", "out", *change)


def test_features_that_do_not_fit_on_the_disk_are_refused_before_any_step(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    args = arguments(tmp_path, "region-retrieval", cache_features=True)
    trainer = RegionTrainer(make_model(processor), args, processor, four_pictures())
    with pytest.raises(DiskFullError, match=r"needs .* GiB in .* are free"):
        trainer.train()
    assert trainer.state.global_step == 0
    # DINOv2's configuration has larger images than its processor makes.
    trainer.base.config.vision_config.image_size *= 100
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**6))
    trainer.train()


def test_shards_and_missing_folders_are_refused(train, base, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="Shards hold no regions"):
        train(
            "--stage", "region-caption", "--init_from", base, "--train_shards", "a.tar", *OPTIONS, "--output_dir", "o"
        )
    with pytest.raises(SystemExit, match="image_folders"):
        train("--stage", "region-caption", "--init_from", base, "--train_annotations", "a.json", *OPTIONS)
