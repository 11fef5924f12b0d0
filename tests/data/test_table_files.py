"""Tables as people save them: what is understood, and which file and line is named where nothing can be."""

import json
import logging

import pytest
import yaml

from mmgem.data.annotations import read_annotations
from mmgem.data.json_files import parse_json, read_json, read_json_lines
from mmgem.data.loading import load_pairs, load_regions
from mmgem.data.pairs import BadDataError, PairDataset, as_captions
from mmgem.data.table_files import load_named, read_file
from mmgem.training.arguments import DataArguments
from tests.conftest import Table, make_picture


DEEP = "[" * 100_000 + "]" * 100_000
FAULTS = {
    "latin.csv": (
        "image,caption\na.png,café\n".encode("cp1252"),
        r"Line 2 of .*latin\.csv is not in UTF-8.*iconv -f CP",
    ),
    "wide.csv": (
        "image,caption\na.png,a\n".encode("utf-16"),
        r"wide\.csv is in UTF-16, not in UTF-8.*iconv -f UTF-16",
    ),
    "marked.csv": ("image,caption\n".encode("utf-16-le"), r"Line 1 of .*marked\.csv holds NUL.*iconv -f UTF-16LE"),
    "long.csv": (b"image,caption\na.png,b\nb.png,b,c\n", r"Line 3 of .*long\.csv has 3 fields.*2 \(image, caption\)"),
    "short.csv": (b"image,caption\n\na.png\n", r"Line 3 of .*short\.csv has 1 fields"),
    "index.csv": (b"image,caption\na.png,b,c\nb.png,b,c\n", r"Line 2 of .*index\.csv has 3 fields"),
    "quotes.csv": (
        b'image,caption\na.png,"b\nb.png,c\n',
        r"Line 3 of .*quotes\.csv is not valid CSV.*quotes come in pairs",
    ),
    "mac.csv": (b"image,caption\ra.png,b\rb.png,c\r", r"Line 1 of .*mac\.csv is not valid CSV.*tr '\\r' '\\n' <"),
    "twice.csv": (b"image,caption,caption\na.png,b,c\n", r"header of .*twice\.csv names the column 'caption' twice"),
    "excel.csv": (b"image;caption\na.png;a, b\n", r"excel\.csv are separated by ';'"),
    "empty.csv": (b"", r"empty\.csv is empty"),
    "header.csv": (b"image,caption\n", r"header\.csv has no rows"),
    "bad.jsonl": (
        b'{"image": "a", "caption": "b"}\n\n{"image": \n',
        r"Line 3 of .*bad\.jsonl is not valid JSON: Expecting value",
    ),
    "list.jsonl": (b'["a"]\n', r"Line 1 of .*list\.jsonl is not an object with columns"),
    "half.jsonl": (b'{"image": "a", "caption": "\\ud83d"}\n', r"Line 1 of .*half\.jsonl holds half a surrogate pair"),
    "latin.jsonl": ('{"caption": "café"}\n'.encode("cp1252"), r"Line 1 of .*latin\.jsonl is not in UTF-8"),
    "empty.jsonl": (b"", r"empty\.jsonl is empty"),
    "blank.jsonl": (b"\n \n", r"blank\.jsonl has no rows"),
    "deep.jsonl": (
        f'{{"image": "a", "caption": "b"}}\n{{"image": "a", "x": {DEEP}}}\n'.encode(),
        r"Line 2 of .*deep\.jsonl is not valid JSON: it is nested more than 100 deep at character 119",
    ),
    "deep.json": (
        f'[{{"image": "a", "x": {DEEP}}}]'.encode(),
        r"deep\.json is not valid JSON: it is nested more than 100 deep",
    ),
    "rows.json": (b'[{"image": "a"}, 3]', r"Row 1 of .*rows\.json is not an object with columns: 3"),
    "number.json": (b"3", r"number\.json could not be read as json"),
    "bad.parquet": (b"PAR1 nothing", r"bad\.parquet could not be read as parquet: ArrowInvalid: Parquet magic bytes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_by_file_and_line(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_file(str(tmp_path / name), "train")
    assert "An error occurred" not in str(caught.value)


CHECKED = [
    name for name in FAULTS if not name.startswith(("empty", "header", "blank", "number")) and "parquet" not in name
]


@pytest.mark.parametrize("name", CHECKED)
def test_files_of_a_folder_are_checked_like_single_ones(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_named(str(tmp_path), None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("words.csv", "\ufeffimage,caption\na.png,None\nb.png,NA\nc.png,null\nd.png,\n"),
        ("words.CSV", 'image,caption\na.png,None\nb.png,"NA"\nc.png,null\nd.png,\n'),
        ("words.jsonl", "\ufeff" + "".join(json.dumps({"caption": c}) + "\n" for c in ("None", "NA", "null", None))),
        ("words.json", json.dumps([{"caption": c} for c in ("None", "NA", "null", None)], indent=1)),
    ],
)
def test_none_na_and_null_are_words(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(read_file(str(tmp_path / name), "train")["caption"]) == ["None", "NA", "null", None]


@pytest.mark.parametrize("separator", [",", ";"])
def test_words_of_a_folder_stay_words_whatever_its_separator(tmp_path, separator):
    rows = ["image,caption", "a.png,None", "b.png,NA", "c.png,"]
    (tmp_path / "train.csv").write_text("\n".join(rows).replace(",", separator) + "\n")
    if separator == ";":
        configs = [{"config_name": "default", "sep": ";", "data_files": "train.csv"}]
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    assert list(load_named(str(tmp_path), None, "train")["caption"]) == ["None", "NA", None]
    train, _ = load_pairs(DataArguments(dataset_name=str(tmp_path)), 32, seed=0)
    assert train.captions() == [["None"], ["NA"], []]


def test_the_table_of_an_image_folder_loses_no_word(tmp_path):
    for name in ("a.png", "b.png"):
        make_picture(0).save(tmp_path / name)
    (tmp_path / "notes.csv").write_text("anything\n1,2\n")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a dog\nb.png,null\n")
    with pytest.raises(ValueError, match=r"Row 1 of .*metadata\.csv has the caption 'null'.*metadata\.jsonl"):
        load_named(str(tmp_path), None)
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a dog, a cat\nb.png,snow\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*metadata\.csv has 3 fields"):
        load_named(str(tmp_path), None)
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a dog\nb.png,\n")
    assert list(load_named(str(tmp_path), None, "train")["caption"]) == ["a dog", None]


def test_a_comma_a_quote_and_a_newline_in_a_caption(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na.png,"a, ""b""\nc"\nb.png,d\n')
    assert list(read_file(str(tmp_path / "a.csv"), "train")["caption"]) == ['a, "b"\nc', "d"]


LISTS = [
    "['a dog', 'a cat']",
    '["a dog", "a cat"]',
    " ['a dog']\n",
    "['a dog' 'a cat']",
    str(["it's a dog", "a cat"]),
    str(("it's a dog", 'a "cat"')),
    str(("a dog",)),
    json.dumps(['a "dog"', None]),
    "[]",
    "()",
]


@pytest.mark.parametrize("value", LISTS)
def test_a_list_that_was_written_as_text_is_no_caption(value):
    with pytest.raises(ValueError, match=r"the caption is a list written as text.*parquet or jsonl"):
        as_captions(value)
    rows = [{"image": make_picture(0), "caption": value}, {"image": make_picture(1), "caption": "[a] dog ['s]"}]
    dataset = PairDataset(Table(rows))
    assert dataset[0]["caption"] == "[a] dog ['s]" and "list written as text" in dataset[0]["bad"][0]
    assert dataset.captions() == [[], ["[a] dog ['s]"]]


@pytest.mark.parametrize(
    "value", ['["quoted" sign on a wall next to "exit"]', '("a title")', "(a dog)", "[1]", "[a, 'b']"]
)
def test_brackets_and_quotes_make_no_list(value):
    assert as_captions(value) == [value]
    assert as_captions("[" + "'a' " * 50_000) == [("[" + "'a' " * 50_000).strip()], "in linear time"


def test_one_bad_caption_is_one_bad_example():
    rows = [{"image": make_picture(i), "caption": c} for i, c in enumerate(("a", "\ud83d", 3, "b"))]
    dataset = PairDataset(Table(rows))
    assert dataset.captions() == [["a"], [], [], ["b"]]
    assert dataset[1]["caption"] == "b" and dataset[1]["bad"].keys() == {1, 2}
    with pytest.raises(BadDataError, match="half a surrogate pair"):
        dataset.read(1)


def write_dataset(folder, *splits):
    """As on the Hub: a README that names the splits, each of one row that says which it is."""
    folder.mkdir()
    files = []
    for split in splits:
        (folder / f"{split}_rows.jsonl").write_text(json.dumps({"image": "a.png", "caption": split}) + "\n")
        files.append({"split": split, "path": f"{split}_rows.jsonl"})
    configs = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(configs)}---\n")
    return str(folder)


@pytest.mark.parametrize("split", ["validation", "val", "valid", "dev", "eval", "test"])
def test_splits_to_evaluate_on_are_found_by_their_names(tmp_path, split):
    name = write_dataset(tmp_path / "data", "other", split, "train")
    train, held_out = load_pairs(DataArguments(dataset_name=name), 32, seed=0)
    assert train.captions() == [["train"]] and held_out.captions() == [[split]]
    assert str(held_out.table.split) == split


def test_nothing_to_evaluate_on_is_said(tmp_path, caplog):
    for name in ("mmgem", "mmgem.data.loading"):
        logging.getLogger(name).propagate = True
    name = write_dataset(tmp_path / "data", "train", "other")
    assert load_pairs(DataArguments(dataset_name=name), 32, seed=0)[1] is None
    assert "Nothing will be evaluated" in caplog.text and "splits train, other" in caplog.text
    caplog.clear()
    (tmp_path / "a.csv").write_text("image,caption\na.png,a\n")
    assert load_pairs(DataArguments(train_file=str(tmp_path / "a.csv")), 32, seed=0)[1] is None
    assert "--validation_file" in caplog.text


def test_a_dataset_that_cannot_be_read_says_why(tmp_path):
    name = write_dataset(tmp_path / "data", "train", "test")
    (tmp_path / "data" / "test_rows.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"Line 1 of .*data/test_rows\.jsonl is not valid JSON"):
        load_pairs(DataArguments(dataset_name=name), 32, seed=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"The dataset .*other could not be read: ArrowInvalid: Parquet magic bytes"):
        load_pairs(DataArguments(dataset_name=str(tmp_path / "other")), 32, seed=0)


def test_what_to_evaluate_on_is_named_once(tmp_path):
    options = {"validation_annotations": ["a.json"], "image_folders": ["."]}
    with pytest.raises(ValueError, match="validation_annotations go with training files"):
        load_regions(DataArguments(dataset_name="scenes", **options), 32, seed=0)
    (tmp_path / "a.jsonl").write_text('{"image": "a", "caption": "b"}\n')
    with pytest.raises(ValueError, match="validation_file or validation_annotations, not both"):
        load_pairs(DataArguments(train_file=str(tmp_path / "a.jsonl"), validation_file="b", **options), 32, seed=0)
    for limit in ("max_train_samples", "max_eval_samples"):
        with pytest.raises(ValueError, match=f"{limit} must be 1 or more, got 0"):
            DataArguments(dataset_name="scenes", **{limit: 0})


def test_json_with_a_mark_and_json_that_is_nested_deeply(tmp_path):
    make_picture(0).save(tmp_path / "a.jpg")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    (tmp_path / "coco.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert list(read_annotations([str(tmp_path / "coco.json")], [str(tmp_path)])[0]["caption"]) == [["a dog"]]
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert read_json_lines(str(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "a.jsonl").write_text(f"{{}}\n{DEEP}\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*a\.jsonl is not valid JSON: it is nested more than 100 deep"):
        read_json_lines(str(tmp_path / "a.jsonl"))
    content["annotations"][0]["caption"] = "\ud83d"
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"coco\.json has no text about image 1: half a surrogate pair"):
        read_annotations([str(tmp_path / "coco.json")], [str(tmp_path)])


def test_brackets_in_a_text_do_not_nest(tmp_path):
    row = {"caption": '[[{\\" ' * 200, "boxes": [[0, 1]] * 200}
    assert parse_json(json.dumps(row)) == row
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_json(str(tmp_path / "a.json")) == [row]
