"""Karpathy's splits, NoCaps' domains and the files of long captions."""

import json

import pytest

from mmgem.data.annotations import read_annotations
from tests.conftest import make_picture


@pytest.fixture
def folder(tmp_path):
    """Four pictures, a.jpg to d.jpg."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate("abcd"):
        make_picture(i).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def read(folder, content, splits=None, name="file.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_annotations([str(folder / name)], [str(folder / "images")], splits)[0]


def captions(table, column="caption"):
    return {row["image"].split("/")[-1]: row[column] for row in table}


def test_karpathys_splits(folder):
    image = {"sentences": [{"raw": "one"}, {"raw": "two"}], "filepath": "../../etc"}
    images = [{**image, "filename": f"{n}.jpg", "split": s} for n, s in zip("abc", ("train", "restval", "test"))]
    images[2]["cocoid"] = 42
    content = {"images": images, "dataset": "coco"}
    assert captions(read(folder, content, ("train", "restval"))) == {"a.jpg": ["one", "two"], "b.jpg": ["one", "two"]}
    table = read(folder, content, ("test",))
    assert captions(table) == {"c.jpg": ["one", "two"]} and table["image_id"][0] == "42"
    assert len(read(folder, content)) == 3
    with pytest.raises(ValueError, match=r"no split val; it has restval, test, train"):
        read(folder, content, ("val",))


def test_nocaps_domains(folder):
    images = [
        {"id": i, "file_name": f"{n}.jpg", "domain": f"{d}-domain"}
        for i, (n, d) in enumerate(zip("ab", ("in", "out")))
    ]
    annotations = [{"image_id": i, "caption": f"number {i}"} for i in (0, 1, 1)]
    table = read(folder, {"images": images, "annotations": annotations})
    assert [(row["image_id"], row["domain"], len(row["caption"])) for row in table] == [
        ("0", "in-domain", 1),
        ("1", "out-domain", 2),
    ]


def test_dci(folder):
    (folder / "dci").mkdir()
    for name in "ab":
        row = {
            "image": f"{name}.jpg",
            "short_caption": f"Short {name}.",
            "extra_caption": "Much more.",
            "mask_data": {},
        }
        (folder / "dci" / f"{name}.json").write_text(json.dumps(row))
    table, _ = read_annotations([str(folder / "dci")], [str(folder / "images")])
    assert captions(table, "long_caption") == {"a.jpg": ["Short a. Much more."], "b.jpg": ["Short b. Much more."]}


def test_doccis_splits(folder):
    rows = [{"example_id": n, "split": "test", "image_file": f"{n}.jpg", "description": f"All of {n}."} for n in "acx"]
    rows.append({**rows[0], "split": "train", "image_file": "b.jpg"})
    lines = "\n".join(map(json.dumps, rows))
    table = read(folder, lines, ("test",), name="docci_descriptions.jsonlines")
    assert captions(table, "long_caption") == {"a.jpg": ["All of a."], "c.jpg": ["All of c."]}
    assert len(read(folder, lines, name="docci_descriptions.jsonlines")) == 3
    with pytest.raises(ValueError, match="no split val or qual_dev; it has test, train"):
        read(folder, lines, ("val", "qual_dev"), name="docci_descriptions.jsonlines")
    with pytest.raises(ValueError, match=r"Line 5 of .*docci_descriptions\.jsonlines is not valid JSON"):
        read(folder, lines + "\n{", name="docci_descriptions.jsonlines")


def test_sharegpt4v(folder):
    def row(name, answer):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        return {"id": name, "image": f"coco/train2017/{name}.jpg", "conversations": turns}

    content = [row("d", " Another. "), {"id": "text alone", "conversations": []}, row("a", "A long one.")]
    table = captions(read(folder, content), "long_caption")
    assert list(table.items()) == [("d.jpg", ["Another."]), ("a.jpg", ["A long one."])], "its order: the first 1,000"
    with pytest.raises(ValueError, match=r"coco/train2017/d\.jpg and sam/d\.jpg have the same name"):
        read(folder, [*content, {**content[0], "image": "sam/d.jpg"}])
    content[2]["conversations"] = content[2]["conversations"][:1]
    with pytest.raises(ValueError, match=r"file\.json is not as its kind is published.*coco/train2017/a\.jpg"):
        read(folder, content)


def test_urban1k(folder):
    (folder / "caption").mkdir()
    for name in "bd":
        (folder / "caption" / f"{name}.txt").write_text(f"The city {name}.\n")
    table, _ = read_annotations([str(folder / "caption")], [str(folder / "images")])
    assert captions(table, "long_caption") == {"b.jpg": ["The city b."], "d.jpg": ["The city d."]}


def test_long_captions_stand_beside_short_ones(folder):
    (folder / "caption").mkdir()
    (folder / "caption" / "a.txt").write_text("A long one.")
    (folder / "coco.json").write_text(
        json.dumps(
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a short one"}]}
        )
    )
    files = [str(folder / "caption"), str(folder / "coco.json")]
    (row,), _ = read_annotations(files, [str(folder / "images")])
    assert (row["caption"], row["long_caption"]) == (["a short one"], ["A long one."])
    assert "long_caption" not in read_annotations(files[1:], [str(folder / "images")])[0].column_names


def test_ids_and_files_that_come_twice_are_refused(folder):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
    with pytest.raises(ValueError, match=r"file\.json has several images of the id 1"):
        read(folder, {"images": images, "annotations": []})
    images = [{"id": 1, "file_name": "x/a.jpg"}, {"id": 2, "file_name": "y/a.jpg"}]
    with pytest.raises(ValueError, match=r"file\.json has several images of the name a\.jpg"):
        read(folder, {"images": images, "annotations": []})
    images = [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "one"}]}] * 2
    with pytest.raises(ValueError, match=r"file\.json has several images of the id a\.jpg"):
        read(folder, {"images": images})
    with pytest.raises(ValueError, match="is given twice"):
        read_annotations([str(folder / "file.json")] * 2, [str(folder / "images")])


def test_an_empty_folder_is_none_of_them(folder):
    (folder / "nothing").mkdir()
    with pytest.raises(ValueError, match="none of COCO's"):
        read_annotations([str(folder / "nothing")], [str(folder / "images")])


def test_faults_name_the_file_and_the_picture(folder):
    (folder / "dci").mkdir()
    (folder / "dci" / "b.json").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(ValueError, match=r"dci/b\.json is not valid JSON"):
        read_annotations([str(folder / "dci")], [str(folder / "images")])
    with pytest.raises(ValueError, match=r"file\.json is not valid JSON: it is nested more than 100 deep"):
        read(folder, "[" * 100_000)
    with pytest.raises(ValueError, match="none of COCO's"):
        read(folder, '{"a": 1}\n{"a": 2}', name="other.jsonl")
    images = [{"id": 7, "file_name": "a.jpg"}]
    with pytest.raises(ValueError, match=r"has 5 as a text about image 7, but a text must be a string"):
        read(folder, {"images": images, "annotations": [{"image_id": 7, "caption": 5}]})
    coco = {"images": images, "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": 5}]}
    for bbox in ([], [1, 2, 3], [1, 2, 3, "4"], None):
        with pytest.raises(
            ValueError, match=r"file\.json has .* as a box of image 7, but a box must be \[x, y, width"
        ):
            read(folder, {**coco, "annotations": [{"image_id": 7, "category_id": 1, "bbox": bbox}]})
    with pytest.raises(ValueError, match=r"has 5 as a text about image 7"):
        read(folder, {**coco, "annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]}]})
    make_picture(0).save(folder / "images" / "8.jpg")
    region = {"x": 0, "y": 0, "width": 9, "height": 9, "phrase": "a hat"}
    with pytest.raises(ValueError, match=r"has 5 as a text about image 8"):
        read(folder, [{"id": 8, "regions": [region, {**region, "phrase": 5}]}])
    with pytest.raises(ValueError, match=r"file\.json has several images of the name 8"):
        read(folder, [{"id": 8, "regions": [region]}] * 2)
    (folder / "caption").mkdir()
    (folder / "caption" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"caption/a\.txt is no text"):
        read_annotations([str(folder / "caption")], [str(folder / "images")])
    images = [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": {"a": 1}}]}]
    with pytest.raises(ValueError, match=r"as a text about image a\.jpg, but a text must be a string"):
        read(folder, {"images": images})
