"""New projections between pretrained towers start from statistics of the training data."""

import copy

import pytest
import torch
from peft import LoraConfig

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.training import MMGEMTrainer, MMGEMTrainingArguments
from mmgem.training.start import start_projections, whiten
from tests.conftest import make_model


@pytest.fixture(scope="module")
def scenes():
    return PairDataset(ScenesDataset("train", 96, image_size=32))


def encode(model, processor, dataset):
    images = [dataset[i]["image"] for i in range(len(dataset))]
    return model._encode_images(processor(images=images, return_tensors="pt")["pixel_values"])


@torch.no_grad()
@pytest.mark.parametrize(("size", "rank"), [(16, 16), (48, 32)])
def test_whitened_outputs_have_no_mean_and_unit_variance(size, rank):
    """For fewer outputs than inputs and for more, which lie in as many directions as there are inputs."""
    torch.manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(32, 32)).Q
    inputs = 5 + torch.randn(500, 32) @ torch.diag(torch.linspace(0.5, 3, 32)) @ mixed
    projection = torch.nn.Linear(32, size)
    whiten(projection, inputs)
    outputs = projection(inputs)
    variances = torch.linalg.eigvalsh(torch.cov(outputs.T, correction=0))[-rank:]
    assert outputs.mean(0).abs().max() < 1e-3
    # The direction of least variance is damped by the floor.
    assert (variances / variances.max()).min() > 0.5 and (variances.sum() / size - 1).abs() < 0.1


@torch.no_grad()
@pytest.mark.parametrize(("image_pooling", "k"), [("mean", 1), ("cls+mean", 2), ("cls", 2), ("tower", 1)])
def test_visual_tokens_start_as_words(processor, scenes, image_pooling, k):
    """With the norm of a token embedding, and on the side of the image's own words."""
    processor = copy.copy(processor)
    processor.image_grid_size = k
    model = make_model(processor, config={"image_pooling": image_pooling, "image_grid_size": k})
    h1 = model.visual_projection.weight.clone()
    h2 = model.text_projection.weight.clone()
    start_projections(model, processor, scenes, batch_size=40, images=96)
    assert torch.equal(model.visual_projection.weight, h1) == (image_pooling == "tower")
    assert torch.equal(model.text_projection.weight, h2)
    images = encode(model, processor, scenes)
    embeds = model._image_embeds(images)
    if image_pooling != "tower":
        assert embeds.mean(0).abs().max() < 1e-3
    tokens = model._visual_tokens(images).unflatten(0, (len(scenes), k * k))
    embeddings = model.get_input_embeddings().weight
    words = torch.stack(
        [
            embeddings[processor.tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)
            for (text,) in scenes.captions()
        ]
    )
    deviations = tokens - words.mean(0)
    torch.testing.assert_close(deviations.norm(dim=-1).mean(), embeddings.norm(dim=1).mean(), rtol=0.01, atol=0)
    own = torch.nn.functional.cosine_similarity(deviations.mean(1), words - words.mean(0)).mean()
    others = torch.nn.functional.cosine_similarity(deviations.mean(1).roll(1, 0), words - words.mean(0)).mean()
    assert own > 0.2 > others + 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_training_starts_new_projections_once(processor, scenes, tmp_path, lora):
    model = make_model(processor)
    args = {"max_steps": 1, "learning_rate": 1e-12, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = MMGEMTrainingArguments(str(tmp_path), per_device_train_batch_size=8, save_strategy="no", **args)
    options = {"peft_config": LoraConfig(r=2)} if lora else {}

    def means_of_embeddings():
        trainer = MMGEMTrainer(copy.deepcopy(model), args, processor, scenes, **options)
        trainer.train()
        trainer.merge_lora()
        with torch.no_grad():
            return trainer.model._image_embeds(encode(trainer.model, processor, scenes)).mean(0).abs().max()

    assert means_of_embeddings() > 0.1
    model.has_new_projections = True
    assert means_of_embeddings() < 1e-3
