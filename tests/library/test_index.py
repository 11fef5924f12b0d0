"""What a search finds: compared with a scan of all vectors, by every kind of query."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmgem.evaluation.likelihood import rerank
from mmgem.library import Index, LoadedModel, store
from mmgem.library.regions import best_region, windows

from ..conftest import make_model, make_picture


@pytest.fixture
def index(photos, loaded, tmp_path):
    return Index.build(str(photos), str(tmp_path / "index"), loaded)


def ranking(index, query):
    """All ids, nearest first."""
    cosines = np.concatenate(list(index.vectors)) @ query
    return [index.vectors.ids[int(row)].as_py() for row in np.argsort(-cosines)]


def embedded(loaded, **inputs):
    with torch.no_grad():
        return loaded.model.get_embedding(**loaded.processor(**inputs, return_tensors="pt")).reshape(-1).numpy()


def test_a_text_an_image_both_and_a_box(index, loaded, photos):
    picture = Image.open(photos / "2.jpg")
    hits = index.search(text="a dog on a beach", top=3)
    assert [hit.id for hit in hits] == ranking(index, embedded(loaded, text=["a dog on a beach"]))[:3]
    hits = index.search(image=str(photos / "2.jpg"))
    assert [hit.id for hit in hits] == ranking(index, embedded(loaded, images=[picture])) and hits[0].id == "2.jpg"
    assert hits[0].score == pytest.approx(1, abs=1e-5) and hits[0].path == str(photos / "2.jpg")
    fused = embedded(loaded, images=[picture], text=["but at night"], task="embed")
    assert [hit.id for hit in index.search(image=picture, text="but at night")] == ranking(index, fused)
    box = embedded(loaded, images=[picture], boxes=[[[4, 4, 30, 30]]])
    hits = index.search(image=picture, boxes=[4, 4, 30, 30])
    assert [hit.id for hit in hits] == ranking(index, box)
    assert not np.allclose(box, embedded(loaded, images=[picture]), atol=1e-2)


def test_without_the_adapter_both_are_averaged(photos, processor, tmp_path):
    loaded = LoadedModel("plain", make_model(processor), processor)
    index = Index.build(str(photos), str(tmp_path / "index"), loaded)
    picture = Image.open(photos / "1.jpg")
    both = embedded(loaded, images=[picture]) + embedded(loaded, text=["snow"])
    assert [hit.id for hit in index.search(image=picture, text="snow")] == ranking(index, both)


def test_rerank_is_by_likelihood_and_leaves_the_rest(index, loaded, photos):
    text = "the cat sat on the mat"
    nearest = [hit.id for hit in index.search(text=text)]
    hits = index.search(text=text, rerank=3)
    images = [Image.open(photos / name) for name in nearest[:3]]
    loaded.model.disable_adapters()
    expected = [(nearest[i], score) for i, score in rerank(loaded.model, loaded.processor, text, images)]
    loaded.model.enable_adapters()
    assert [hit.id for hit in hits] == [name for name, _ in expected] + nearest[3:]
    assert [hit.score for hit in hits[:3]] == pytest.approx([score for _, score in expected], rel=1e-4)


def test_regions_order_by_the_best_window(index, loaded, photos):
    hits = index.search(text="two people", regions=True)
    query = torch.tensor(embedded(loaded, text=["two people"]))
    for hit in hits:
        image = Image.open(photos / hit.id).convert("RGB")
        boxes = windows(*image.size, loaded.processor)
        with torch.no_grad():
            inputs = loaded.processor(images=[image], boxes=[boxes], return_tensors="pt")
            cosines = loaded.model.get_embedding(**inputs)[0] @ query
        assert hit.score == pytest.approx(float(cosines.max()), abs=1e-5)
        assert hit.box == pytest.approx(boxes[int(cosines.argmax())], abs=0.06)
        assert best_region(loaded.model, loaded.processor, image, query)[0] == hit.box
    assert [hit.score for hit in hits] == sorted([hit.score for hit in hits], reverse=True)


def test_windows_cover_what_the_centre_crop_keeps(processor):
    boxes = np.array(windows(300, 100, processor))
    assert boxes[:, 0].min() == pytest.approx(100) and boxes[:, 2].max() == pytest.approx(200)
    assert boxes[:, 1].min() == 0 and boxes[:, 3].max() == 100 and (boxes[:, 2:] > boxes[:, :2]).all()


def test_images_that_are_gone_stay_in_the_list_without_an_image(index, photos):
    first = index.search(text="snow")[0]
    (photos / first.id).unlink()
    again = index.search(text="snow")
    assert again[0].id == first.id and index.image(again[0]) is None
    assert index.search(text="snow", rerank=5)[-1].id == first.id
    assert first.id not in [hit.id for hit in index.search(text="snow", regions=True)]


def test_rows_of_a_table_that_changed_are_not_shown(photos, loaded, tmp_path, caplog):
    content = [(photos / f"{i}.jpg").read_bytes() for i in range(3)]
    pq.write_table(pa.table({"image": content}), tmp_path / "table.parquet")
    Index.build(str(tmp_path / "table.parquet"), str(tmp_path / "rows"), loaded)
    pq.write_table(pa.table({"image": content[::-1]}), tmp_path / "table.parquet")
    index = Index(str(tmp_path / "rows"), loaded)
    assert index.image(index.search(text="a dog")[0]) is None
    assert "table.parquet cannot be shown: it has changed since it was embedded" in caplog.text


def test_regions_keep_their_boxes_when_they_are_ordered_anew(index):
    assert all(hit.box is not None for hit in index.search(text="snow", regions=True, rerank=3))


def test_rows_of_a_table_are_found_again(photos, loaded, tmp_path):
    content = [(photos / f"{i}.jpg").read_bytes() for i in range(3)]
    pq.write_table(pa.table({"image": content}), tmp_path / "table.parquet")
    index = Index.build(str(tmp_path / "table.parquet"), str(tmp_path / "rows"), loaded)
    hit = index.search(image=Image.open(photos / "1.jpg"), top=1)[0]
    assert (hit.id, hit.path) == ("1", "") and index.image(hit).size == (48, 40)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "Search for a text, an image, or both"),
        ({"text": " "}, "text to search for is empty"),
        ({"text": "a", "boxes": [0, 0, 1, 1]}, "boxes are a part of the image"),
        ({"image": "missing.jpg"}, r"missing\.jpg"),
        ({"image": make_picture(0), "rerank": 5}, "give a text, and no image"),
        ({"image": make_picture(0), "text": "a", "regions": True}, "give a text, and no image"),
        ({"image": make_picture(0), "boxes": [5, 5, 1, 1]}, "has no area"),
    ],
)
def test_queries_that_make_no_sense(index, query, message):
    with pytest.raises((ValueError, OSError), match=message):
        index.search(**query)


def test_an_index_of_another_model_or_dimension_is_refused(index, processor, tmp_path):
    other = LoadedModel("other", make_model(processor, seed=1), processor)
    with pytest.raises(ValueError, match=r"was made by .*model with other weights than other has"):
        Index(index.folder, other)
    wide = LoadedModel("wide", make_model(processor, config={"projection_dim": 8}), processor)
    with pytest.raises(ValueError, match="holds vectors of 16 numbers, and wide makes 8"):
        Index(index.folder, wide)
    with pytest.raises(FileNotFoundError, match=r"There is no index .*nowhere. Make one: mmgem embed FOLDER"):
        Index(str(tmp_path / "nowhere"), other)
    with pytest.raises(ValueError, match="precision must be one of float32, int8"):
        Index(index.folder, precision="int4")


def tower_model(processor):
    """A model whose embedding of an image is its tower's own."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    return make_model(processor, config={"image_pooling": "tower", "vision_config": vision})


