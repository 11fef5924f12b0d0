"""The package as an installed one: what the wheel holds, and what importing it brings along."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def run(code, **kwargs):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_no_training_libraries():
    code = """
import sys
import mmgem
heavy = ("datasets", "peft", "evaluate", "transformers.trainer", "torchvision", "mmgem.data",
         "mmgem.training", "mmgem.evaluation")
print([name for name in heavy if name in sys.modules])
"""
    assert run(code).strip() == "[]"


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    """Site-packages with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    # Built from a copy: setuptools leaves build/ behind, and takes stale files from it.
    for name in ("configuration", "modeling_mmgem", "processing", "mmgem"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


@pytest.mark.slow  # builds the wheel
def test_wheel_puts_nothing_but_mmgem_into_site_packages(installed_wheel):
    names = {path.name for path in installed_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"mmgem", "bin"}  # pip puts the command there, for `--target`
    assert [path.name for path in (installed_wheel / "bin").iterdir()] == ["mmgem"]
    modules = {path.parent.name for path in (installed_wheel / "mmgem").glob("*/__init__.py")}
    assert {"configuration", "modeling_mmgem", "processing", "data", "training", "evaluation"} <= modules
    assert {"library", "page", "cli"} <= modules


@pytest.mark.slow  # builds the wheel
def test_wheel_works_outside_the_checkout(installed_wheel, tmp_path):
    code = """
import mmgem, mmgem.configuration, mmgem.modeling_mmgem.pooling_mmgem, mmgem.training.trainer, mmgem.evaluation.report
import torch
from transformers import AutoModel
print(mmgem.__file__, mmgem.modeling_mmgem.__file__)
tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
config = mmgem.MMGEMConfig(
    vision_config={**tiny, "image_size": 16, "patch_size": 8}, text_config={**tiny, "vocab_size": 50}, projection_dim=8
)
mmgem.MMGEMModel(config).save_pretrained("model")
print(AutoModel.from_pretrained("model").get_embedding(pixel_values=torch.zeros(2, 3, 16, 16)).shape)
"""
    output = run(code, cwd=tmp_path, env={"PYTHONPATH": str(installed_wheel), "PATH": "/usr/bin:/bin"})
    front, model, shape = output.replace("\n", " ", 1).split(" ", 2)
    assert Path(front).is_relative_to(installed_wheel) and Path(model).is_relative_to(installed_wheel)
    assert shape.strip() == "torch.Size([2, 8])"
