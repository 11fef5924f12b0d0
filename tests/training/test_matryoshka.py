"""Embeddings that work at shorter lengths."""

import pytest
import torch

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.evaluator import shorter_retrieval
from mmgem.modeling_mmgem import contrastive_loss
from mmgem.training import MMGEMTrainer, MMGEMTrainingArguments
from mmgem.training.arguments import parse_arguments
from tests.conftest import make_model, make_picture


OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def test_the_loss_is_the_mean_over_the_lengths():
    torch.manual_seed(0)
    texts, images = torch.nn.functional.normalize(torch.randn(2, 6, 16), dim=-1)
    scale, ids = torch.tensor(10.0), torch.tensor([[0], [1], [2], [0], [4], [5]])
    expected = []
    for dim in (4, 8, 16):
        t, i = (torch.nn.functional.normalize(embeds[:, :dim], dim=-1) for embeds in (texts, images))
        logits = scale * t @ i.T
        logits[0, 3] = logits[3, 0] = -torch.inf  # of one caption
        target = torch.arange(6)
        ways = (torch.nn.functional.cross_entropy(way, target) for way in (logits, logits.T))
        expected.append(sum(ways))
    found = contrastive_loss(texts, images, scale, pair_ids=ids, dims=[4, 8])
    torch.testing.assert_close(found, sum(expected) / 3)
    # As one of two processes that hold half of the rows each.
    halves = [
        contrastive_loss(texts[p], images[p], scale, texts, images, p.start, ids[p], ids, dims=[4, 8])
        for p in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(halves) / 2, found)


def trained(processor, dataset, folder, **options):
    args = MMGEMTrainingArguments(
        str(folder), objective="contrastive", max_steps=2, per_device_train_batch_size=8, **options, **OPTIONS
    )
    model = make_model(processor)
    trainer = MMGEMTrainer(model, args, processor, dataset)
    trainer.train()
    return torch.cat([parameter.flatten() for parameter in model.parameters()]), trainer


def test_training_takes_the_loss_of_each_length(processor, tmp_path):
    """With and without the gradient cache."""
    dataset = PairDataset(ScenesDataset("train", 8, 32))
    plain, _ = trained(processor, dataset, tmp_path)
    short, trainer = trained(processor, dataset, tmp_path, matryoshka_dims=[4, 8])
    cached, _ = trained(processor, dataset, tmp_path, matryoshka_dims=[4, 8], mini_batch_size=4)
    torch.testing.assert_close(cached, short, atol=1e-5, rtol=1e-4)
    assert (short - plain).abs().max() > 1e-5
    batch = trainer.data_collator([dataset[i] for i in range(8)])
    images, texts, scale, *_ = trainer._forward(trainer.model, batch)[0]
    expected = contrastive_loss(images, texts, scale, pair_ids=batch["pair_ids"], dims=[4, 8])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


@torch.no_grad()
def test_short_embeddings_have_unit_norm_and_start_as_the_long_ones(model, processor):
    for inputs in (
        processor(text=["snow"], return_tensors="pt"),
        processor(images=[make_picture(0)], return_tensors="pt"),
        processor(images=[make_picture(0)], boxes=[[[1, 2, 30, 30]]], return_tensors="pt"),
    ):
        whole, short = model.get_embedding(**inputs), model.get_embedding(**inputs, dim=5)
        torch.testing.assert_close(short.norm(dim=-1), torch.ones(short.shape[:-1]))
        torch.testing.assert_close(short, torch.nn.functional.normalize(whole[..., :5], dim=-1))
    for dim in (0, 17):
        with pytest.raises(ValueError, match=f"dim is {dim}, but embeddings have 16"):
            model.get_embedding(**inputs, dim=dim)


def test_lengths_that_cannot_be(model, processor, tmp_path):
    for dims in ([8, 4], [4, 4], [0, 4]):
        with pytest.raises(ValueError, match="matryoshka_dims must ascend"):
            MMGEMTrainingArguments(str(tmp_path), matryoshka_dims=dims, **OPTIONS)
    for options in ({"objective": "caption"}, {"stage": "region-caption"}):
        with pytest.raises(ValueError, match="matryoshka_dims are for the contrastive loss"):
            MMGEMTrainingArguments(str(tmp_path), matryoshka_dims=[4], **options, **OPTIONS)
    args = MMGEMTrainingArguments(str(tmp_path), matryoshka_dims=[4, 16], **OPTIONS)
    with pytest.raises(ValueError, match="matryoshka_dims holds 16, but embeddings have 16"):
        MMGEMTrainer(model, args, processor, PairDataset(ScenesDataset("train", 8, 32)))


def test_retrieval_at_each_length():
    torch.manual_seed(0)
    texts, images = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
    outputs = {"text_embeds": texts, "image_embeds": images, "text_to_image": torch.arange(8)}
    by_norm = texts[:, :4] @ torch.nn.functional.normalize(images[:, :4], dim=-1).T
    found = shorter_retrieval(outputs, [4, 16])
    hits = (by_norm.argmax(1) == torch.arange(8)).double().mean().item()
    assert found["dim_4_text_to_image_R@1"] == hits
    assert found["dim_16_text_to_image_R@1"] == ((texts @ images.T).argmax(1) == torch.arange(8)).double().mean()


@pytest.mark.parametrize(
    "written", [["--matryoshka_dims", "4", "8"], ["--matryoshka_dims", "4,8"], ["--matryoshka_dims=4,8"]]
)
def test_lengths_on_the_command_line(written, tmp_path):
    words = ["--dataset_name", "scenes", "--output_dir", str(tmp_path), *written]
    assert parse_arguments(words)[2].matryoshka_dims == [4, 8]