@pytest.mark.parametrize("layout", ["clip-retrieval", "npy", "parquet", "folder of parquet"])
def test_vectors_of_clip_are_read_as_they_are(layout, photos, processor, tmp_path):
    loaded = LoadedModel("tower", tower_model(processor), processor)
    paths = [str(photos / f"{i}.jpg") for i in range(4)]
    vectors = np.stack([embedded(loaded, images=[Image.open(path)]) for path in paths]) * 7  # of any norm
    folder = tmp_path / "clip"
    folder.mkdir()
    if layout == "clip-retrieval":
        for part in (0, 1):
            (folder / "img_emb").mkdir(exist_ok=True)
            (folder / "metadata").mkdir(exist_ok=True)
            own = slice(2 * part, 2 * part + 2)
            np.save(folder / f"img_emb/img_emb_{part}.npy", vectors[own].astype(np.float16))
            rows = pa.table({"image_path": paths[own], "caption": ["", ""]})
            pq.write_table(rows, folder / f"metadata/metadata_{part}.parquet")
    elif layout == "npy":
        folder = folder / "vectors.npy"
        np.save(folder, vectors.astype(np.float32))
    else:
        table = pa.table({"file_name": paths, "embedding": list(vectors.astype(np.float32))})
        target = folder / "part.parquet"
        pq.write_table(table, target)
        folder = target if layout == "parquet" else folder
    index = Index(str(folder), loaded)
    hits = index.search(image=Image.open(paths[3]), top=4)
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert (hits[0].id, hits[0].path) == (("3", "") if layout == "npy" else (paths[3], paths[3]))
    assert index.image(hits[0]) is None if layout == "npy" else index.image(hits[0]).size == (48, 40)


