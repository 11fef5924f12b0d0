"""The estimate before a run, beside what the run's own tensors and operations are."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmgem.data.pairs import PairDataset
from mmgem.training.arguments import DataArguments, DryRunArguments
from mmgem.training.dry_run import LiveTensors, estimate
from mmgem.training.stages import make_optimizer
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import Table, make_model, make_picture
from tests.training.test_training import CAPTIONS, training_arguments


BATCH = 32


def real_step(processor, args, packing):
    """Most bytes of tensors alive in a step of the Trainer, its operations, tokens of the average and longest text."""
    rng = random.Random(0)
    words = " ".join(CAPTIONS).split()
    rows = [{"image": make_picture(i), "caption": " ".join(rng.choices(words, k=12))} for i in range(BATCH)]
    model = make_model(processor)
    trainer = MMGEMTrainer(model, args, processor, PairDataset(Table(rows)), pack_length=128 if packing else 0)
    trainer.optimizer = make_optimizer(args, model)
    if args.activation_checkpointing:  # which train() would do
        model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    live = LiveTensors(len(processor.tokenizer))
    for parameter in model.parameters():
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
    ],
)
def test_memory_and_operations_of_a_real_step(processor, tmp_path, options, packing):
    args = training_arguments(tmp_path, per_device_train_batch_size=BATCH, max_steps=1, **options)
    peak, flops, tokens, longest = real_step(processor, args, packing)
    # Padded rows count as max_length long; here they are as long as the longest caption behind its picture.
    data_args = DataArguments(dataset_name="scenes", packing=packing, max_length=50 if packing else longest)
    plan = estimate(make_model(processor).config, args, data_args, DryRunArguments(dry_run_caption_tokens=tokens))
    model = make_model(processor)
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
