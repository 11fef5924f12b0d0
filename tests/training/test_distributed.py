"""Gradients must not depend on how many processes share the batch (gloo, started with torchrun)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def single_process_gradients(tmp_path_factory):
    """For 1 and 4 accumulation steps."""
    return {steps: run(1, steps, tmp_path_factory.mktemp("single")) for steps in (1, 4)}


def run(processes, accumulation_steps, folder, mini_batch_size=0):
    return launch(processes, "one_step.py", accumulation_steps, mini_batch_size, folder)


def launch(processes, script, *arguments):
    folder = arguments[-1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "tests/training" / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    saved = torch.load(folder / "gradients.pt", weights_only=True)
    assert saved["world_size"] == processes
    return saved


@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("processes", [2, 4])
def test_gradient_equals_the_single_process(single_process_gradients, processes, accumulation_steps, tmp_path):
    expected = single_process_gradients[accumulation_steps]
    assert "logit_scale.weight" in expected["gradients"]
    assert_equal(run(processes, accumulation_steps, tmp_path), expected)


@pytest.mark.parametrize("processes, accumulation_steps, mini_batch_size", [(1, 1, 3), (2, 1, 3), (2, 4, 1)])
def test_gradient_cache_equals_the_whole_batch(
    single_process_gradients, processes, accumulation_steps, mini_batch_size, tmp_path
):
    actual = run(processes, accumulation_steps, tmp_path, mini_batch_size)
    assert_equal(actual, single_process_gradients[accumulation_steps])
    torch.testing.assert_close(actual["loss"], actual["expected_loss"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("stage", ["region-caption", "region-retrieval"])
def test_stage_2_equals_the_single_process_whatever_number_of_regions_each_has(stage, tmp_path):
    """Also with the patch features in a file that the processes share."""
    expected = launch(1, "one_region_step.py", stage, "plain", tmp_path)
    actual = launch(2, "one_region_step.py", stage, "cached", tmp_path)
    assert len(expected["gradients"]) == (3 if stage == "region-caption" else 2)
    assert_equal(actual, expected)
    torch.testing.assert_close(actual["loss"], expected["loss"], atol=1e-4, rtol=1e-5)


def assert_equal(actual, expected):
    assert actual["gradients"].keys() == expected["gradients"].keys() and actual["gradients"]
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max()
        error = (actual["gradients"][name] - gradient).abs().max()
        assert error <= 1e-5 * scale + 1e-8, (name, error, scale)


def test_accumulated_loss_is_the_mean_over_micro_batches_and_all_caption_tokens(single_process_gradients):
    saved = single_process_gradients[4]
    torch.testing.assert_close(saved["loss"], saved["expected_loss"], atol=1e-4, rtol=1e-5)
