"""Stage 1 on cached features: the same training, what is computed again, and what is refused."""

import os
import pickle
import resource
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

from mmgem.data.features import FeatureCacheError
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.data.shards import ShardStream
from mmgem.hub.export import files_of
from mmgem.modeling_mmgem.vision_mmgem import encode_images
from mmgem.training.feature_cache import DiskFullError
from mmgem.training.train_data import ExampleCounts
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import VISION, Table, make_model, make_picture

from .test_cli import TOWERS, pairs, train  # noqa: F401
from .test_streaming import losses as stream_losses
from .test_streaming import shards  # noqa: F401
from .test_training import CAPTIONS, training_arguments


def pictures(count=8, first=0, **options) -> PairDataset:
    """Two captions each."""
    rows = [{"image": make_picture(first + i), "caption": [CAPTIONS[i % 8], f"number {i}"]} for i in range(count)]
    return PairDataset(Table(rows), **options)


class FedByHand(PairDataset):
    """Examples with the float16 features that a model gives of all images in one batch."""

    def _read(self, row, cached):
        example = super()._read(row, cached)
        del example["image"]
        return {**example, **{name: tensor[row].half().float() for name, tensor in self.by_hand.items()}}


def make_trainer(processor, folder, dataset=None, model=None, cached=True, **options):
    options = {"freeze": ["vision_model"], "max_steps": 2, "logging_steps": 1, **options}
    args = training_arguments(folder, cache_features=cached, **options)
    return MMGEMTrainer(model or make_model(processor), args, processor, dataset or pictures())


def encoded_images(model) -> list[int]:
    """Is told the size of every batch that goes through the vision tower."""
    sizes: list[int] = []
    model.vision_model.register_forward_hook(lambda module, args, output: sizes.append(len(output[0])))
    return sizes


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"image_grid_size": 2, "image_pooling": "cls+mean"}, {"packing": True, "pack_length": 64}),
        ({"image_grid_size": 3}, {"mini_batch_size": 2}),
        ({"image_grid_size": 2}, {"objective": "contrastive", "per_device_train_batch_size": 4, "max_steps": 4}),
        ({}, {"freeze": [], "lora_rank": 2}),
    ],
)
def test_cached_run_equals_one_that_is_fed_by_hand(processor, tmp_path, monkeypatch, config, options):
    k = config.get("image_grid_size", 1)
    monkeypatch.setattr(processor, "image_grid_size", k)
    runs, sizes = {}, {}
    for name in ("uncached", "by hand", "cached", "cached again"):
        model = make_model(processor, config=config)
        dataset = pictures()
        if name == "by hand":
            dataset = FedByHand(dataset.table)
            pixels = processor.image_processor([make_picture(i) for i in range(8)], return_tensors="pt")
            with torch.no_grad():
                pooled, patches = encode_images(model.vision_model, pixels["pixel_values"], model.config.image_pooling)
                cells = model.pool_aggregator(patches.flatten(1, 2), patches.shape[1:3], grid_size=k)
            dataset.by_hand = {"pooled_features": pooled, "patch_features": cells.unflatten(1, (k, k))}
        sizes[name] = encoded_images(model)
        trainer = make_trainer(processor, tmp_path, dataset, model, cached=name.startswith("cached"), **options)
        trainer.train()
        runs[name] = losses(trainer), {n: p.detach() for n, p in trainer.model.named_parameters()}
    expected_losses, expected = runs["by hand"]
    for name in ("cached", "cached again"):
        assert runs[name][0] == pytest.approx(expected_losses, abs=1e-5)
        for parameter, value in expected.items():
            torch.testing.assert_close(runs[name][1][parameter], value, atol=1e-4, rtol=0, msg=parameter)
    assert runs["uncached"][0] == pytest.approx(runs["cached"][0], rel=2e-3)
    assert sizes["cached"] == [8] and sizes["cached again"] == [], "each image once in two epochs, and never again"
    assert not [file for file in files_of(tmp_path) if "features" in str(file)], "an export leaves the cache out"


def test_a_row_holds_the_float16_features_and_a_worker_opens_the_files_itself(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1)
    trainer.train()
    dataset = trainer.train_dataset
    with torch.no_grad():
        pixels = processor(images=[make_picture(5)], return_tensors="pt")["pixel_values"]
        expected = trainer.model.vision_model(pixel_values=pixels).last_hidden_state
        expected = trainer.model.vision_model.post_layernorm(expected)[:, 1:].mean(1)[0]
    sent = pickle.loads(ForkingPickler.dumps(dataset))
    assert not sent.features._open and dataset.features._open
    for example in (dataset[5], sent[5]):
        assert example["pooled_features"].dtype == torch.float32 and "image" not in example
        torch.testing.assert_close(example["pooled_features"], expected, atol=1e-3, rtol=1e-3)
        assert example["image_id"] == pictures()[5]["image_id"]


