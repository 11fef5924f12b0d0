"""Hard negatives found by a model: against brute force, sentence-transformers, and as a user runs it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from sentence_transformers.util import mine_hard_negatives

from mmgem import mining
from mmgem.data.pairs import PairDataset
from mmgem.data.samplers import ClusteredSampler
from mmgem.data.triplets import TripletDataset
from mmgem.mining import Embedded, MiningArguments, clusters_of, find_negatives, main, nearest_others
from mmgem.training.adapters import add_fused_adapter, lora_config
from tests.conftest import CORPUS, Table, make_model, make_picture

from .training.test_fused_training import arguments as fused_arguments


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def options(**given) -> MiningArguments:
    return MiningArguments(model="m", data_file="d.parquet", **given)


@pytest.mark.parametrize("seed", range(3))
def test_exact_against_brute_force_of_two_thousand(seed, monkeypatch):
    """Blocks of other sizes than the data, queries without, with one and with several positives."""
    monkeypatch.setattr(mining, "BLOCK", (300, 700))
    queries, keys = unit(2000, 24, seed=seed), unit(2000, 24, seed=seed + 10)
    rng = np.random.default_rng(seed)
    positives = np.unique(rng.integers(0, [1900, 2000], (3000, 2)), axis=0)
    rng.shuffle(positives)
    scores, indices = nearest_others(queries, keys, torch.tensor(positives), 20)
    expected = (queries @ keys.T).double()
    expected[positives[:, 0], positives[:, 1]] = -torch.inf
    right = expected.topk(20)
    torch.testing.assert_close(scores.double(), right.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(expected.gather(1, indices), right.values, atol=1e-6, rtol=0)


def test_no_more_candidates_than_there_are():
    scores, indices = nearest_others(unit(2, 4), unit(3, 4, seed=1), torch.tensor([[0, 1]]), 5)
    assert scores.isinf().sum(1).tolist() == [3, 2]
    assert 1 not in indices[0, :2].tolist()
    found = find_negatives(Embedded(unit(2, 4), unit(3, 4, seed=1), torch.tensor([[0, 1], [1, 0]])), options())
    assert [len(row) for row in found] == [2, 2]


SETTINGS = {
    "defaults": {},
    "ranks": {"range_min": 2, "range_max": 9, "num_negatives": 4},
    "scores": {"max_score": 0.35, "min_score": 0.1, "range_max": 30},
    "margin": {"absolute_margin": 0.05, "range_max": 30},
    "UniME's margin": {"absolute_margin": -0.1, "num_negatives": 8, "range_max": 60},
    "relative": {"relative_margin": 0.3, "range_max": 40},
    "ranks behind a margin": {"absolute_margin": 0.1, "range_min": 2, "range_max": 40},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_negatives_as_sentence_transformers(name, seed, capsys):
    """Which drops a query of which fewer than `num_negatives` are left."""
    settings = {"num_negatives": 3, **SETTINGS[name]}
    keys = unit(80, 8, seed=seed)
    queries = torch.nn.functional.normalize(
        keys + 0.6 * torch.randn(80, 8, generator=torch.Generator().manual_seed(5))
    )
    vectors = {**{f"q{i}": v for i, v in enumerate(queries)}, **{f"k{i}": v for i, v in enumerate(keys)}}

    def encode(texts, **more):
        return torch.stack([vectors[text] for text in texts]).numpy()

    model = SimpleNamespace(
        encode_query=encode,
        encode_document=encode,
        device=torch.device("cpu"),
        similarity=lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T,
        similarity_pairwise=lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(1),
        model_card_data=SimpleNamespace(base_model=None),
    )
    table = Dataset.from_dict({"anchor": [f"q{i}" for i in range(80)], "positive": [f"k{i}" for i in range(80)]})
    mined = mine_hard_negatives(table, model, **settings, output_format="n-tuple", verbose=False)
    columns = [f"negative_{i + 1}" for i in range(settings["num_negatives"])] if settings["num_negatives"] > 1 else []
    expected = {row["anchor"]: [row[column] for column in columns] for row in mined}
    found = find_negatives(Embedded(queries, keys, torch.arange(80)[:, None].repeat(1, 2)), options(**settings))
    assert expected, "there is something to compare"
    whole = {f"q{i}": [f"k{j}" for j in own] for i, own in enumerate(found) if len(own) == settings["num_negatives"]}
    assert whole == expected


def test_random_candidates_are_of_the_range_and_the_same_again():
    found = Embedded(unit(50, 8), unit(200, 8, seed=1), torch.arange(50)[:, None].repeat(1, 2))
    chosen = find_negatives(found, options(sampling_strategy="random", range_min=5, range_max=25))
    top = nearest_others(found.queries, found.keys, found.positives, 25)[1]
    assert all(set(own) <= set(row[5:].tolist()) for own, row in zip(chosen, top))
    assert len({tuple(own) for own in chosen}) > 40
    assert chosen == find_negatives(found, options(sampling_strategy="random", range_min=5, range_max=25))
    assert chosen != find_negatives(found, options(sampling_strategy="random", range_min=5, range_max=25, seed=1))
    by_default = [find_negatives(found, options(sampling_strategy="random", seed=seed)) for seed in range(2)]
    assert by_default[0] != by_default[1], "without range_max there is a choice too"


def test_what_is_excluded_is_no_positive_by_whose_cosine_the_margin_goes():
    keys = torch.eye(4)[:, :3] + torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [0.5, 0.5, 0]])
    keys = torch.nn.functional.normalize(keys, dim=-1)
    query = torch.nn.functional.normalize(torch.tensor([[0.8, 0.3, 0.5]]), dim=-1)
    found = Embedded(query, keys, torch.tensor([[0, 0]]), [(0, 1)])
    (chosen,) = find_negatives(found, options(absolute_margin=0.01, range_max=4))
    assert chosen == [3, 2], (
        "by the positive's 0.81, not by the 0.30 of what is excluded, whose threshold 2 would miss"
    )


def test_memory_is_that_of_a_block(monkeypatch):
    """Python's own, and torch's largest tensor: 3,000 x 3,000 similarities never exist at once."""
    monkeypatch.setattr(mining, "BLOCK", (100, 100))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() for x in [result] if isinstance(x, torch.Tensor))
            return result

    queries, keys = unit(3000, 8), unit(3000, 8, seed=1)
    with Watch():
        nearest_others(queries, keys, torch.arange(3000)[:, None].repeat(1, 2), 4)
    assert max(sizes) <= 3000 * 8 * 4


def test_clusters_are_of_like_vectors_and_none_is_too_large():
    centres = unit(8, 16, seed=3)
    own = torch.arange(8).repeat_interleave(32)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    vectors = torch.nn.functional.normalize(centres[own] + 0.05 * unit(256, 16, seed=4), dim=-1)
    clusters = clusters_of(vectors, 32)
    sizes = clusters.bincount()
    assert sizes.max() == 32 and len(sizes) == 8
    pure = sum(len(own[clusters == c].unique()) == 1 for c in range(8))
    assert pure >= 6
    sizes = clusters_of(unit(1000, 16), 32).bincount()
    assert sizes.sum() == 1000 and sizes.max() <= 32 and (sizes == 32).sum() >= 30
    assert clusters_of(unit(5, 4), 32).tolist() == [0] * 5
    assert clusters_of(torch.ones(100, 4), 32).bincount().max() <= 32, "the same vector a hundred times"


def test_a_batch_holds_whole_clusters_and_an_epoch_every_example():
    clusters = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 8))
    dataset = PairDataset(Table({"cluster": int(c)} for c in clusters))
    sampler = ClusteredSampler(dataset, 0)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(80)) and len(sampler) == 80
        groups = clusters[orders[-1]].reshape(10, 8)
        assert (groups == groups[:, :1]).all()
    assert orders[0] == orders[2] != orders[1]
    half = dataset.select(range(0, 80, 2))
    assert sorted(ClusteredSampler(half, 0)) == list(range(40))
    with pytest.raises(ValueError, match="needs a column 'cluster'"):
        ClusteredSampler(PairDataset(Table([{"a": 1}])), 0)


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mined with")
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs_file(tmp_path):
    """Ten pictures with two captions each; the last is the first one again, and one of its captions is another's."""
    rows = []
    for i in range(10):
        make_picture(i % 9).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [f"{CORPUS[i % 4]} {i}", f"picture {i}"]})
    rows[9]["caption"][1] = "picture 3"
    rows.append({"image": "nowhere.png", "caption": ["snow"]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


def test_captions_of_other_images_in_a_file_that_can_be_trained_on(
    checkpoint, pairs_file, processor, tmp_path, capsys
):
    out = tmp_path / "more" / "mined.parquet"
    words = ["--model", str(checkpoint), "--data_file", str(pairs_file), "--output_file", str(out)]
    main([*words, "--num_negatives", "4", "--cluster_size", "4"])
    assert "10 rows of 11; 40 negatives, none for 0 rows; 3 clusters" in capsys.readouterr().out
    mined = load_dataset("parquet", data_files=str(out), split="train")
    model = make_model(processor)
    captions = [caption for row in mined for caption in row["caption"]]
    with torch.no_grad():
        texts = model.get_embedding(**processor(text=captions, return_tensors="pt"))
        for i, row in enumerate(mined):
            picture = PairDataset(mined, root=str(out.parent)).image(i)  # the path is from the new folder
            image = model.get_embedding(**processor(images=[picture], return_tensors="pt"))
            own = [0, 9] if i in (0, 9) else [i]
            mine = {caption for j in own for caption in mined[j]["caption"]}
            order = dict.fromkeys(captions[j] for j in (texts @ image[0]).argsort(descending=True).tolist())
            assert row["negative_caption"] == [caption for caption in order if caption not in mine][:4]
    assert max(np.bincount(mined["cluster"])) <= 4
    assert not list(out.parent.glob("*.part"))


def test_targets_of_other_queries_whatever_they_are(processor, tmp_path, capsys):
    rows = []
    for i in range(8):
        for kind, seed in (("q", i), ("t", 50 + i)):
            make_picture(seed).save(tmp_path / f"{kind}{i}.png")
        target = {"target_text": f"picture {i}"} if i % 4 == 3 else {"target_image": f"t{i}.png"}
        target |= {"target_text": "with snow"} if i % 4 == 2 else {}
        rows.append({"query_image": f"q{i}.png", "query_text": f"the dog {i}", **target})
    rows.append({**rows[0], "target_image": "q1.png"})  # another target of the first query, which is another's image
    (tmp_path / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = make_model(processor)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = type(model).from_pretrained(tmp_path / "base")
    adapted = add_fused_adapter(model, lora_config(fused_arguments(tmp_path)))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["--model", str(tmp_path / "base"), "--adapters", str(tmp_path / "adapter"), "--num_negatives", "2"]
    main([*words, "--data_file", str(tmp_path / "triplets.jsonl"), "--output_file", str(tmp_path / "mined.parquet")])
    assert "18 rows of 9; 0 without a negative" in capsys.readouterr().out
    mined = load_dataset("parquet", data_files=str(tmp_path / "mined.parquet"), split="train")
    data = TripletDataset(mined.cast_column("query_image", mined.features["query_image"]), seed=0)
    data.sources = [data.sources[0]._replace(root=str(tmp_path))]
    examples = [data.read(i) for i in range(18)]
    own = {}
    for example in examples:
        own.setdefault(example["query"].id, set()).add(example["target"].id)
    targets = {example["target"].id: example["target"] for example in examples}
    for example in examples:
        query, negative = example["query"], example["negative"]
        assert negative.id in targets and negative.id not in own[query.id]
        assert negative.image_id != query.image_id
    kinds = {(example["negative"].image is not None, bool(example["negative"].text)) for example in examples}
    assert len(kinds) >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_file", "d.csv"], "Give --model"),
        (["--model", "m"], "exactly one of dataset_name, data_file"),
        (["--model", "m", "--dataset_name", "scenes"], "scenes are drawn anew"),
        (["--model", "m", "--data_file", "d.csv", "--num_negatives", "0"], "nothing is to be done"),
        (["--model", "m", "--data_file", "d.csv", "--range_min", "4", "--range_max", "5"], "fewer than 3"),
        (["--model", "m", "--data_file", "d.csv", "--output_file", "d.jsonl"], "output_file must end in .parquet"),
        (["--model", "m", "--data_file", "d.csv"], "There is no file d.csv"),
        (["--model", "m", "--data_file", "d.csv", "--num_negative", "3"], "did you mean 'num_negatives'"),
    ],
)
def test_errors_are_a_line(words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert message in str(stopped.value)


@pytest.mark.parametrize("word", ["--help", "--help_all"])
def test_help_explains_shares_in_percent(word, capsys):
    with pytest.raises(SystemExit):
        main([word])
    assert "0.05 is 5 % less." in " ".join(capsys.readouterr().out.split())
