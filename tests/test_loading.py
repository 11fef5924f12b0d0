"""Checkpoints that are damaged are refused wherever one is loaded, by the name of the weight."""

import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from mmgem import MMGEMModel
from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.evaluation.tasks import load_model
from mmgem.hub.export import export
from mmgem.loading import load_checkpoint
from mmgem.training.adapters import add_region_adapter

from .conftest import make_model
from .training.test_cli import ROOT


def without(name):
    return lambda tensors: tensors.pop(name)


def filled(name, value):
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def renamed(tensors):
    tensors["text_projektion.bias"] = tensors["text_projection.bias"].clone()


def reshaped(tensors):
    tensors["text_projection.weight"] = torch.zeros(3, 3)


DAMAGES = [
    (without("text_projection.weight"), "text_projection.weight is missing"),
    (without("language_model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
    (filled("visual_projection.weight", torch.nan), "visual_projection.weight holds NaN or infinity"),
    (filled("lm_head.weight", torch.inf), "lm_head.weight holds NaN or infinity"),
    (renamed, "text_projektion.bias is no weight of the model"),
    (reshaped, "text_projection.weight has another shape"),
]


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """Copies the checkpoint with its tensors changed."""

    def copy(damage, name="model.safetensors", source=checkpoint):
        folder = tmp_path / "damaged"
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        damage(tensors)
        save_file(tensors, folder / name, {"format": "pt"})
        return str(folder)

    return copy


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_damaged_weights_are_refused_by_name(damaged, damage, message):
    with pytest.raises(ValueError, match=rf"damaged is damaged: .*{message}"):
        load_checkpoint(damaged(damage))


@pytest.mark.parametrize("damage, message", [DAMAGES[0], DAMAGES[2]])
def test_from_pretrained_refuses_what_would_be_random_or_nan(damaged, damage, message):
    """AutoModel, pipelines, MTEB and sentence-transformers load by it."""
    folder = damaged(damage)
    for auto_class in (MMGEMModel, AutoModel):
        with pytest.raises(ValueError, match=rf"damaged is damaged: .*{message}"):
            auto_class.from_pretrained(folder)


def test_a_file_that_is_cut_off_is_refused(damaged, tmp_path):
    folder = damaged(lambda tensors: None)
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged could not be loaded \(SafetensorError\)"):
        load_checkpoint(folder)


def test_what_stage_1_does_not_train_may_be_missing(damaged, processor):
    def older(tensors):
        for name in [name for name in tensors if name.startswith(("region_projection", "soft_prompts"))]:
            del tensors[name]

    expected, loaded = make_model(processor).state_dict(), load_checkpoint(damaged(older)).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("damage, message", [DAMAGES[0], DAMAGES[2]])
def test_training_evaluation_and_export_refuse_damaged_weights(damaged, tmp_path, monkeypatch, damage, message):
    folder = damaged(damage)
    command = ["train.py", "--init_from", folder, "--dataset_name", "scenes", "--max_train_samples", "16"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    with pytest.raises(ValueError, match=message):
        load_model(EvaluationArguments(model=folder, dataset_name="scenes"))
    with pytest.raises(ValueError, match=message):
        export(folder, "org/name", str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("base_model.model.soft_prompts.weight"), "soft_prompts.*weight is missing"),
        (filled("base_model.model.caption_projection.weight", torch.nan), "caption_projection.*weight holds NaN"),
    ],
)
def test_a_damaged_adapter_is_refused_and_leaves_nothing(processor, damaged, tmp_path, damage, message):
    add_region_adapter(make_model(processor), "region-caption", 2).save_pretrained(tmp_path / "adapter")
    folder = damaged(damage, "adapter_model.safetensors", tmp_path / "adapter")
    model = make_model(processor)
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, adapter_name="region-caption")
    assert model.state_dict().keys() == before
