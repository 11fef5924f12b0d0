"""What a folder, a table, shards and scenes hold, and that parts of them are disjoint."""

import os

import datasets
import pytest

from mmgem.library.sources import SourceOptions, open_source

from ..conftest import make_picture, write_shards


def ids(source, part=0, parts=1):
    return [item.id for unit in source.units(part, parts) for item in source.items(unit)]


def test_a_folder_holds_its_images_and_those_of_subfolders_without_hidden_ones(photos):
    source = open_source(SourceOptions(str(photos)))
    assert ids(source) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "sub/4.PNG"]
    assert source.item("sub/4.PNG").image().size == (40, 60)
    without = open_source(SourceOptions(str(photos)), str(photos / "sub"))
    assert "sub/4.PNG" not in ids(without)


def test_the_folder_that_one_stands_in_is_not_left_out(photos, monkeypatch):
    monkeypatch.chdir(photos / "sub")
    assert "sub/4.PNG" in ids(open_source(SourceOptions("..")))


def test_a_folder_may_be_called_like_a_tar(photos, tmp_path):
    os.rename(photos, tmp_path / "photos.target")
    assert len(ids(open_source(SourceOptions(str(tmp_path / "photos.target"))))) == 5


def test_parts_are_disjoint_and_complete(photos, tmp_path):
    write_shards(tmp_path)
    for name in (str(photos), str(tmp_path / "{0..3}.tar"), "scenes"):
        source = open_source(SourceOptions(name))
        parts = [ids(source, part, 3) for part in range(3)]
        assert sorted(i for part in parts for i in part) == sorted(ids(source))


def test_fingerprints_change_with_the_file(photos):
    source = open_source(SourceOptions(str(photos)))
    before = {unit: source.fingerprint(unit) for unit in source.units()}
    os.utime(photos / "1.jpg", (0, 0))
    after = {unit: source.fingerprint(unit) for unit in source.units()}
    assert {unit for unit in before if before[unit] != after[unit]} == {"1.jpg"}


def test_a_table_gives_bytes_and_paths(photos, tmp_path):
    content = (photos / "0.jpg").read_bytes()
    rows = {"picture": [{"bytes": content, "path": None}, {"bytes": None, "path": str(photos / "1.jpg")}]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "table.parquet")
    source = open_source(SourceOptions(str(tmp_path / "table.parquet"), image_column="picture"))
    items = [item for unit in source.units() for item in source.items(unit)]
    assert [(item.id, item.path) for item in items] == [("0", ""), ("1", str(photos / "1.jpg"))]
    assert [item.image().size for item in items] == [(48, 40)] * 2
    (tmp_path / "paths.csv").write_text("picture,n\nphotos/2.jpg,1\n")
    source = open_source(SourceOptions(str(tmp_path / "paths.csv"), image_column="picture"))
    assert source.item("0").path == str(photos / "2.jpg") and source.item("0").image().size == (48, 40)
    with pytest.raises(ValueError, match=r"no column 'image'; its columns are picture. Set --image_column"):
        open_source(SourceOptions(str(tmp_path / "table.parquet")))


def test_shards_give_their_samples_and_faults(tmp_path):
    write_shards(tmp_path)
    with open(tmp_path / "3.tar", "r+b") as file:
        file.truncate(5000)
    source = open_source(SourceOptions(str(tmp_path)))
    items = [item for unit in source.units() for item in source.items(unit)]
    assert len([item for item in items if not isinstance(item.value, Exception)]) >= 36
    assert any("broken shard" in str(item.value) for item in items)
    whole = [item for item in items if not isinstance(item.value, Exception)]
    assert all(source.item(item.id).value == item.value for item in whole)


def test_a_file_that_goes_away_is_a_fault_of_one_item(photos):
    source = open_source(SourceOptions(str(photos)))
    units = list(source.units())
    (photos / "2.jpg").unlink()
    items = {item.id: item for unit in units for item in source.items(unit)}
    with pytest.raises(FileNotFoundError, match=r"2\.jpg"):
        items["2.jpg"].image()
    assert items["3.jpg"].image().size == (48, 40)


def test_a_name_that_is_not_utf_8_is_a_fault(photos):
    make_picture(7).save(photos / "7.jpg")
    os.rename(os.fsencode(photos / "7.jpg"), os.fsencode(photos) + b"/\xff.jpg")
    source = open_source(SourceOptions(str(photos)))
    faults = [item for u in source.units() for item in source.items(u) if isinstance(item.value, Exception)]
    assert [(item.id, str(item.value)) for item in faults] == [("\\xff.jpg", "its name is not UTF-8; rename the file")]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("empty", ValueError, r"empty holds no images: none of its files ends in \.jpg"),
        ("missing.csv", FileNotFoundError, r"no file .*missing\.csv"),
        ("missing.tar", FileNotFoundError, r"no shard .*missing\.tar"),
        ("nothing", FileNotFoundError, "There is no .*nothing: neither a folder nor a file"),
    ],
)
def test_what_is_not_there_is_named(name, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        open_source(SourceOptions(name))
