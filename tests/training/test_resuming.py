"""Runs that are resumed otherwise than they were begun, that diverged, or whose evaluation fails."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.pairs import PairDataset
from mmgem.loading import load_checkpoint
from mmgem.training.checkpoints import CheckpointError, TrainingStopped, find_checkpoint
from mmgem.training.region_trainer import RegionTrainer
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import Table, make_model, make_picture

from .test_cli import TOWERS, pairs, train  # noqa: F401
from .test_region_training import arguments as region_arguments
from .test_region_training import four_pictures
from .test_training import CAPTIONS, eight_pictures, training_arguments


def make_trainer(processor, folder, eval_dataset=None, model=None, model_settings=None, **options):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **options}
    args = training_arguments(folder, **options)
    model = model or make_model(processor)
    return MMGEMTrainer(model, args, processor, eight_pictures(), eval_dataset, model_settings=model_settings)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def begun(processor, tmp_path_factory):
    """The folder of a run that was cut off after two steps."""
    folder = tmp_path_factory.mktemp("begun")
    make_trainer(processor, folder, max_steps=2).train()
    return folder


def test_tokenizer_and_pixel_statistics_come_from_the_checkpoint(train, pairs, tmp_path):  # noqa: F811
    def run(steps, *more):
        data = ["--train_file", pairs, "--caption_column", "captions", "--per_device_train_batch_size", 4]
        train(
            *data, *TOWERS, "--max_steps", steps, "--save_steps", 2, "--report_to", "none", "--output_dir", "o", *more
        )

    run(2)
    for i in range(16):  # as many rows, of other words and other colours
        make_picture(i).point(lambda value: value // 4).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "captions": [f"zebra quartz {i} vexing jumps"]} for i in range(16)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    before, after = tmp_path / "o" / "checkpoint-2", tmp_path / "o"
    run(4, "--resume_from_checkpoint", "true")
    assert (after / "tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes()
    processors = [MMGEMProcessor.from_pretrained(folder).image_processor for folder in (before, after)]
    assert processors[0].image_mean == processors[1].image_mean and processors[0].image_std == processors[1].image_std
    state = json.loads((after / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    for change, message in {
        ("--projection_dim", 64): r"checkpoint-4 was trained with projection_dim 512, not 64\.",
        (
            "--lora_rank",
            4,
            "--init_from",
            "o",
            "--vision_config",
            "{}",
            "--text_config",
            "{}",
        ): "with lora_rank 0, not 4",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(6, "--resume_from_checkpoint", "true", *change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_rank": 4}, "lora_rank 0, not 4"),
        ({"freeze": ["vision_model"]}, r"freeze \[\], not \['vision_model'\]"),
        ({"objective": "contrastive"}, "objective 'joint', not 'contrastive'"),
        ({"learning_rate": 1e-4}, "learning_rate 0.003, not 0.0001"),
        ({"optim": "lamb"}, "optim 'adamw_torch_fused', not 'lamb'"),
        ({"per_device_train_batch_size": 4}, "processes 8, not 4"),
        ({"seed": 1}, "seed 42, not 1"),
        ({"caption_loss_weight": 2.0}, r"caption_loss_weight 1\.0, not 2\.0"),
        ({"matryoshka_dims": [4]}, r"matryoshka_dims \[\], not \[4\]"),
    ],
)
def test_other_settings_are_refused_in_a_line(processor, begun, change, message):
    with pytest.raises(CheckpointError, match=rf"checkpoint-2 was trained with .*{message}\. Resume it with the same"):
        make_trainer(processor, begun, **change).train(resume_from_checkpoint=True)


def test_a_batch_may_be_divided_otherwise(processor, begun):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    trainer = make_trainer(processor, begun, **options, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_how_attention_is_computed_and_how_a_path_is_written_may_change(processor, tmp_path, monkeypatch):
    """Also where the checkpoint holds the path as it was written."""
    (tmp_path / "towers" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    before = {"attn_implementation": None, "vision_model_name_or_path": "towers/vit", "init_from": None}
    make_trainer(processor, tmp_path, max_steps=2, model_settings=before).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    for written in ("as it is", "towers/vit"):
        if written != "as it is":
            state["stateful_callbacks"]["RunSettings"]["args"]["settings"]["vision_model_name_or_path"] = written
            path.write_text(json.dumps(state))
        after = {
            **before,
            "attn_implementation": "eager",
            "vision_model_name_or_path": str(tmp_path / "towers" / "vit"),
        }
        trainer = make_trainer(processor, tmp_path, model_settings=after, save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
    other = make_trainer(processor, tmp_path, model_settings={"vision_model_name_or_path": str(tmp_path)})
    with pytest.raises(CheckpointError, match="with vision_model_name_or_path 'towers/vit', not"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_holds_no_settings_is_resumed_with_a_warning(processor, begun, tmp_path, caplog):
    """As mmgem 0.1 wrote it."""
    shutil.copytree(begun / "checkpoint-2", tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunSettings"]
    path.write_text(json.dumps(state))
    trainer = make_trainer(processor, tmp_path, save_strategy="no")
    logging.enable_propagation()
    trainer.train(resume_from_checkpoint=True)
    logging.disable_propagation()
    assert trainer.state.global_step == 3
    assert "checkpoint-2 does not say which settings it was trained with" in caplog.text


def test_a_state_that_is_nested_too_deeply_is_no_whole_checkpoint(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        find_checkpoint(str(tmp_path))


def test_a_checkpoint_without_an_optimizer_is_refused(processor, tmp_path):
    make_trainer(processor, tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 holds no optimizer .*--init_from"):
        make_trainer(processor, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("options", [{"lora_rank": 4}, {"max_steps": -1, "num_train_epochs": 1.5}, {}])
def test_a_finished_run_is_not_trained_further(processor, tmp_path, options):
    """It ended in the middle of an epoch, of which Trainer would take one step more."""
    options = {"per_device_train_batch_size": 4, **options}
    finished = make_trainer(processor, tmp_path, save_steps=1, **options)
    finished.train()
    again = make_trainer(processor, tmp_path, model=make_model(processor, seed=1), save_steps=1, **options)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == again.state.global_step == 3
    if not options.get("lora_rank"):  # of an adapter, the base is the caller's
        assert_equal(again.model.state_dict(), finished.model.state_dict())
    assert_equal(
        {name: p for name, p in again.model.named_parameters() if p.requires_grad},
        {name: p for name, p in finished.model.named_parameters() if p.requires_grad},
    )


def test_a_finished_run_ends_with_its_best_weights_again(processor, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "caption_loss", "greater_is_better": True, "max_steps": 4}
    finished = make_trainer(processor, tmp_path, eight_pictures(), **options)
    finished.train()
    assert finished.state.best_model_checkpoint == str(tmp_path / "checkpoint-1"), "the loss falls"
    again = make_trainer(processor, tmp_path, eight_pictures(), **options)
    again.train(resume_from_checkpoint=True)
    assert_equal(again.model.state_dict(), finished.model.state_dict())
    assert_equal(again.model.state_dict(), MMGEMModel.from_pretrained(tmp_path / "checkpoint-1").state_dict())


@pytest.mark.parametrize("name", ["logit_scale.weight", "visual_projection.weight"])
def test_a_run_that_diverged_says_so(processor, tmp_path, name):
    """A temperature without end (1 / tau is 0), and a loss that is NaN."""
    model = make_model(processor)
    with torch.no_grad():
        model.get_parameter(name).fill_(-200 if name.startswith("logit") else torch.nan)
    trainer = make_trainer(processor, tmp_path, model=model, logging_steps=1)
    with pytest.raises(TrainingStopped, match=r"diverged at step 1, .* is (0\.0|nan)\. .*--learning_rate \(0\.003"):
        trainer.train()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_model_that_diverged_is_not_saved(processor, tmp_path, steps):
    """Neither between two logs as a checkpoint, nor at the end."""
    model = make_model(processor)
    with torch.no_grad():
        model.text_projection.weight.fill_(torch.nan)
    with pytest.raises(TrainingStopped, match=f"diverged at step {steps}"):
        make_trainer(processor, tmp_path, model=model, max_steps=steps).train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_gradient_that_is_nan_neither_replaces_the_last_checkpoint_nor_ends_in_the_model(processor, tmp_path, steps):
    """At the last step too, of which the losses say nothing. Every second step is saved."""
    model = make_model(processor)
    trainer = make_trainer(processor, tmp_path, model=model, max_steps=steps, save_total_limit=1, logging_steps=99)

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == steps - 1:
                model.text_projection.weight.grad[0, 0] = torch.nan

    trainer.add_callback(Poison())
    with pytest.raises(TrainingStopped, match=rf"diverged at step {steps}, .*text_projection.weight holds NaN"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    load_checkpoint(str(tmp_path / "checkpoint-2"))


def test_a_failing_evaluation_without_an_optimizer_to_resume_names_init_from(processor, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_only_model": True, "max_steps": 2}
    options |= {"metric_for_best_model": "caption_los"}
    message = r"checkpoint-1 is saved, without its optimizer: start a new run from it with --init_from"
    with pytest.raises(TrainingStopped, match=message) as error:
        make_trainer(processor, tmp_path, eight_pictures(), **options).train()
    assert "--resume_from_checkpoint" not in str(error.value)


@pytest.mark.parametrize("fault", ["captions", "metric"])
def test_a_failing_evaluation_ends_the_run_once_it_is_saved(processor, tmp_path, fault):
    captions = [5 if fault == "captions" else caption for caption in CAPTIONS]
    rows = Table({"image": make_picture(i), "caption": c} for i, c in enumerate(captions))
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 2}
    if fault == "metric":
        options |= {"metric_for_best_model": "caption_los"}
    trainer = make_trainer(processor, tmp_path, PairDataset(rows), **options)
    message = {"captions": "None of the 8 examples", "metric": "caption_los' is none of text_to_image"}[fault]
    with pytest.raises(TrainingStopped, match=rf"evaluation at step 1 failed .*{message}.*checkpoint-1 is saved"):
        trainer.train()
    resumed = make_trainer(processor, tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=find_checkpoint(str(tmp_path)))
    whole = make_trainer(processor, tmp_path / "whole", max_steps=2)
    whole.train()
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_a_clock_that_is_set_back_neither_deletes_the_newest_checkpoint_nor_counts_seconds_below_zero(
    processor, tmp_path, monkeypatch
):
    make_trainer(processor, tmp_path, max_steps=2).train()
    future = time.time() + 3600
    os.utime(tmp_path / "checkpoint-2", (future, future))
    trainer = make_trainer(processor, tmp_path, max_steps=6, save_total_limit=1)
    ticks = iter(range(10**9, 0, -100))
    monkeypatch.setattr("transformers.trainer.time.time", lambda: next(ticks))
    result = trainer.train(resume_from_checkpoint=True)
    monkeypatch.undo()
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    for metrics in (result.metrics, trainer.state.log_history[-1]):
        assert all(metrics[f"train_{name}"] > 0 for name in ("runtime", "samples_per_second", "steps_per_second"))
    load_file(tmp_path / "checkpoint-6" / "model.safetensors")


@pytest.mark.parametrize("adapter", ["lora", "region-caption"])
def test_the_best_adapter_is_loaded_at_the_end(processor, tmp_path, adapter):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"greater_is_better": True, "max_steps": 3, "report_to": "none"}
    if adapter == "lora":
        trainer = make_trainer(
            processor, tmp_path, eight_pictures(), lora_rank=2, metric_for_best_model="caption_loss", **options
        )
    else:
        options |= {"save_strategy": "steps", "metric_for_best_model": "region_caption_exact"}
        args = region_arguments(tmp_path, adapter, **options)
        trainer = RegionTrainer(make_model(processor), args, processor, four_pictures(), four_pictures())
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1"), "no later one is better"
    trainer.save_model(str(tmp_path / "end"))
    best, end = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("checkpoint-1", "end"))
    assert_equal(end, best)
