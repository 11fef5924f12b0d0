"""New projections between pretrained towers start from statistics of the training data."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig

from mmgem.data.pairs import PairDataset
from mmgem.data.regions import RegionDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.shards import ShardStream
from mmgem.modeling_mmgem.embedding_mmgem import unit_norm
from mmgem.training import MMGEMTrainer, MMGEMTrainingArguments, RegionTrainer
from mmgem.training.start import RIDGE, predict, start_projections, whiten
from tests.conftest import make_model, write_shards


@pytest.fixture(scope="module")
def scenes():
    return PairDataset(ScenesDataset("train", 96, image_size=32))


def encode(model, processor, dataset):
    images = [dataset[i]["image"] for i in range(len(dataset))]
    return model._encode_images(processor(images=images, return_tensors="pt")["pixel_values"])


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 32, 48])
def test_whitened_outputs_have_no_mean_and_no_correlation(size):
    """For fewer outputs than inputs, which keep what varies most, for as many, and for more."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    inputs = 5 + torch.randn(5000, 32) @ torch.diag(torch.linspace(0.2, 3, 32)) @ rotation
    projection = torch.nn.Linear(32, size)
    whiten(projection, inputs)
    covariance = torch.cov(projection(inputs).T, correction=0)
    variances = torch.linalg.eigvalsh(torch.cov(inputs.T, correction=0))
    expected = (variances / (variances + variances.mean()))[-size:]
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance)[-len(expected) :], expected, atol=1e-4, rtol=1e-3)
    assert projection(inputs).mean(0).abs().max() < 1e-4
    if size <= 32:
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-4


@torch.no_grad()
def test_predictions_are_a_ridge_regression_of_the_given_norm():
    """Against least squares with rows added for the ridge."""
    torch.manual_seed(0)
    sources, mixing = torch.randn(200, 3, 8) + 2, torch.randn(8, 5)
    targets = sources.mean(1) @ mixing + 0.5 * torch.randn(200, 5) - 1
    projection = torch.nn.Linear(8, 5)
    predict(projection, sources, targets, norm=4.0)
    inputs = sources.mean(1) - sources.mean((0, 1))
    ridge = RIDGE * inputs.var(0, correction=0).mean() * 200
    stacked = torch.cat([inputs, ridge.sqrt() * torch.eye(8)])
    padded = torch.cat([targets - targets.mean(0), torch.zeros(8, 5)])
    slopes = torch.linalg.lstsq(stacked, padded).solution
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(projection.weight, slopes.T), torch.ones(5))
    outputs = projection(sources)
    torch.testing.assert_close(outputs.mean((0, 1)), targets.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((outputs - targets.mean(0)).norm(dim=-1).mean(), torch.tensor(4.0))


@torch.no_grad()
@pytest.mark.parametrize(("image_pooling", "k"), [("mean", 1), ("cls+mean", 2), ("cls", 2), ("tower", 1)])
def test_captions_start_near_their_images_and_visual_tokens_as_words(processor, scenes, image_pooling, k):
    """Visual tokens half a token embedding from their mean, on the side of the image's own words."""
    processor = copy.copy(processor)
    processor.image_grid_size = k
    model = make_model(processor, config={"image_pooling": image_pooling, "image_grid_size": k})
    h1 = model.visual_projection.weight.clone()
    start_projections(model, processor, scenes, batch_size=40, images=96)
    assert torch.equal(model.visual_projection.weight, h1) == (image_pooling == "tower")
    images = encode(model, processor, scenes)
    embeds = model._image_embeds(images)
    if image_pooling != "tower":
        assert embeds.mean(0).abs().max() < 1e-3
    texts = [caption for (caption,) in scenes.captions()]
    similarity = unit_norm(embeds) @ model.get_embedding(**processor(text=texts, return_tensors="pt")).T
    assert (similarity > similarity.diag()).float().mean() < 0.35  # share of captions that are nearer; by chance half
    tokens = model._visual_tokens(images).unflatten(0, (len(scenes), k * k))
    embeddings = model.get_input_embeddings().weight
    words = torch.stack(
        [
            embeddings[processor.tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)
            for (text,) in scenes.captions()
        ]
    )
    deviations = tokens - words.mean(0)
    torch.testing.assert_close(deviations.norm(dim=-1).mean(), embeddings.norm(dim=1).mean() / 2, rtol=0.01, atol=0)
    own = torch.nn.functional.cosine_similarity(deviations.mean(1), words - words.mean(0)).mean()
    others = torch.nn.functional.cosine_similarity(deviations.mean(1).roll(1, 0), words - words.mean(0)).mean()
    assert own > 0.2 > others + 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_training_starts_new_projections_once(processor, scenes, tmp_path, lora):
    model = make_model(processor)
    args = make_args(tmp_path, learning_rate=1e-12)
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


def make_args(folder, **options):
    options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **options}
    return MMGEMTrainingArguments(str(folder), per_device_train_batch_size=4, save_strategy="no", **options)


