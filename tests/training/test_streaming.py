"""Training from tar shards: resume, and what is said of bad samples."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from mmgem.data.shards import ShardStream, expand_shards
from mmgem.training.checkpoints import CheckpointError
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import make_model, write_shards
from tests.training.test_training import training_arguments


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards; in the first, one picture in three cannot be read."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    data = bytearray((folder / "0.tar").read_bytes())
    for i in range(0, 12, 3):  # breaks the beginning of a JPEG
        start = data.index(f"{i:03}.jpg".encode()) + 512
        data[start : start + 20] = bytes(20)
    (folder / "0.tar").write_bytes(data)
    return expand_shards(str(folder / "{0..3}.tar"))


def losses(trainer):
    names = ("step", "epoch", "loss", "caption_loss", "contrastive_loss", "tau")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [4, 8]
    return [[entry[name] for name in names] for entry in logged]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_trains_to_the_same_weights(processor, tmp_path, shards, workers, caplog):
    def trainer(folder):
        args = training_arguments(
            tmp_path / folder,
            per_device_train_batch_size=5,
            max_steps=11,
            save_strategy="steps",
            save_steps=3,
            logging_steps=4,
            dataloader_num_workers=workers,
            packing=True,
            pack_length=64,
        )
        dataset = ShardStream([shards], augmentation_scale=0.5, window=5)
        return MMGEMTrainer(make_model(processor), args, processor, dataset)

    whole = trainer("whole")
    logging.enable_propagation()
    whole.train()
    logging.disable_propagation()
    assert f"{whole.counts.bad_kinds.total()} training examples could not be read" in caplog.text
    assert whole.counts.bad_kinds.keys() == {"unreadable image"} and 3 <= whole.counts.bad_kinds.total() <= 12
    for step in (3, 9):
        resumed = trainer(f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), (step, name)
        assert losses(resumed) == losses(whole)  # also where a checkpoint is in the middle of an interval of the log


def test_a_stream_goes_on_with_the_readers_it_had(processor, tmp_path, shards):
    def trainer(window=5, **options):
        options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, **options}
        args = training_arguments(tmp_path, **options)
        return MMGEMTrainer(make_model(processor), args, processor, ShardStream([shards], window=window))

    trainer(max_steps=1).train()
    with pytest.raises(CheckpointError, match=r"read by \[1, 1\] .* not \[1, 2\]"):
        trainer(max_steps=2, dataloader_num_workers=2).train(resume_from_checkpoint=True)
    finished = trainer(max_steps=1)  # killed while the model was saved, say: it is there to be saved again
    finished.train(resume_from_checkpoint=True)
    assert finished.state.global_step == 1
    for name, tensor in load_file(tmp_path / "checkpoint-1" / "model.safetensors").items():
        assert torch.equal(tensor, finished.model.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="read other data"):
        trainer(max_steps=2, window=6).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="--max_steps"):
        trainer(num_train_epochs=1)


def test_from_scratch_on_shards(shards, tmp_path, monkeypatch):
    import runpy
    import sys

    from tests.training.test_cli import ROOT, TOWERS

    command = ["train.py", "--train_shards", *shards, "--max_steps", "2", "--per_device_train_batch_size", "4"]
    command += [*TOWERS, "--output_dir", str(tmp_path), "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert (tmp_path / "model.safetensors").is_file()
