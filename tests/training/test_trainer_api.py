"""The Trainers in a notebook: plain tables, a PEFT configuration, and nothing set on the caller's objects."""

import copy

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from mmgem.data.shards import ShardStream, expand_shards
from mmgem.training.region_trainer import RegionTrainer
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import make_model, make_picture, write_shards
from tests.training.test_region_training import BOXES, PHRASES
from tests.training.test_region_training import arguments as region_arguments
from tests.training.test_training import CAPTIONS, eight_pictures, training_arguments


@pytest.fixture
def table() -> Dataset:
    return Dataset.from_dict({"image": [make_picture(i) for i in range(8)], "caption": CAPTIONS})


def test_a_plain_table_trains_and_is_evaluated_as_pairs_are(processor, tmp_path, table):
    models = []
    for dataset in (eight_pictures(seed=42), table):
        args = training_arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, packing=True)
        trainer = MMGEMTrainer(
            model=make_model(processor),
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=processor,
        )
        trainer.train()
        assert "eval_text_to_image_R@1" in trainer.state.log_history[0] | trainer.state.log_history[1]
        models.append(trainer.model.state_dict())
    for name, weight in models[0].items():
        assert torch.equal(weight, models[1][name]), name


def test_columns_have_any_name_and_missing_ones_are_named(processor, tmp_path, table):
    renamed = table.rename_columns({"image": "photo", "caption": "text"})
    args = training_arguments(tmp_path, max_steps=1)
    options = {"image_column": "photo", "caption_column": "text"}
    MMGEMTrainer(make_model(processor), args, processor, renamed, **options).train()
    with pytest.raises(ValueError, match=r"no column 'image'; its columns are photo, text"):
        MMGEMTrainer(make_model(processor), args, processor, renamed)


def test_a_plain_table_with_regions_trains_an_adapter(processor, tmp_path):
    regions = [[{"box": box, "phrase": PHRASES[2 * i + j]} for j, box in enumerate(BOXES)] for i in range(4)]
    table = Dataset.from_dict({"image": [make_picture(i) for i in range(4)], "parts": regions})
    args = region_arguments(tmp_path, "region-retrieval")
    trainer = RegionTrainer(make_model(processor), args, processor, table, table, regions_column="parts")
    trainer.train()
    assert "eval_region_to_phrase_R@1" in trainer.evaluate()


def test_nothing_is_set_on_the_callers_objects(processor, tmp_path):
    write_shards(tmp_path)
    stream = ShardStream([expand_shards(str(tmp_path / "{0..3}.tar"))], window=5)
    args = training_arguments(tmp_path / "out", max_steps=1, per_device_train_batch_size=2)
    before = [copy.copy(vars(given)) for given in (stream, args)]
    pairs = eight_pictures()
    for dataset in (stream, pairs):
        MMGEMTrainer(make_model(processor), args, processor, dataset).train()
    assert stream.least_side == pairs.least_side == 0
    assert vars(stream) == before[0] and args.ignore_data_skip is before[1]["ignore_data_skip"] is False


def test_a_peft_configuration_is_what_lora_rank_is_shorthand_for(processor, tmp_path):
    names = []
    for options, config in (({"lora_rank": 4}, None), ({}, LoraConfig(r=4, lora_alpha=8))):
        args = training_arguments(tmp_path, max_steps=1, **options)
        trainer = MMGEMTrainer(make_model(processor), args, processor, eight_pictures(), peft_config=config)
        names.append({name: p.shape for name, p in trainer.model.named_parameters() if p.requires_grad})
        trainer.train()
        trainer.merge_lora()
        assert type(trainer.model) is type(make_model(processor))
    assert names[0] == names[1] and names[0]
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["text_projection"])
    args = training_arguments(tmp_path, max_steps=1)
    own = MMGEMTrainer(make_model(processor), args, processor, eight_pictures(), peft_config=config)
    trained = [name for name, p in own.model.named_parameters() if p.requires_grad]
    assert all("q_proj" in name or "text_projection" in name or "trainable_tokens" in name for name in trained)
    with pytest.raises(ValueError, match="peft_config and lora_rank both ask for LoRA"):
        args = training_arguments(tmp_path, max_steps=1, lora_rank=4)
        MMGEMTrainer(make_model(processor), args, processor, eight_pictures(), peft_config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": DatasetDict({"train": Dataset.from_dict({})})}, "got DatasetDict: take one of its splits"),
        ({"train_dataset": [{"image": None}]}, "train_dataset must be a datasets.Dataset, got list"),
        ({"eval_dataset": {"held out": None}}, "eval_dataset must be a datasets.Dataset, got dict"),
    ],
)
def test_what_cannot_be_trained_on_is_named(processor, tmp_path, table, options, message):
    args = training_arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=message):
        MMGEMTrainer(make_model(processor), args, processor, **{"train_dataset": table, **options})


def test_what_another_trainer_does_is_named(processor, tmp_path, table):
    with pytest.raises(ValueError, match="MMGEMTrainer trains stage 1, not region-retrieval"):
        MMGEMTrainer(make_model(processor), region_arguments(tmp_path, "region-retrieval"), processor, table)
    with pytest.raises(ValueError, match="Leave out peft_config"):
        args = region_arguments(tmp_path, "region-caption")
        RegionTrainer(make_model(processor), args, processor, table, peft_config=LoraConfig(r=4))
    with pytest.raises(ValueError, match="RegionTrainer trains stage region-caption or region-retrieval, not 1"):
        RegionTrainer(make_model(processor), training_arguments(tmp_path, max_steps=1), processor, table)
    trainer = MMGEMTrainer(make_model(processor), training_arguments(tmp_path, max_steps=1), processor, table)
    with pytest.raises(ValueError, match=r"eval_dataset must be a datasets\.Dataset, got NoneType"):
        trainer.evaluate()
