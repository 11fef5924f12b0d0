"""The benchmark that writes a page, in its quick form. Slow: `make test-slow`."""

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
