"""Pictures and captions from files, as users bring them."""

import io
import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Sequence, Value
from PIL import Image as PILImage

from mmgem.data.loading import load_pairs, load_regions
from mmgem.data.pairs import BadDataError, PairDataset, as_captions, augmented_image, random_crop
from mmgem.evaluation import data as evaluation
from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.training.arguments import DataArguments
from tests.conftest import make_picture


CAPTIONS = [["a dog", "a brown dog"], ["a cat", "  "], ["snow"]]


def encoded(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """The same three pictures with captions as parquet, jsonl, csv, and a folder of `datasets`."""
    pictures = [make_picture(i) for i in range(3)]
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "pictures" / f"{i}.png")
    features = Features({"image": Image(), "captions": Sequence(Value("string"))})
    table = Dataset.from_dict({"image": pictures, "captions": CAPTIONS}, features=features)
    table.to_parquet(tmp_path / "pairs.parquet")
    DatasetDict({"train": table, "validation": table.select([2, 0])}).save_to_disk(tmp_path / "saved")
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i, captions in enumerate(CAPTIONS):
            file.write(json.dumps({"image": f"pictures/{i}.png", "captions": captions}) + "\n")
    lines = [f"pictures/{i}.png,{captions[0]}" for i, captions in enumerate(CAPTIONS)]
    (tmp_path / "pairs.csv").write_text("\n".join(["file,captions", *lines]) + "\n")
    return tmp_path


def same_pictures(dataset):
    return all(
        np.array_equal(np.asarray(dataset[i]["image"]), np.asarray(make_picture(i))) for i in range(len(dataset))
    )


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.jsonl", "pairs.csv"])
def test_every_file_format_gives_the_same_pairs(folder, name):
    column = "file" if name.endswith("csv") else "image"
    arguments = DataArguments(
        train_file=str(folder / name),
        validation_file=str(folder / "pairs.parquet"),
        image_column=column,
        caption_column="captions",
    )
    if column == "file":
        arguments.validation_file = None
    train, held_out = load_pairs(arguments, 32, seed=0)
    assert len(train) == 3 and same_pictures(train)
    assert train.captions() == (
        [["a dog"], ["a cat"], ["snow"]] if column == "file" else [["a dog", "a brown dog"], ["a cat"], ["snow"]]
    )
    if held_out is not None:
        assert held_out.captions()[0] == ["a dog", "a brown dog"] and str(held_out.table.split) == "validation"


def test_saved_folder_of_datasets_brings_its_own_splits(folder):
    arguments = DataArguments(dataset_name=str(folder / "saved"), caption_column="captions")
    train, held_out = load_pairs(arguments, 32, seed=0)
    assert len(train) == 3 and held_out.captions() == [["snow"], ["a dog", "a brown dog"]]


def test_missing_column_names_those_that_are_there(folder):
    arguments = DataArguments(train_file=str(folder / "pairs.parquet"), caption_column="text")
    with pytest.raises(ValueError, match=r"no column 'text'.*image, captions"):
        load_pairs(arguments, 32, seed=0)


def test_captions_that_are_no_text_are_refused_by_column(tmp_path):
    Dataset.from_dict({"image": ["a.png"], "caption": [3]}).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"'caption' must hold texts.*int64"):
        load_pairs(DataArguments(train_file=str(tmp_path / "pairs.parquet")), 32, seed=0)


def test_missing_and_unknown_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        load_pairs(DataArguments(train_file=str(folder / "nothing.jsonl")), 32, seed=0)
    with pytest.raises(ValueError, match=r"'\.xml'.*\.parquet"):
        load_pairs(DataArguments(train_file=str(folder / "pairs.xml")), 32, seed=0)


def test_a_broken_image_in_another_column_does_not_matter(tmp_path):
    scan = {"bytes": b"no image", "path": None}
    region = {"box": [0.0, 0.0, 20.0, 20.0], "phrase": "a dog"}
    rows = {"image": [make_picture(0)], "caption": ["a dog"], "scan": [scan], "regions": [[region]]}
    regions = List({"box": List(Value("float64")), "phrase": Value("string")})
    features = Features({"image": Image(), "caption": Value("string"), "scan": Image(), "regions": regions})
    path = str(tmp_path / "wide.parquet")
    Dataset.from_dict(rows, features=features).to_parquet(path)
    train = load_pairs(DataArguments(train_file=path), 32, seed=0)[0]
    assert sorted(train.table.column_names) == ["caption", "image"], "the others would be read in vain"
    evaluated = EvaluationArguments(model="x", data_file=path)
    datasets = [train, load_regions(DataArguments(train_file=path), 32, seed=0)[0]]
    datasets += [evaluation.load_pairs(evaluated, 32), evaluation.load_regions(evaluated, 32)]
    assert [dataset.read(0)["caption"] for dataset in datasets] == ["a dog"] * 4


def test_limits_and_augmentation_touch_training_alone(folder):
    arguments = DataArguments(
        train_file=str(folder / "pairs.parquet"),
        validation_file=str(folder / "pairs.parquet"),
        caption_column="captions",
        max_train_samples=2,
        augmentation_scale=0.3,
    )
    train, held_out = load_pairs(arguments, 32, seed=0)
    assert len(train) == 2 and len(held_out) == 3
    assert not same_pictures(train) and same_pictures(held_out)