def test_training_again_goes_on_where_it_was(processor, scenes, tmp_path):
    model = make_model(processor)
    model.has_new_projections = True
    trainer = MMGEMTrainer(model, make_args(tmp_path, learning_rate=1e-12), processor, scenes)
    trainer.train()
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    trainer.train()
    assert model.visual_projection.weight.abs().max() < 1e-6


@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_resumed_run_has_no_new_projections(processor, scenes, tmp_path, max_steps):
    """Whether or not the checkpoint had all its steps."""
    args = make_args(tmp_path, learning_rate=1e-12)
    args.save_strategy = "steps"
    MMGEMTrainer(make_model(processor), args, processor, scenes).train()
    model = make_model(processor)
    model.has_new_projections = True
    trainer = MMGEMTrainer(model, make_args(tmp_path, learning_rate=1e-12, max_steps=max_steps), processor, scenes)
    trainer.train(resume_from_checkpoint=True)
    resumed = model.visual_projection.weight.clone()
    trainer.train()
    torch.testing.assert_close(model.visual_projection.weight, resumed)


def test_no_more_than_a_batch_of_images_is_held(processor, scenes, monkeypatch):
    alive, most = [], []

    def some_examples(number):
        for i in range(number):
            example = scenes[i]
            alive.append(weakref.ref(example["image"]))
            most.append(sum(image() is not None for image in alive))
            yield example
            del example

    monkeypatch.setattr(scenes, "some_examples", some_examples)
    start_projections(make_model(processor), processor, scenes, batch_size=8, images=48)
    assert len(most) == 48 and max(most) <= 16


def test_maps_that_the_objective_does_not_train_stay(processor, scenes, tmp_path):
    """Contrastive training keeps no cells of a frozen tower, which h3 would need."""
    processor = copy.copy(processor)
    processor.image_grid_size = 2
    for objective, name in (("contrastive", "caption_projection"), ("caption", "text_projection")):
        model = make_model(processor, config={"image_grid_size": 2})
        model.has_new_projections = True
        before = getattr(model, name).weight.clone()
        options = {"objective": objective, "freeze": ["vision_model"], "cache_features": True}
        MMGEMTrainer(model, make_args(tmp_path / objective, **options), processor, scenes).train()
        assert torch.equal(getattr(model, name).weight, before)


def test_shards_with_cached_features_start_as_their_images_do(processor, tmp_path):
    write_shards(tmp_path)
    shards = ShardStream(
        [[str(tmp_path / f"{i}.tar") for i in range(2)], [str(tmp_path / f"{i}.tar") for i in (2, 3)]]
    )
    weights = []
    for cache_features in (False, True):
        model = make_model(processor)
        model.has_new_projections = True
        options = {"freeze": ["vision_model"], "cache_features": cache_features, "learning_rate": 1e-12}
        trainer = MMGEMTrainer(model, make_args(tmp_path / str(cache_features), **options), processor, shards)
        trainer.train()
        weights.append(model.visual_projection.weight)
    torch.testing.assert_close(weights[1], weights[0], atol=0.02, rtol=0.02)  # features are float16


def test_stage_2_leaves_the_projections_of_its_base(processor, tmp_path):
    model = make_model(processor)
    model.has_new_projections = True
    before = model.visual_projection.weight.clone()
    regions = RegionDataset(ScenesDataset("train", 8, image_size=32))
    RegionTrainer(model, make_args(tmp_path, stage="region-retrieval"), processor, regions).train()
    assert torch.equal(model.visual_projection.weight, before)
