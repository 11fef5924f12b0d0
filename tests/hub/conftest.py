"""A run's folder with both adapters and with what runs leave behind, its export, and a Hub on 127.0.0.1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from mmgem import MMGEMProcessor
from mmgem.hub.export import export
from mmgem.hub.model_card import CardOptions
from mmgem.modeling_mmgem.adapters_mmgem import FUSED_ADAPTER, REGION_ADAPTERS
from mmgem.training.adapters import add_fused_adapter, add_region_adapter

from ..conftest import make_model, make_picture
from .hub_server import TOKEN, HubServer


ROOT = Path(__file__).parents[2]
REPO_ID = "org/mm-gem"
LEFT_BEHIND = ("training_args.bin", "optimizer.pt", "notes.txt", "checkpoint-5/trainer_state.json", "report.md")
TRAINING = {
    "stage": "1",
    "objective": "joint",
    "base_models": ["openai/clip-vit-base-patch16", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"],
    "from_scratch": False,
    "dataset_ids": ["org/pairs"],
    "data": ["org/pairs"],
    "steps": 5,
    "batch_size": 8,
    "examples": 40,
    "settings": {"learning_rate": 0.001, "precision": "float32"},
    "seconds": 12.0,
    "resumed": False,
    "hardware": "1 x a card of the test's",
    "commit": None,
    "versions": {"mmgem": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
}
RESULTS = {
    "metrics": {"text_to_image_R@1": 0.5, "caption_cider": 1.25},
    "setting": {"dataset": "data/of/somebody/pairs.parquet", "split": "test", "size": 7, "prompt": "<image>[CAP]"},
}
REGION_RESULTS = {
    "metrics": {"region_caption_exact": 0.75, "stage_1_region_caption_exact": 0.0},
    "setting": {"dataset": "scenes", "split": "test"},
}


@pytest.fixture(scope="session")
def trained(processor, tmp_path_factory) -> Path:
    """The folder of a run: a model whose embeddings and captions are not all alike, and two adapters."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    save_model_and_adapters(folder, processor)
    write_json(folder / "region-caption/results.json", REGION_RESULTS)
    write_json(folder / "region-retrieval/results.json", {"metrics": {}, "setting": {}})
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for the Hub")
    write_json(folder / "training.json", TRAINING)
    write_json(folder / "results.json", RESULTS)
    make_picture(1).save(folder / "retrieval.png")
    return folder


def save_model_and_adapters(folder: Path, processor: MMGEMProcessor, **text_config: int) -> None:
    bold(make_model(processor, **text_config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    for kind, modules in REGION_ADAPTERS.items():
        base = bold(make_model(processor, **text_config))
        base.config._name_or_path = base.name_or_path = str(folder)
        adapter = add_region_adapter(base, kind, 2)
        with torch.no_grad():
            for name in modules:
                getattr(base, name).modules_to_save["default"].weight.normal_()
        adapter.save_pretrained(folder / kind)
    base = bold(make_model(processor, **text_config))
    base.config._name_or_path = base.name_or_path = str(folder)
    adapter = add_fused_adapter(base, LoraConfig(r=2))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapter.save_pretrained(folder / FUSED_ADAPTER)


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hub"
    export(str(trained), REPO_ID, str(folder), options=CardOptions(images=True))
    return folder


@pytest.fixture(scope="session")
def pushed(trained, tmp_path_factory):
    """A Hub that a run's folder was pushed to, as a user would, and what was printed."""
    home = tmp_path_factory.mktemp("pushing")
    with HubServer() as hub:
        result = push(hub, home, "--model", str(trained), "--repo_id", REPO_ID, "--output_dir", "hub", "--images")
        assert result.returncode == 0, result.stderr
        yield hub, result, home


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def bold(model):
    """The same tiny model with weights so large that outputs differ from input to input."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def environment(hub: HubServer, home: Path, **changes: str) -> dict[str, str]:
    """Of a process that has this Hub, which speaks LFS alone, and a cache of its own."""
    names = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **names, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **changes}


def run_clean(code: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs code in a fresh process that cannot import mmgem."""
    code = "import sys\nsys.modules['mmgem'] = None\n" + code
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def push(hub: HubServer, home: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "push_to_hub.py"), *arguments]
    env = environment(hub, home, **changes)
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