@pytest.mark.parametrize(
    "broken",
    [b"no picture at all", b"", encoded(make_picture(0), "JPEG")[:200], {"bytes": None, "path": None}, "gone.png"],
    ids=["text", "empty", "truncated", "nothing", "missing-file"],
)
def test_unreadable_picture_is_replaced_and_named(broken):
    rows = [{"image": encoded(make_picture(0)), "caption": "a"}, {"image": broken, "caption": "b"}]
    rows.append({"image": encoded(make_picture(2)), "caption": "c"})
    dataset = PairDataset(rows)
    example = dataset[1]
    assert example["caption"] == "c" and example["bad"].keys() == {1} and example["bad"][1]
    assert dataset[0]["bad"] == {}


def test_example_without_a_caption_is_bad_too():
    dataset = PairDataset([{"image": make_picture(0), "caption": "  "}, {"image": make_picture(1), "caption": "b"}])
    assert dataset[0]["caption"] == "b" and dataset[0]["bad"] == {0: "ValueError: it has no caption"}
    with pytest.raises(ValueError, match="None of the 1 examples"):
        PairDataset([{"image": make_picture(0), "caption": None}])[0]


def test_exif_orientation_is_honoured():
    picture = make_picture(0, (48, 24))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    data = encoded(picture, "PNG", exif=exif)
    shown = PairDataset([{"image": data, "caption": "a"}])[0]["image"]
    assert shown.size == (24, 48)
    assert np.array_equal(np.asarray(shown), np.rot90(np.asarray(picture), -1))


def test_captions_are_drawn_anew_each_epoch_and_the_same_again():
    rows = [{"image": make_picture(0), "caption": ["a", "b", "c", "d"]}]
    drawn = []
    for _ in range(2):
        dataset = PairDataset(rows, augmentation_scale=0.5)
        for epoch in range(8):
            dataset.set_epoch(epoch)
            example = dataset[0]
            drawn.append((example["caption"], example["image"].tobytes()))
    assert drawn[:8] == drawn[8:]
    assert len({caption for caption, _ in drawn}) > 2 and len({pixels for _, pixels in drawn}) == 8


def test_as_captions():
    assert as_captions(" a dog ") == ["a dog"]
    assert as_captions(["a", "", None, " b"]) == ["a", "b"]
    assert as_captions(None) == as_captions("") == []
    for wrong in (5, ["a", 5], {"text": "a"}):
        with pytest.raises(ValueError, match="captions must be text, got"):
            as_captions(wrong)


def test_selected_pairs_are_those_of_the_whole(folder):
    arguments = DataArguments(train_file=str(folder / "pairs.parquet"), caption_column="captions")
    whole = load_pairs(arguments, 32, seed=0)[0]
    part = whole.select([2, 0]).select([1])
    assert len(part) == 1 and part.captions() == [["a dog", "a brown dog"]] and len(whole) == 3
    assert part[0]["caption"] == whole[0]["caption"] and part[0]["image_id"] == whole[0]["image_id"]


def test_crops_of_one_picture_keep_its_id():
    table = [{"image": make_picture(0), "caption": "a"}, {"image": make_picture(0), "caption": "b"}]
    first, second = PairDataset(table, augmentation_scale=0.5)[0], PairDataset(table, augmentation_scale=0.5)[1]
    assert first["image"].tobytes() != second["image"].tobytes()
    assert (
        first["image_id"] == second["image_id"] != PairDataset([{**table[0], "image": make_picture(1)}])[0]["image_id"]
    )


def test_pictures_without_a_file_are_known_by_their_pixels():
    """Two of one colour each, of which the palettes alone differ."""
    pictures = [PILImage.new("RGB", (8, 8), colour).quantize() for colour in ("red", "blue", "red")]
    pairs = PairDataset([{"image": picture, "caption": "one colour"} for picture in pictures])
    red, blue, again = (pairs[i]["image_id"] for i in range(3))
    assert red == again != blue


@pytest.mark.parametrize("scale, side", [(1.0, 200), (0.5, 400)])
def test_large_jpegs_are_decoded_no_larger_than_they_must_be(scale, side):
    """800 x 600 at 150 pixels a side: a quarter holds them; a half, where a crop may have 0.61 of a side."""
    content = encoded(make_picture(0, (800, 600)), "JPEG", quality=95)
    small = augmented_image(content, scale, 150, np.random.default_rng(0))
    whole = augmented_image(content, scale, 0, np.random.default_rng(0))
    assert whole.width > 2 * small.width * 0.99 and min(small.size) >= 150
    assert (scale < 1) or (small.width, small.height) == (side, side * 3 // 4)
    difference = np.asarray(whole.resize((150, 150), 3), float) - np.asarray(small.resize((150, 150), 3), float)
    assert np.abs(difference).mean() < 1.5  # of 255
    png = encoded(make_picture(0, (800, 600)))
    assert augmented_image(png, 1.0, 150, np.random.default_rng(0)).size == (800, 600)


def test_slivers_are_refused_and_the_smallest_picture_can_be_cropped():
    with pytest.raises(BadDataError, match="longer than 50 times its width"):
        PairDataset([{"image": encoded(make_picture(0, (1, 65))), "caption": "a"}]).read(0)
    rng = np.random.default_rng(0)
    assert all(min(random_crop(make_picture(0, (2, 1)), 0.05, rng).size) >= 1 for _ in range(100))


def test_random_crop_keeps_the_area_asked_for():
    rng = np.random.default_rng(0)
    picture = make_picture(0, (400, 300))
    sizes = np.array([random_crop(picture, 0.5, rng).size for _ in range(200)])
    area = sizes.prod(1) / (400 * 300)
    assert area.min() > 0.43 and area.max() <= 1 and len({tuple(size) for size in sizes}) > 100