class KilledAt(Table):
    """Ends the program at a row."""

    row, reads = None, 0

    def __getitem__(self, key):
        self.reads += 1
        if key == self.row:
            raise KeyboardInterrupt
        return super().__getitem__(key)


def test_a_killed_run_computes_the_missing_parts_only(processor, tmp_path):
    table = KilledAt(pictures(8).table[i % 8] for i in range(1030))
    table.row = 1026
    with pytest.raises(KeyboardInterrupt):
        make_trainer(processor, tmp_path, PairDataset(table), max_steps=1).train()
    assert [path.name for path in (tmp_path / "features").glob("*.safetensors")] == ["rows-000000.safetensors"]
    (tmp_path / "features" / ".unfinished-parts" / "0-rows-000001.safetensors").write_bytes(b"half")
    table.row = None
    model = make_model(processor)
    sizes = encoded_images(model)
    trainer = make_trainer(processor, tmp_path, PairDataset(table), model, max_steps=1, dataloader_num_workers=1)
    trainer.train()
    assert sum(sizes) == 6 and not (tmp_path / "features" / ".unfinished-parts").exists()
    features = trainer.train_dataset.features
    assert torch.equal(features.of_row(1025)["pooled_features"], features.of_row(1)["pooled_features"])


@pytest.mark.parametrize("workers", [0, 2])
def test_streams(processor, tmp_path, shards, workers, monkeypatch):  # noqa: F811
    """Cached, a stream gives the same samples, skips the same ones, and resumes bit for bit."""
    monkeypatch.setattr("mmgem.data.features.MAX_OPEN_PARTS", 2)  # of four

    def trainer(folder, cached=True):
        args = training_arguments(
            tmp_path / folder,
            freeze=["vision_model"],
            cache_features=cached,
            feature_cache_dir=str(tmp_path / "features") if cached else None,
            per_device_train_batch_size=5,
            max_steps=11,
            save_strategy="steps",
            save_steps=9,
            logging_steps=4,
            dataloader_num_workers=workers,
        )
        return MMGEMTrainer(make_model(processor), args, processor, ShardStream([shards], window=5))

    uncached, whole, resumed = trainer("uncached", cached=False), trainer("whole"), trainer("resumed")
    uncached.train()
    whole.train()
    assert whole.counts.bad_kinds == uncached.counts.bad_kinds and whole.counts.bad_kinds.total() >= 3
    torch.testing.assert_close(*map(torch.tensor, map(stream_losses, (whole, uncached))), rtol=5e-3, atol=0)
    sizes = encoded_images(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    assert sizes == []
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_shard_that_changed_is_refused(processor, tmp_path, shards):  # noqa: F811
    def trainer():
        return make_trainer(processor, tmp_path, ShardStream([copies], window=5), per_device_train_batch_size=4)

    copies = [str(tmp_path / os.path.basename(path)) for path in shards]
    for source, target in zip(shards, copies):
        Path(target).write_bytes(Path(source).read_bytes())
    trainer().train()
    for path in copies:
        data = bytearray(Path(path).read_bytes())
        for i in range(12):
            data[data.index(f"{i:03}.jpg".encode()) + 512 + 300] ^= 1
        Path(path).write_bytes(data)
    with pytest.raises(FeatureCacheError, match=r"shard-0-00000\d-\d.tar.safetensors was made of other images"):
        trainer().train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"seed": 1}}, "weights of the vision tower was 'sha256:"),
        ({"model": {"config": {"image_pooling": "cls"}}}, "image_pooling was 'mean' there, and is 'cls' now"),
        ({"model": {"config": {"image_grid_size": 2}}, "k": 2}, "grid was 1 there, and is 2 now"),
        ({"model": {"config": {"vision_config": {**VISION, "hidden_act": "gelu"}}}}, "vision_config.hidden_act was"),
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_processor.image_mean was \[0.48"),
        ({"bf16": True}, "precision was 'torch.float32' there, and is 'bf16' now"),
        ({"dataset": {"count": 9}}, "number of rows was 8 there, and is 9 now"),
        ({"dataset": {"first": 1}}, "holds features of other images: that of row 0 differs"),
        ({"damaged": b"no safetensors"}, "is no part of a feature cache, or damaged"),
    ],
)
def test_a_cache_of_another_run_is_refused_by_name(processor, tmp_path, monkeypatch, change, message):
    make_trainer(processor, tmp_path, max_steps=1).train()
    monkeypatch.setattr(processor, "image_grid_size", change.get("k", 1))
    if "image_mean" in change:
        monkeypatch.setattr(processor.image_processor, "image_mean", change["image_mean"])
    if "damaged" in change:
        (tmp_path / "features" / "rows-000000.safetensors").write_bytes(change["damaged"])
    model = make_model(processor, **change.get("model", {}))
    if "vision_config" in change.get("model", {}).get("config", {}):
        model.load_state_dict(make_model(processor).state_dict())
    dataset, bf16 = pictures(**change.get("dataset", {})), change.get("bf16", False)
    trainer = make_trainer(processor, tmp_path, dataset, model, bf16=bf16)
    with pytest.raises(FeatureCacheError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_tower_that_is_trained_and_crops_are_refused(processor, tmp_path):
    with pytest.raises(ValueError, match=r"vision_model\..* is trained. Pass --freeze vision_model"):
        make_trainer(processor, tmp_path, freeze=[])
    with pytest.raises(ValueError, match=r"augmentation_scale 0\.5 takes another crop in each step"):
        make_trainer(processor, tmp_path, pictures(augmentation_scale=0.5))
    with pytest.raises(ValueError, match="pass --cache_features true too, or --teacher"):
        make_trainer(processor, tmp_path, cached=False, feature_cache_dir=str(tmp_path))


def test_features_beyond_float16_are_refused(processor, tmp_path):
    model = make_model(processor)
    with torch.no_grad():
        model.vision_model.post_layernorm.bias.fill_(1e5)
    with pytest.raises(FeatureCacheError, match=r"image 0 of rows-000000\.safetensors are not finite in float16"):
        make_trainer(processor, tmp_path, model=model).train()
    assert not list((tmp_path / "features").glob("*.safetensors"))


def test_a_full_disk_loses_nothing(processor, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(processor, tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(DiskFullError, match=r"rows-000000.safetensors could not be written .* missing parts only"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "features").rglob("*.safetensors"))
    make_trainer(processor, tmp_path).train()


def test_a_folder_that_cannot_be_made_is_one_line(processor, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(processor, tmp_path, feature_cache_dir=str(tmp_path / "file" / "features"))
    with pytest.raises(DiskFullError, match=r"file/features cannot be written .*choose another --feature_cache_dir"):
        trainer.train()


def test_unreadable_images_that_every_process_knows_count_once():
    args = SimpleNamespace(max_bad_fraction=0.01, world_size=2)
    counts = ExampleCounts(pictures(1000), args, 50)
    bad = dict.fromkeys(range(8), "OSError: no image")
    for _ in range(2):  # training goes on
        counts.add_all_bad(bad)
        counts.add_bad(bad)
    with pytest.raises(BadDataError, match="11 training examples"):
        counts.add_bad(dict.fromkeys(range(11), "OSError: no image"))


def test_images_that_cannot_be_read_count_as_before(processor, tmp_path, caplog):
    dataset = pictures()
    dataset.table[2]["image"] = b"no picture"
    dataset.table[3]["image"] = None
    trainer = make_trainer(processor, tmp_path, dataset, max_bad_fraction=0.5)
    logging.enable_propagation()
    trainer.train()
    logging.disable_propagation()
    assert "2 training examples could not be read (1 UnidentifiedImageError, 1 ValueError" in caplog.text
    cached, uncached = trainer.train_dataset[2], pictures()
    uncached.table = dataset.table
    assert cached["bad"] == uncached[2]["bad"] and cached["image_id"] == uncached[4]["image_id"]
    with pytest.raises(BadDataError, match=r"more than max_bad_fraction=0\.1"):
        make_trainer(processor, tmp_path, dataset, max_bad_fraction=0.1).train()
    for row in dataset.table:
        row["image"] = b"no picture"
    with pytest.raises(BadDataError, match="None of the 8 images could be read"):
        make_trainer(processor, tmp_path / "none", dataset).train()


def test_train_py_resumes_on_its_cache(train, pairs, tmp_path):  # noqa: F811
    """Configurations and image processors that were saved and loaded give the same key."""
    data = ["--train_file", pairs, "--caption_column", "captions", "--per_device_train_batch_size", 4, *TOWERS]
    data += ["--freeze", "vision_model", "--cache_features", "true", "--save_steps", 2, "--report_to", "none"]
    train(*data, "--max_steps", 2, "--output_dir", "o")
    train(*data, "--max_steps", 3, "--output_dir", "o", "--resume_from_checkpoint", "true")
    assert (tmp_path / "o" / "checkpoint-3" / "trainer_state.json").exists()