def test_vectors_of_clip_need_a_model_in_its_space(processor, tmp_path):
    np.save(tmp_path / "vectors.npy", np.ones((3, 16), np.float32))
    plain = LoadedModel("plain", make_model(processor), processor)
    with pytest.raises(ValueError, match=r'was not made by plain: it has no index.json.* image_pooling "tower"'):
        Index(str(tmp_path / "vectors.npy"), plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones(5, np.float32), r"holds float32 of shape \(5,\), and no vectors"),
        (np.array([["a"]]), "and no vectors"),
        (np.full((2, 16), np.nan, np.float32), "holds vectors with NaN"),
        (np.zeros((0, 16), np.float32), "holds no vectors"),
        (np.array([{"a": 1}], dtype=object), "cannot be read as a part of an index"),
    ],
)
def test_files_without_vectors(content, message, processor, tmp_path):
    np.save(tmp_path / "vectors.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        Index(str(tmp_path / "vectors.npy"), LoadedModel("tower", tower_model(processor), processor))


def test_parts_of_different_dimensions(processor, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 16), np.float32))
    np.save(tmp_path / "b.npy", np.ones((3, 8), np.float32))
    with pytest.raises(ValueError, match=r"holds vectors of (16|8) numbers, .* of (16|8). Keep one kind"):
        Index(str(tmp_path), LoadedModel("tower", tower_model(processor), processor))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_many_vectors_are_kept_in_a_file_and_found(precision, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "EXACT", 1000)
    monkeypatch.setattr(store, "PROBED", 2)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4000, 16)).astype(np.float32)
    np.save(tmp_path / "a.npy", vectors)
    loaded = LoadedModel("tower", tower_model(processor), processor)
    index = Index(str(tmp_path), loaded, precision)
    file = tmp_path / store.STORE_FILE.format(precision=precision)
    assert file.exists()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = unit[:100] + 0.1 * rng.normal(size=(100, 16)).astype(np.float32)
    exact = np.argsort(-(queries @ unit.T), axis=1)[:, :10]
    found = index.store.search(queries, 10)[1]
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact.tolist(), found.tolist())])
    assert recall > (0.9 if precision == "float32" else 0.85)
    written = file.stat().st_mtime_ns
    kept = Index(str(tmp_path), loaded, precision)
    assert kept.store.ntotal == 4000 and (kept.store.search(queries, 10)[1] == found).all()
    assert file.stat().st_mtime_ns == written
    (tmp_path / "damaged").write_bytes(b"damaged")
    os.replace(tmp_path / "damaged", file)  # in place, it would be cut off under the indexes that have mapped it
    assert Index(str(tmp_path), loaded, precision).store.ntotal == 4000
    np.save(tmp_path / "b.npy", vectors[:10])
    assert Index(str(tmp_path), loaded, precision).store.ntotal == 4010
