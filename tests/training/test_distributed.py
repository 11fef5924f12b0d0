"""Gradients must not depend on how many processes share the batch (gloo, started with torchrun)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow  # the same code with other numbers: `make test-slow`, and CI


@pytest.fixture(scope="module")
def single_process_gradients(tmp_path_factory):
    """For 1 and 4 accumulation steps."""
    return {steps: run(1, steps, tmp_path_factory.mktemp("single")) for steps in (1, 4)}


def run(processes, accumulation_steps, folder, mini_batch_size=0, strategy="ddp"):
    return launch(processes, "one_step.py", strategy, accumulation_steps, mini_batch_size, folder)


def launch(processes, script, *arguments):
    folder = arguments[-1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "tests/training" / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    saved = torch.load(folder / "gradients.pt", weights_only=True)
    assert saved["world_size"] == processes
    return {**saved, "weights": load_file(next((folder / "saved").glob("*.safetensors")))}


@pytest.mark.parametrize(
    ("processes", "accumulation_steps"),
    [(2, 4), pytest.param(2, 1, marks=slow), pytest.param(4, 1, marks=slow), pytest.param(4, 4, marks=slow)],
)
def test_gradient_equals_the_single_process(single_process_gradients, processes, accumulation_steps, tmp_path):
    expected = single_process_gradients[accumulation_steps]
    assert "logit_scale.weight" in expected["gradients"]
    assert_equal(run(processes, accumulation_steps, tmp_path), expected)


@pytest.mark.parametrize(
    ("processes", "accumulation_steps", "mini_batch_size"),
    [pytest.param(1, 1, 3, marks=slow), pytest.param(2, 1, 3, marks=slow), (2, 4, 1)],
)
def test_gradient_cache_equals_the_whole_batch(
    single_process_gradients, processes, accumulation_steps, mini_batch_size, tmp_path
):
    actual = run(processes, accumulation_steps, tmp_path, mini_batch_size)
    assert_equal(actual, single_process_gradients[accumulation_steps])
    torch.testing.assert_close(actual["loss"], actual["expected_loss"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("processes", "mini_batch_size"), [(2, 3), pytest.param(2, 0, marks=slow), pytest.param(4, 0, marks=slow)]
)
@pytest.mark.parametrize("strategy", ["ddp-negatives", "ddp-sigmoid"])
def test_other_losses_are_those_of_the_whole_batch(strategy, processes, mini_batch_size, tmp_path):
    """
    The margin, the weights and the choice of the hardest; SigLIP's loss with hard negatives, of which each process has
    another number, and with a teacher. Over processes and through the gradient cache.
    """
    expected = run(1, 1, tmp_path / "one", strategy=strategy)
    actual = run(processes, 1, tmp_path / "several", mini_batch_size, strategy)
    assert_equal(actual, expected)
    assert ("logit_scale.bias" in expected["gradients"]) == (strategy == "ddp-sigmoid")
    torch.testing.assert_close(actual["loss"], expected["loss"], atol=1e-4, rtol=1e-5)
    assert abs(float(expected["loss"] - expected["expected_loss"])) > 1e-2, "which is that of all negatives alike"
    if strategy == "ddp-sigmoid":
        assert expected["distillation_loss"] > 0.1
        torch.testing.assert_close(actual["distillation_loss"], expected["distillation_loss"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [pytest.param("region-caption", marks=slow), "region-retrieval"])
def test_stage_2_equals_the_single_process_whatever_number_of_regions_each_has(stage, tmp_path):
    """Also with the patch features in files that the processes share."""
    for strategy, features in (("ddp", "cached"), ("fsdp", "plain")):
        folders = [tmp_path / f"{features}-{processes}" for processes in (1, 2)]  # each computes its own cache
        expected = launch(1, "one_adapter_step.py", "ddp", stage, features, folders[0])
        assert len(expected["gradients"]) == (3 if stage == "region-caption" else 2)
        actual = launch(2, "one_adapter_step.py", strategy, stage, features, folders[1])
        assert_equal(actual, expected)
        torch.testing.assert_close(actual["loss"], expected["loss"], atol=1e-4, rtol=1e-5)


def test_fused_queries_equal_the_single_process_whatever_number_of_negatives_each_has(tmp_path):
    expected, actual, cached = (
        launch(n, "one_adapter_step.py", "ddp", "fused-retrieval", parts, tmp_path / f"{n} {parts}")
        for n, parts in ((1, "plain"), (2, "plain"), (2, "mini-batches"))
    )
    for found in (actual, cached):
        assert_equal(found, expected)
        torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-4, rtol=1e-5)


def test_texts_equal_the_single_process_and_go_through_the_gradient_cache(tmp_path):
    expected = launch(1, "one_text_step.py", 0, tmp_path / "one")
    for processes, mini_batch_size in ((2, 0), (2, 3)):
        actual = launch(processes, "one_text_step.py", mini_batch_size, tmp_path / f"several {mini_batch_size}")
        assert_equal(actual, expected)
        torch.testing.assert_close(actual["loss"], expected["loss"], atol=1e-4, rtol=1e-5)


def test_processes_share_the_parts_of_a_feature_cache(tmp_path):
    """Of 1,030 images one process encodes the first 1,024, the other the rest, and both train on all of them."""
    expected, actual = (run(n, 4, tmp_path / str(n), strategy="ddp-cached") for n in (1, 2))
    assert_equal(actual, expected)
    assert (expected["encoded"], actual["encoded"]) == ([1030], [1024, 6])
    torch.testing.assert_close(actual["loss"], expected["expected_loss"], atol=2e-3, rtol=0)  # float16


@pytest.mark.parametrize(
    ("accumulation_steps", "mini_batch_size"),
    [pytest.param(1, 0, marks=slow), (4, 0), pytest.param(1, 3, marks=slow)],
)
def test_sharded_model_equals_the_single_process(
    single_process_gradients, accumulation_steps, mini_batch_size, tmp_path
):
    actual = run(2, accumulation_steps, tmp_path, mini_batch_size, "fsdp")
    assert_equal(actual, single_process_gradients[accumulation_steps])


def test_temperature_of_a_sharded_model_in_16_bits_is_float32(single_process_gradients, tmp_path):
    """In bfloat16 1 / tau = 14.29 is 14.25, and tau 0.07018."""
    actual = run(2, 1, tmp_path, strategy="fsdp-bf16")
    assert actual["tau"] == single_process_gradients[1]["tau"] == pytest.approx(0.07, abs=1e-6)
    torch.testing.assert_close(actual["loss"], actual["expected_loss"], rtol=0.01, atol=0)
    assert {w.dtype for w in actual["weights"].values() if w.is_floating_point()} == {torch.float32}


def assert_equal(actual, expected):
    assert actual["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        # One step of AdamW at 1e-6 in the direction of gradients that differ by rounding.
        torch.testing.assert_close(actual["weights"][name], weight, rtol=0, atol=2.1e-5)
    assert actual["gradients"].keys() == expected["gradients"].keys() and actual["gradients"]
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max()
        error = (actual["gradients"][name] - gradient).abs().max()
        assert error <= 1e-5 * scale + 1e-8, (name, error, scale)


def test_accumulated_loss_is_the_mean_over_micro_batches_and_all_caption_tokens(single_process_gradients):
    saved = single_process_gradients[4]
    torch.testing.assert_close(saved["loss"], saved["expected_loss"], atol=1e-4, rtol=1e-5)
