"""The estimate before a run, beside what the run's own tensors and operations are."""

import json
import random
import runpy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmgem.data.arguments import DataArguments
from mmgem.data.pairs import PairDataset
from mmgem.training.arguments import DryRunArguments, MMGEMTrainingArguments
from mmgem.training.building import planned_config
from mmgem.training.dry_run import LiveTensors, dry_run_report, estimate
from mmgem.training.feature_cache import cache_features
from mmgem.training.memory import check_memory, container_memory
from mmgem.training.model_arguments import ModelArguments
from mmgem.training.stages import make_optimizer
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import TEXT, VISION, Table, make_model, make_picture
from tests.training.test_cli import ROOT, TOWERS
from tests.training.test_training import CAPTIONS, training_arguments


BATCH = 32


def real_step(processor, args, **text):
    """Most bytes of tensors alive in a step of the Trainer, its operations, tokens of the average and longest text."""
    rng = random.Random(0)
    words = " ".join(CAPTIONS).split()
    rows = [{"image": make_picture(i), "caption": " ".join(rng.choices(words, k=12))} for i in range(BATCH)]
    model = make_model(processor, **text)
    trainer = MMGEMTrainer(model, args, processor, PairDataset(Table(rows)))
    trainer.optimizer = make_optimizer(args, model)
    if args.activation_checkpointing:  # which train() would do
        model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    if args.cache_features:  # as well
        cache_features(model, trainer.train_dataset, trainer.data_collator, args, trainer.accelerator)
        model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    live = LiveTensors(len(processor.tokenizer))
    for parameter in model.parameters():  # LoRA's too
        live.add(parameter, "weights")
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    for _ in range(2):
        live.peak.clear()
        with FlopCounterMode(display=False, custom_mapping=formulas) as flops, live:
            trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    lengths = [len(ids) for ids in processor.tokenizer([row["caption"] for row in rows])["input_ids"]]
    return live.peak.total(), flops.get_total_flops(), round(sum(lengths) / BATCH), max(lengths) + 1


@pytest.mark.parametrize(
    "options, packing",
    [
        ({}, True),
        ({}, False),
        ({"mini_batch_size": 8}, True),
        ({"objective": "contrastive"}, True),
        ({"objective": "caption", "activation_checkpointing": True}, True),
        ({"freeze": ["vision_model"], "optim": "lamb"}, True),
        ({"freeze": ["vision_model"], "cache_features": True}, True),
        ({"lora_rank": 4}, True),
        ({"lora_rank": 4, "tied": True}, True),
        ({"tied": True}, True),
        ({"logits_in_parts": True, "freeze": ["vision_model"], "objective": "caption"}, True),
    ],
)
def test_memory_and_operations_of_a_real_step(processor, tmp_path, monkeypatch, options, packing):
    if options.pop("logits_in_parts", False):
        limit = 3 * 127 * len(processor.tokenizer)
        monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.MAX_LOGITS", limit)
    text = {"tie_word_embeddings": options.pop("tied", False)}
    options |= {"per_device_train_batch_size": BATCH, "max_steps": 1, "packing": packing}
    args = training_arguments(tmp_path, **options)
    peak, flops, tokens, longest = real_step(processor, args, **text)
    # Padded rows count as max_length long; here they are as long as the longest caption behind its picture.
    data_args = DataArguments(dataset_name="scenes", max_length=50 if packing else longest)
    model = make_model(processor, **text)
    plan = estimate(model.config, args, data_args, DryRunArguments(dry_run_caption_tokens=tokens))
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(plan.memory.values()) == pytest.approx(peak, rel=0.15)
    assert plan.flops == pytest.approx(flops, rel=0.15)


