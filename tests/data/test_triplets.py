"""Triplets from tables, MMEB's files, mixtures and drawn scenes."""

import io
import re
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Image

from mmgem.data.arguments import DataArguments
from mmgem.data.collator import FusedCollator
from mmgem.data.composed_scenes import ComposedScenesDataset
from mmgem.data.loading import Table as LoadedTable
from mmgem.data.loading import load_triplets, triplets_of
from mmgem.data.pairs import BadDataError
from mmgem.data.samplers import OneSourceSampler
from mmgem.data.scenes import Scene, relation
from mmgem.data.triplets import TripletDataset, TripletSource

from ..conftest import Table, make_picture


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    make_picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def row(query=(0, "but red"), target=(1, ""), negative=(None, "")):
    columns = {}
    for side, (seed, text) in zip(("query", "target", "negative"), (query, target, negative)):
        columns |= {f"{side}_image": None if seed is None else make_picture(seed), f"{side}_text": text}
    return columns


def test_items():
    example = TripletDataset(Table([row(negative=(2, " a cat "))]))[0]
    query, target, negative = (example[side] for side in ("query", "target", "negative"))
    assert (query.text, target.text, negative.text) == ("but red", "", "a cat")
    assert query.is_fused and negative.is_fused and not target.is_fused
    assert np.array_equal(query.image, make_picture(0).convert("RGB"))
    same = TripletDataset(Table([row(target=(0, "but red"), query=(1, "x"))]))[0]["target"]
    assert same.id == query.id and same.image_id == query.image_id != target.image_id
    assert len({query.id, target.id, negative.id}) == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(query=(None, "")), "its query is empty"),
        (row(target=(None, " ")), "its target is empty"),
        (row(query=(None, "a dog")), "neither its query nor its target has both"),
        (row(negative=(1, "")), "its negative is its target"),
        ({**row(), "target_text": 3}, "target_text must be text, got 3"),
        ({**row(), "query_image": b"no image"}, "its query_image: the file is not an image"),
        ({**row(), "target_image": "absent.png"}, "its target_image: [Errno 2] No such file"),
    ],
)
def test_what_cannot_be_used_is_named_and_replaced(bad, reason):
    dataset = TripletDataset(Table([bad, row()]))
    with pytest.raises(BadDataError, match=re.escape(reason)):
        dataset.read(0)
    example = dataset[0]
    assert example["query"].text == "but red" and reason in example["bad"][0]


