"""Benchmarks that must work when their day comes: one for a GPU, and one that writes a page (`make test-slow`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_paper_claims_quick(tmp_path):
    """Every claim gets its table, every cell a figure, and what was done is not done again."""
    command = [sys.executable, "benchmarks/paper_claims.py", "--quick", "--output_dir", str(tmp_path / "runs")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (tmp_path / "runs" / "paper-claims.md").read_text()
    assert page.count("\n## (") == 5 and "nan" not in page
    assert page.count("**Open.**") == 23, "with one seed"
    for name in ("regions", "heat-maps", "captions"):
        assert (tmp_path / "runs" / "images" / f"paper-claims-{name}.png").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "joint-0" in first and "joint-0" not in again
    assert (tmp_path / "runs" / "paper-claims.md").read_text() == page


@pytest.mark.slow  # a script for GPUs
def test_gpu_on_a_cpu(tmp_path):
    """Every row has a figure, or says why not; without compiling, which takes longer than the rest."""
    command = [sys.executable, "benchmarks/gpu.py", "--sizes", "tiny", "--device", "cpu", "--steps", "1"]
    command += ["--output", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    table = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rows = {row["what"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert len(rows) == 8 and all(what in table for what in rows)
    faults = {what: row["fault"] for what, row in rows.items() if "fault" in row}
    assert all("flash" in what and "ImportError" in fault for what, fault in faults.items()), faults
    assert all(row["per_second"] > 0 for what, row in rows.items() if what not in faults)
    # On a CPU the peak is measured, at a moment that may be busier than the step's: a share above 1 is no fault.
    assert rows["step, sdpa"]["mfu"] > 0 and rows["step, sdpa"]["dry_run_gib"] > 0
