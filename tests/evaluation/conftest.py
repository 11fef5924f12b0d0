"""A checkpoint, its adapters and a table, and the suite's command line in this process."""

import json
import sys

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image

from mmgem.evaluation.__main__ import main
from mmgem.training.adapters import add_region_adapter
from tests.conftest import make_model, make_picture


def bold_model(processor):
    """What it writes depends on the picture, which the tiny model hardly looks at otherwise."""
    model = make_model(processor)
    with torch.no_grad():
        model.caption_projection.weight.mul_(100)
    return model


@pytest.fixture
def checkpoint(processor, tmp_path):
    bold_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def adapters(processor, tmp_path):
    """Of both stages, untrained."""
    for stage in ("region-caption", "region-retrieval"):
        add_region_adapter(bold_model(processor), stage, 1).save_pretrained(tmp_path / stage)
    return [str(tmp_path / "region-caption"), str(tmp_path / "region-retrieval")]


@pytest.fixture
def labelled(tmp_path):
    """A folder of `datasets` with pictures of three classes, and a suite of it twice."""
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "red_bicycle", "cat"])})
    rows = {"image": [make_picture(i) for i in range(9)], "label": [i % 3 for i in range(9)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pets.parquet")
    other = {"templates": ["{} on a beach"], "class_names": ["snow", "mat", "people"]}
    suite = [
        {"name": "pets", "data_file": str(tmp_path / "pets.parquet")},
        {"name": "others", "data_file": str(tmp_path / "pets.parquet"), **other},
    ]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    return tmp_path


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command line, in this process; returns results.json's content."""

    def run(*arguments):
        command = ["mmgem.evaluation", *map(str, arguments), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        main()
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run