def test_mmeb_files_as_they_are_published(tmp_path):
    """Relative paths, `<|image_1|>`, empty strings where there is nothing; instructions come with the texts."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        make_picture(i).save(folder / f"{i}.png")
    Dataset.from_dict(
        {
            "qry": ["<|image_1|>\nRepresent the given image with the question: what is it?\n"] * 2,
            "qry_image_path": ["images/0.png", "images/1.png"],
            "pos_text": ["a dog", "<|image_1|>\nRepresent the given image.\n"],
            "pos_image_path": ["", "images/2.png"],
            "neg_text": ["", "a cat"],
            "neg_image_path": ["", ""],
        }
    ).to_parquet(tmp_path / "mmeb.parquet")
    arguments = DataArguments(train_file=str(tmp_path / "mmeb.parquet"))
    dataset, held_out = load_triplets(arguments, 32, 0)
    assert held_out is None and len(dataset) == 2
    first, second = dataset[0], dataset[1]
    assert first["query"].text == "Represent the given image with the question: what is it?"
    assert first["query"].image.size == (48, 40) and first["target"].text == "a dog"
    assert first["target"].image is None and first["negative"] is None
    assert second["target"].text == "Represent the given image." and second["target"].image is not None
    assert second["negative"].text == "a cat"
    assert not first["bad"] and not second["bad"]


def test_cirr_like_columns_and_an_image_folder(tmp_path):
    make_picture(0).save(tmp_path / "0.png")
    make_picture(1).save(tmp_path / "1.png")
    (tmp_path / "tables").mkdir()
    lines = '{"query_image": "0.png", "query_text": "from the side", "target_image": "1.png"}\n'
    (tmp_path / "tables/cirr.jsonl").write_text(lines)
    path = str(tmp_path / "tables/cirr.jsonl")
    dataset = load_triplets(DataArguments(train_file=path, image_folders=[str(tmp_path)]), 32, 0)[0]
    assert dataset[0]["target"].image.size == (48, 40) and dataset[0]["target"].text == ""
    with pytest.raises(BadDataError, match=r"No such file.*0\.png"):
        load_triplets(DataArguments(train_file=path), 32, 0)[0][0]


def test_images_within_a_table(tmp_path):
    rows = {"query_image": [png(0)], "query_text": ["but red"], "target_image": [png(1)]}
    table = Dataset.from_dict(rows).cast_column("query_image", Image())
    dataset = triplets_of([LoadedTable(table)], 0)
    assert np.array_equal(dataset[0]["target"].image, make_picture(1).convert("RGB"))


def test_missing_columns_and_wrong_types():
    with pytest.raises(ValueError, match="neither target_image nor target_text; its columns are query_text"):
        triplets_of([LoadedTable(Dataset.from_dict({"query_text": ["a"]}))], 0)
    wrong = Dataset.from_dict({"query_text": [["a"]], "target_text": ["b"]})
    with pytest.raises(ValueError, match="Column 'query_text' is"):
        triplets_of([LoadedTable(wrong)], 0)
    with pytest.raises(ValueError, match="hold no triplets"):
        load_triplets(DataArguments(train_shards=["a.tar"]), 32, 0)


def write_mixture(folder, *entries):
    for name in ("a", "b"):
        make_picture(ord(name)).save(folder / f"{name}.png")
        rows = {"query_image": [f"{name}.png"] * 8, "query_text": [f"{name} {i}" for i in range(8)]}
        Dataset.from_dict({**rows, "target_text": [f"is {i}" for i in range(8)]}).to_parquet(
            folder / f"{name}.parquet"
        )
    (folder / "mixture.yaml").write_text(yaml.safe_dump(list(entries)))
    return load_triplets(DataArguments(train_mixture=str(folder / "mixture.yaml")), 32, 0)[0]


def test_a_mixture(tmp_path):
    first = {"train_file": str(tmp_path / "a.parquet"), "weight": 3, "query_instruction": "Find it:"}
    second = {"train_file": str(tmp_path / "b.parquet"), "target_instruction": "Represent:", "max_samples": 6}
    dataset = write_mixture(tmp_path, first, second)
    assert [source.size for source in dataset.sources] == [8, 6]
    assert [source.weight for source in dataset.sources] == [3, 6]
    assert (dataset[7]["query"].text, dataset[7]["target"].text) == ("Find it: a 7", "is 7")
    assert (dataset[8]["query"].text, dataset[8]["target"].text) == ("b 0", "Represent: is 0")


def test_a_bad_row_is_replaced_by_one_of_its_own_dataset(tmp_path):
    dataset = write_mixture(tmp_path, *({"train_file": str(tmp_path / f"{name}.parquet")} for name in "ab"))
    read = dataset._read
    dataset._read = lambda row, cached: 1 / 0 if row == 7 else read(row, cached)
    assert dataset[7]["query"].text == "a 0" and list(dataset[7]["bad"]) == [7]
    chosen = dataset.select([6, 7, 8, 9])
    assert [members.tolist() for members in chosen.members()] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("a.parquet", "no mapping"),
        ({}, "needs train_file or dataset_name"),
        ({"train_file": "absent.parquet"}, "no file absent.parquet"),
        ({"train_file": "{a}", "wieght": 1}, "unknown option 'wieght'; it has train_file"),
        ({"train_file": "{a}", "weight": 0}, "above 0, got 0"),
        ({"train_file": "{a}", "weight": "much"}, "weight must not be 'much'"),
        ({"train_file": "{a}", "max_samples": 0}, "1 or more, got 0"),
        ({"dataset_name": "scenes"}, "scenes are drawn"),
    ],
)
def test_a_wrong_mixture_names_the_entry(tmp_path, entry, fault):
    good = {"train_file": str(tmp_path / "a.parquet")}
    if isinstance(entry, dict) and entry.get("train_file") == "{a}":
        entry = {**entry, **good}
    with pytest.raises((ValueError, OSError), match=rf"Entry 1 of .*{fault}"):
        write_mixture(tmp_path, good, entry)


def test_batches_come_from_one_source_by_weight():
    dataset = TripletDataset([None] * 440, [TripletSource(40, 3.0), TripletSource(400, 1.0)])
    sampler = OneSourceSampler(dataset, 8, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 440
    groups = [order[i : i + 8] for i in range(0, len(order), 8)]
    owners = [{int(index >= 40) for index in group} for group in groups]
    assert all(len(owner) == 1 for owner in owners) and all(len(set(group)) == 8 for group in groups)
    first = sum(owner == {0} for owner in owners)
    assert abs(first / len(groups) - 0.75) < 0.15
    assert len(set([i for g, o in zip(groups, owners) if o == {0} for i in g][:40])) == 40, "shuffled"
    assert list(sampler) == order
    dataset.set_epoch(1)
    assert list(sampler) != order
    with pytest.raises(ValueError, match="Dataset 0 of the mixture, of 40 examples, does not fill a batch of 41"):
        OneSourceSampler(dataset, 41, seed=0)


def test_a_source_alone_is_seen_once_in_each_epoch():
    order = list(OneSourceSampler(TripletDataset([None] * 35), 8, seed=0))
    assert len(order) == len(set(order)) == 32


def test_collator(processor):
    """Whatever the kinds of items, indices lead to the item that they are of."""
    rows = [
        row(negative=(None, "a cat")),
        row(query=(2, ""), target=(3, "snow")),
        row(query=(4, "but white"), target=(None, "a dog"), negative=(5, "")),
    ]
    dataset = TripletDataset(Table(rows))
    examples = [dataset[i] for i in range(3)]
    batch = FusedCollator(processor)(examples)
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 3
    items = [("fused", i) for i in range(3)]
    items += [("text", i) for i in range(len(batch["texts"]["input_ids"]))]
    items += [("image", i) for i in range(len(batch["images"]["pixel_values"]))]
    sides = [example["query"] for example in examples] + [example["target"] for example in examples]
    sides += [examples[0]["negative"], examples[2]["negative"]]
    places = [*batch["queries"].tolist(), *batch["answers"].tolist()]
    ids = [*batch["pair_ids"].T.flatten().tolist(), *batch["negative_ids"].tolist()]
    assert sorted(places) == list(range(8)) and ids == [item.id for item in sides]
    for item, place in zip(sides, places):
        kind, index = items[place]
        assert kind == ("fused" if item.is_fused else "text" if item.text else "image")
        if kind != "image":
            ids = batch["input_ids"] if kind == "fused" else batch["texts"]["input_ids"]
            text = processor.tokenizer.decode(ids[index], skip_special_tokens=True).replace("<image>", "")
            assert text.strip() == item.text
        if kind != "text":
            pixels = batch["pixel_values"] if kind == "fused" else batch["images"]["pixel_values"]
            expected = processor(images=[item.image], return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(pixels[index], expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def held_out():
    return ComposedScenesDataset("test", 60)


def test_composed_scenes_are_what_the_text_says(held_out):
    kinds = Counter()
    for query, text, target, _ in held_out.held_out:
        words, before, after = text.split(), phrases(query), phrases(target)
        if words[0] == "without":
            (gone,) = (before - after).elements()
            assert after == before - Counter([gone]) and gone.endswith(text.removeprefix("without the "))
        elif words[0] == "but":
            (old,), (new,) = (before - after).elements(), (after - before).elements()
            name, colour = text.removeprefix("but the ").split(" is ")
            assert old.endswith(name) and new.split()[1] == colour
        else:
            assert before == after
            name, where, beside = next(
                (a, r, b)
                for r in ("left of", "right of", "above", "below")
                for a, found, b in [text.removeprefix("with the ").partition(f" {r} the ")]
                if found
            )
            first, second = ([o for o in target.objects if o.phrase.endswith(n)] for n in (name, beside))
            assert len(first) == len(second) == 1 and relation(first[0], second[0]) == where
        kinds[words[0]] += 1
    assert all(kinds[word] >= 5 for word in ("but", "with", "without"))


def phrases(scene: Scene) -> Counter:
    return Counter(item.phrase for item in scene.objects)


def test_composed_scenes_hold_nothing_out_of_their_split(held_out):
    train = ComposedScenesDataset("train", 200)
    for query, _, target, negative in map(train.triplet, range(200)):
        assert query.split == target.split == negative.split == "train"
    captions = [scene.caption for _, _, target, near in held_out.held_out for scene in (target, near)]
    assert len(set(captions)) == len(captions), "every candidate is another scene"
    assert all(query.split == target.split == "test" for query, _, target, _ in held_out.held_out)


def test_composed_scenes_are_the_same_every_time(held_out):
    again, example = ComposedScenesDataset("test", 3)[2], held_out[2]
    assert again["query_text"] == example["query_text"]
    for name in ("query_image", "target_image", "negative_image"):
        assert np.array_equal(again[name], example[name])
    with pytest.raises(ValueError, match="Unknown split 'single'"):
        ComposedScenesDataset("single", 1)
