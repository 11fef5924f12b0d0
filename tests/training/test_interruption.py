"""Runs that are cut off: killed at whatever moment, in the middle of a checkpoint, by a full disk."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmgem import MMGEMModel
from mmgem.training.checkpoints import CheckpointError, find_checkpoint
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import make_model, write_shards
from tests.training.test_cli import ROOT, TOWERS
from tests.training.test_training import eight_pictures, training_arguments


STEPS, SAVE_STEPS = 200, 20
TIMES = ("samples_per_second", "data_time_fraction", "train_runtime", "train_samples_per_second")
TIMES += ("train_steps_per_second",)


@pytest.fixture(scope="module")
def start():
    """Starts train.py with these arguments and returns its process id; `wait()` gives its exit status."""
    command = [sys.executable, "-u", "-m", "tests.training.forks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as forks:

        def start(arguments, log):
            forks.stdin.write(json.dumps([list(map(str, arguments)), str(log)]) + "\n")
            forks.stdin.flush()
            return int(forks.stdout.readline())

        start.wait = lambda: int(forks.stdout.readline())
        yield start
        forks.stdin.close()


def steps_logged(log: Path) -> int:
    return log.read_text().count("'loss': ") if log.exists() else 0


def curve(folder: Path) -> list[dict]:
    """Everything logged but the times, from the last checkpoint."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in state["log_history"]]


@pytest.mark.parametrize(
    ("data", "workers"),
    [
        ("table", 0),
        ("shards", 2),
        pytest.param("table", 2, marks=pytest.mark.slow),
        pytest.param("shards", 0, marks=pytest.mark.slow),
    ],
)
def test_killed_three_times_ends_like_the_uninterrupted_run(start, tmp_path, data, workers):
    if data == "shards":
        write_shards(tmp_path)
        source = ["--train_shards", tmp_path / "{0..3}.tar", "--shuffle_window", 5]
    else:
        source = ["--dataset_name", "scenes", "--max_train_samples", 100, "--caption_samples", 0]
        source += ["--max_eval_samples", 4]
    arguments = [*source, *TOWERS, "--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--save_total_limit", 2]
    arguments += ["--per_device_train_batch_size", 4, "--dataloader_num_workers", workers, "--logging_steps", 1]
    arguments += ["--augmentation_scale", 0.6, "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
    start([*arguments, "--output_dir", tmp_path / "whole"], tmp_path / "whole.log")
    assert start.wait() == 0, (tmp_path / "whole.log").read_text()

    killed = tmp_path / "killed"
    arguments += ["--output_dir", killed]
    rng = random.Random(workers)
    # One of the three when a checkpoint is about to be written.
    moments = [rng.randrange(SAVE_STEPS + 1, 90), SAVE_STEPS * rng.randint(5, 8), rng.randrange(165, 190)]
    for k, moment in enumerate(moments):
        log = tmp_path / f"killed-{k}.log"
        resume = ["--resume_from_checkpoint", "true"] if k > 0 else []
        first = int(Path(find_checkpoint(str(killed))).name.split("-")[1]) if k > 0 else 0
        process = start([*arguments, *resume], log)
        while first + steps_logged(log) < moment and os.path.exists(f"/proc/{process}/fd"):
            time.sleep(0.001)
        os.killpg(process, signal.SIGKILL)
        assert start.wait() == -signal.SIGKILL, log.read_text()
    start([*arguments, "--resume_from_checkpoint", "true"], tmp_path / "last.log")
    assert start.wait() == 0, (tmp_path / "last.log").read_text()

    assert curve(killed) == curve(tmp_path / "whole")
    expected, actual = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize("writes", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_checkpoint_that_was_cut_off_is_not_taken(processor, tmp_path, monkeypatch, writes):
    """Also where it was written over a whole one, which an earlier run left under the same number."""

    def trainer():
        args = training_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        return MMGEMTrainer(make_model(processor), args, processor, eight_pictures())

    trainer().train()
    last = tmp_path / "checkpoint-4"
    assert find_checkpoint(str(tmp_path)) == str(last)
    state = (last / "trainer_state.json").read_bytes()
    (last / "trainer_state.json").write_bytes(state[:-2])
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    (last / "trainer_state.json").write_bytes(state)

    class Killed(BaseException):
        pass

    def write_and_die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise Killed

    original = getattr(MMGEMTrainer, writes)
    monkeypatch.setattr(MMGEMTrainer, writes, write_and_die)
    with pytest.raises(Killed):
        trainer().train()
    assert last.exists()
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_full_disk_ends_the_run_with_the_last_good_checkpoint(processor, tmp_path):
    class Full(TrainerCallback):
        """From step 3 on no file may grow beyond half the model."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                size = os.path.getsize(tmp_path / "checkpoint-2" / "model.safetensors")
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    def trainer(callbacks=()):
        args = training_arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
        return MMGEMTrainer(make_model(processor), args, processor, eight_pictures(), callbacks=list(callbacks))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written .*checkpoint-2 is whole"):
            trainer([Full()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "checkpoint-4").exists()
    trainer().train(resume_from_checkpoint=True)
    MMGEMModel.from_pretrained(tmp_path / "checkpoint-6")


def test_what_fails_after_a_checkpoint_leaves_it(processor, tmp_path, monkeypatch):
    """Such as the deletion of older ones, which may have gone half the way."""

    def rotate(**kwargs):
        raise OSError("directory not empty")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    args = training_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(OSError, match="not empty"):
        MMGEMTrainer(make_model(processor), args, processor, eight_pictures()).train()
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_resume_from_a_folder_without_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        find_checkpoint(str(tmp_path / "missing"))
