"""Evaluations of texts as people write them: what they spell out and what stands around them changes no figure."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from mmgem.data.pairs import PairDataset
from mmgem.data.regions import RegionDataset
from mmgem.evaluation.classification import class_embeddings, evaluate_classification
from mmgem.evaluation.embedding import caption_inputs, embed_texts
from mmgem.evaluation.evaluator import evaluate_long_text, evaluate_model
from mmgem.evaluation.mteb import MMGEMEncoder
from mmgem.evaluation.regions import evaluate_regions, heat_map

from ..conftest import Table, make_model, make_picture


SPELLED = ["<image>", "a [EMB] dog", "[CAP] [CAP]", "</s><s>a dog<pad>"]


def test_every_evaluation_takes_texts_that_spell_tokens(model, processor):
    pictures = [make_picture(i) for i in range(4)]
    pairs = PairDataset(Table([{"image": i, "caption": [c]} for i, c in zip(pictures, SPELLED)]))
    metrics, outputs = evaluate_model(model, processor, pairs, caption_samples=4)
    alone = torch.cat([model.get_embedding(**processor(text=[text], return_tensors="pt")) for text in SPELLED])
    torch.testing.assert_close(outputs["text_embeds"], alone, atol=1e-5, rtol=0)
    assert np.isfinite(list(metrics.values())).all()
    assert np.isfinite(list(evaluate_long_text(model, processor, pairs)[0].values())).all()
    metrics, _ = evaluate_classification(model, processor, pairs, [0, 1, 2, 3], SPELLED, ["{}", "<image> {}"])
    assert 0 <= metrics["top1"] <= 1
    boxes = [{"box": [0, 0, 20, 20], "phrase": text} for text in SPELLED]
    regions = RegionDataset(Table([{"image": pictures[0], "regions": boxes}]))
    for stage in ("region-retrieval", "region-caption"):
        metrics, outputs = evaluate_regions(model, processor, regions, stage)
        assert [region["phrase"] for region in outputs["regions"]] == SPELLED
    assert heat_map(model, processor, pictures[0], "<image>").shape == (4, 4)


def test_beams_do_not_prefer_long_captions(model, processor):
    inputs = processor(images=[make_picture(i) for i in range(6)], task="caption", return_tensors="pt")
    first = model.generate(**inputs, max_new_tokens=1)[:, -1]
    ends = torch.cat([first, torch.arange(10, 40)]).unique().tolist()  # so that captions end somewhere
    options = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": ends}
    probable = caption_inputs(model, processor, inputs, **options)
    per_token = caption_inputs(model, processor, inputs, **options, length_penalty=1.0)
    assert probable != per_token
    assert all(len(short) <= len(long) for short, long in zip(probable, per_token))


def test_white_space_changes_no_embedding(model, processor):
    texts = ["a dog", "two  people"]
    around = [" a dog\n", "\u3000two  people\0"]
    torch.testing.assert_close(embed_texts(model, processor, around), embed_texts(model, processor, texts))
    plain = class_embeddings(model, processor, texts, ["{}", "a photo of {}."])
    torch.testing.assert_close(class_embeddings(model, processor, around, [" {}", "a photo of {}.\n"]), plain)


def test_mteb_takes_them_too_and_refuses_a_length_without_a_text(processor, tmp_path):
    make_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = MMGEMEncoder(str(tmp_path), max_length=20)
    texts = [*SPELLED, "", "\0", " a dog "]
    found = encoder.encode([{"text": texts}], task_metadata=None, hf_split="test", hf_subset="default")
    assert np.isfinite(found).all() and encoder.processor.max_length == 20
    for length in (0, -1):
        with pytest.raises(ValueError, match="max_length must be an integer of at least 3"):
            MMGEMEncoder(str(tmp_path), max_length=length)
        with pytest.raises(ValueError, match="max_length must be an integer of at least 3"):
            embed_texts(encoder.model, encoder.processor, ["a dog"], max_length=length)


def test_a_single_picture_is_evaluated_without_cider(run, checkpoint, tmp_path):
    features = Features({"image": Image(), "caption": List(Value("string"))})
    rows = {"image": [make_picture(0)], "caption": [["<image> of a dog", "a dog"]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "one.parquet")
    options = ("--model", checkpoint, "--data_file", tmp_path / "one.parquet", "--tasks", "captioning", "--draws", 2)
    metrics = run(*options)["metrics"]
    assert "caption_bleu1" in metrics and not any("cider" in name for name in metrics)
    assert json.dumps(metrics, allow_nan=False)