def test_shares_of_many_devices_and_long_batches(processor, tmp_path):
    """More devices: larger products of embeddings, buckets; more mini-batches: more operations, hardly more memory."""
    config = make_model(processor).config
    data_args = DataArguments(dataset_name="scenes")

    def plan(batch_size, devices=1, **options):
        args = training_arguments(tmp_path, per_device_train_batch_size=batch_size, mini_batch_size=8, **options)
        return estimate(config, args, data_args, DryRunArguments(dry_run_devices=devices))

    one, two, many = plan(16), plan(16, devices=2), plan(160)
    similarities = 16 * 16 * config.projection_dim * 4 * 3
    assert two.flops - one.flops == similarities
    assert two.memory["gradients"] - one.memory["gradients"] == 4 * one.trained
    assert many.flops == pytest.approx(10 * one.flops, rel=0.1)
    pictures = 4 * 3 * 32 * 32
    assert many.memory["inputs"] == 160 * pictures
    assert sum(many.memory.values()) - many.memory["inputs"] < 1.1 * sum(one.memory.values())
    assert plan(16, gradient_accumulation_steps=3).flops == 3 * one.flops
    assert plan(20).flops == pytest.approx(20 / 16 * one.flops, rel=0.05)  # the last mini-batch is half a one


def test_sharded_among_devices(processor, tmp_path):
    config = make_model(processor).config
    args = training_arguments(tmp_path)
    plans = [
        estimate(config, args, DataArguments(dataset_name="scenes"), DryRunArguments(dry_run_devices=4, **options))
        for options in ({}, {"dry_run_sharded": True})
    ]
    assert plans[1].memory["weights"] == plans[0].memory["weights"] // 4
    assert plans[1].memory["activations"] == plans[0].memory["activations"]


def test_towers_count_as_they_are_loaded_not_as_they_are_stored(processor, tmp_path):
    text = {**TEXT, "vocab_size": 320, "dtype": "bfloat16"}
    for name, config in {"vision": VISION, "text": text}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    towers = ModelArguments(
        vision_model_name_or_path=str(tmp_path / "vision"), text_model_name_or_path=str(tmp_path / "text")
    )
    args = training_arguments(tmp_path)
    plan = estimate(planned_config(towers), args, DataArguments(dataset_name="scenes"), DryRunArguments())
    assert plan.memory["weights"] == pytest.approx(4 * plan.parameters, rel=0.01)


def test_a_tower_that_computes_with_values_is_refused_by_name(processor, tmp_path):
    """SigLIP 2 reads the shapes of its images from a tensor, and the dry run's tensors are empty."""
    sizes = {name: value for name, value in VISION.items() if name not in ("model_type", "image_size")}
    vision = {"model_type": "siglip2_vision_model", "num_patches": 16, **sizes}
    config = make_model(processor, config={"vision_config": vision}).config
    with pytest.raises(ValueError, match=r"'siglip2_vision_model'.*Leave out --dry_run"):
        dry_run_report(config, training_arguments(tmp_path), DataArguments(dataset_name="scenes"), DryRunArguments())


def test_says_when_it_will_not_fit_without_data_or_a_gpu(tmp_path, monkeypatch, capsys):
    """A recipe for GPUs, on whatever machine this is."""
    command = ["train.py", "--train_shards", "not/there.tar", *TOWERS, "--output_dir", str(tmp_path / "none")]
    command += ["--bf16", "true", "--dry_run", "--dry_run_memory", "0.001", "--dry_run_tflops", "1"]
    monkeypatch.setattr("sys.argv", command)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "It will not fit" in output and "steps per day at 40% of 1.00 TFLOP/s" in output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(processor, tmp_path, monkeypatch, version):
    """8 MiB allowed, 6 taken, of which 4 are cached files: 6 are left, and without a limit what the machine has."""
    files = {
        "memory.max": 8 * 2**20,
        "memory.current": 6 * 2**20,
        "memory.stat": f"anon 9\ninactive_file {4 * 2**20}",
    }
    if version == 1:
        (tmp_path / "memory").mkdir()
        names = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
        files = dict(zip(names, files.values()))
        files["memory/memory.stat"] = files["memory/memory.stat"].replace("inactive", "total_inactive")
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr("mmgem.training.memory.CGROUP", tmp_path)
    assert container_memory() == (8 * 2**20, 6 * 2**20)
    config = make_model(processor).config
    args = MMGEMTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    check_memory(config, args)
    config.text_config.intermediate_size = 4096
    with pytest.raises(ValueError, match=r"but 0\.0 GiB are free on this machine"):
        check_memory(config, args)
    (tmp_path / next(iter(files))).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    check_memory(config, args)
