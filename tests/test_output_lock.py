"""Two runs in one folder, and what a killed one leaves."""

import multiprocessing
import os
import signal
import sys

import pytest

from mmgem.evaluation.__main__ import main as evaluate
from mmgem.output_lock import output_lock

from .training.test_cli import TOWERS, train  # noqa: F401


def hold(folder, pipe, with_worker):
    with output_lock(folder):
        if with_worker and os.fork() == 0:  # as a loader's worker, it outlives its killed parent for a while
            pipe.recv()
            os._exit(0)
        pipe.send(os.getpid())
        signal.pause()


@pytest.fixture
def other(tmp_path):
    """Starts a process that holds tmp_path / "out"; gives it, and a pipe on which its worker ends."""
    started = []

    def start(with_worker=False):
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        process = context.Process(target=hold, args=(str(tmp_path / "out"), theirs, with_worker))
        process.start()
        started.append(process)
        assert ours.recv() == process.pid
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_folder_in_use_is_refused_by_training_and_evaluation(train, other, tmp_path, monkeypatch):  # noqa: F811
    process, _ = other()
    message = rf"out is in use by process {process.pid} on .*, started \d{{4}}-\d\d-\d\d \d\d:"
    data = ["--dataset_name", "scenes", "--max_train_samples", 8, *TOWERS]
    with pytest.raises(SystemExit, match=message):
        train(*data, "--max_steps", 1, "--output_dir", "out", "--report_to", "none")
    monkeypatch.setattr(sys, "argv", ["-", "--model", "nowhere", "--dataset_name", "scenes", "--output_dir", "out"])
    with pytest.raises(SystemExit, match=message):
        evaluate()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".run.lock", ".run.lock.json"}


def test_what_a_killed_run_leaves_does_not_hinder(other, tmp_path):
    process, _ = other()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for _ in range(2):  # nor does what a finished one leaves
        with output_lock(str(tmp_path / "out")):
            pass


def test_workers_of_a_killed_run_are_waited_for(other, tmp_path):
    process, pipe = other(with_worker=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    pipe.send("end")
    with output_lock(str(tmp_path / "out")):
        pass
