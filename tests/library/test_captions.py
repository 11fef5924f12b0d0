"""Captions of folders and boxes, in every format, interrupted and continued."""

import csv
import json

import pytest
import torch
from filelock import FileLock
from PIL import Image

from mmgem.evaluation.caption_files import read_caption_results
from mmgem.evaluation.evaluator import draw_captions_of
from mmgem.evaluation.likelihood import LIKELIHOOD_WEIGHT
from mmgem.evaluation.regions import stage_1
from mmgem.library import LoadedModel, SourceOptions, captions
from mmgem.library.captions import CaptionOptions, read_boxes, write_captions
from mmgem.library.sources import open_source

from ..conftest import make_model


OPTIONS = CaptionOptions(batch_size=2, max_new_tokens=5)


def expected_caption(loaded, path):
    """By the processor and generate alone, without the adapters."""
    inputs = loaded.processor(images=[Image.open(path)], task="caption", return_tensors="pt")
    loaded.model.disable_adapters()
    ids = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    loaded.model.enable_adapters()
    return loaded.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


@pytest.fixture
def source(photos):
    return open_source(SourceOptions(str(photos)))


def test_jsonl_csv_and_coco(loaded, source, photos, tmp_path):
    for name in ("c.jsonl", "c.csv", "c.json"):
        count, faults = write_captions(loaded, source, str(tmp_path / name), OPTIONS)
        assert (count, faults) == (5, {})
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "sub/4.PNG"]
    for row in rows:
        assert row["caption"] == expected_caption(loaded, photos / row["id"]) and row["path"] == str(
            photos / row["id"]
        )
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    assert read_caption_results(str(tmp_path / "c.json")) == {row["id"]: row["caption"] for row in rows}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.json", "c.jsonl", "photos"]


def test_a_file_beside_each_image(loaded, source, photos):
    (photos / "1.txt").write_text("my own words")
    count, faults = write_captions(loaded, source, "txt", OPTIONS)
    assert count == 5 and list(faults) == ["1.jpg"] and "exists" in faults["1.jpg"]
    assert (photos / "1.txt").read_text() == "my own words"
    assert (photos / "sub/4.txt").read_text().strip() == expected_caption(loaded, photos / "sub/4.PNG")
    assert write_captions(loaded, source, "txt", OPTIONS, overwrite=True)[1] == {}
    assert (photos / "1.txt").read_text() != "my own words"


@pytest.mark.parametrize("form", ["coco", "object", "jsonl"])
def test_boxes_of_images(form, loaded, source, photos, tmp_path):
    boxes = {"1.jpg": [[0, 0, 20, 20], [5, 5, 40, 30]], "4.PNG": [[1, 2, 30, 50]]}
    if form == "coco":
        images = [{"id": i, "file_name": name} for i, name in enumerate(boxes)]
        annotations = [
            {"image_id": i, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for i, own in enumerate(boxes.values())
            for x0, y0, x1, y1 in own
        ]
        (tmp_path / "b.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    elif form == "object":
        (tmp_path / "b.json").write_text(json.dumps(boxes))
    else:
        lines = [json.dumps({"file_name": name, "boxes": own}) for name, own in boxes.items()]
        (tmp_path / "b.jsonl").write_text("\n".join(lines))
    read = read_boxes(str(next(tmp_path.glob("b.json*"))))
    assert read == boxes
    assert write_captions(loaded, source, str(tmp_path / "c.jsonl"), OPTIONS, read) == (3, {})
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [(row["id"], row["box"]) for row in rows] == [
        ("1.jpg", boxes["1.jpg"][0]),
        ("1.jpg", boxes["1.jpg"][1]),
        ("sub/4.PNG", boxes["4.PNG"][0]),
    ]
    inputs = loaded.processor(
        images=[Image.open(photos / "1.jpg")], boxes=[boxes["1.jpg"]], task="region-caption", return_tensors="pt"
    )
    ids = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    texts = loaded.processor.batch_decode(ids, skip_special_tokens=True)
    assert [row["caption"] for row in rows[:2]] == [text.strip() for text in texts]


def test_bad_images_and_boxes_are_left_out(loaded, source, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"nothing")
    count, faults = write_captions(loaded, source, str(tmp_path / "c.jsonl"), OPTIONS)
    assert count == 5 and list(faults) == ["broken.jpg"]
    boxes = {"1.jpg": [[30, 30, 20, 20]], "2.jpg": [[0, 0, 9, 9]]}
    count, faults = write_captions(loaded, source, str(tmp_path / "b.jsonl"), OPTIONS, boxes)
    assert count == 1 and "has no area" in faults["1.jpg"]


def test_boxes_go_on_behind_the_last_whole_image(loaded, source, tmp_path):
    boxes = {"0.jpg": [[0, 0, 9, 9]], "1.jpg": [[0, 0, 20, 20], [5, 5, 40, 30]]}
    write_captions(loaded, source, str(tmp_path / "whole.jsonl"), OPTIONS, boxes)
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    real, seen = captions.caption_boxes, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(captions, "caption_boxes", interrupted)
        write_captions(loaded, source, str(tmp_path / "c.jsonl"), OPTIONS, boxes)
    with open(tmp_path / "c.jsonl.unfinished", "a", encoding="utf-8") as file:
        file.write(whole[1] + "\n")  # the first of two boxes
    write_captions(loaded, source, str(tmp_path / "c.jsonl"), OPTIONS, boxes)
    assert (tmp_path / "c.jsonl").read_text().splitlines() == whole


@pytest.mark.parametrize("left", [b"", b'{"source'])
def test_a_run_that_was_killed_before_its_first_caption(left, loaded, source, tmp_path):
    (tmp_path / "c.jsonl.unfinished").write_bytes(left)
    assert write_captions(loaded, source, str(tmp_path / "c.jsonl"), OPTIONS)[0] == 5


def test_without_the_adapter_boxes_are_described_by_stage_1(processor, source, photos, tmp_path):
    loaded = LoadedModel("plain", make_model(processor), processor)
    boxes = {"1.jpg": [[0, 0, 20, 20]]}
    write_captions(loaded, source, str(tmp_path / "c.jsonl"), OPTIONS, boxes)
    with stage_1(loaded.model, processor) as own:
        image = [Image.open(photos / "1.jpg")]
        inputs = own(images=image, boxes=[boxes["1.jpg"]], task="region-caption", return_tensors="pt")
        assert (inputs["input_ids"] == own.tokenizer.convert_tokens_to_ids("[CAP]")).sum() == 1
        ids = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    caption = json.loads((tmp_path / "c.jsonl").read_text())["caption"]
    assert caption == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_an_interrupted_run_goes_on(loaded, checkpoint, source, tmp_path, monkeypatch):
    output = str(tmp_path / "c.jsonl")
    real, seen = captions.caption_batch, []

    def interrupted(loaded, images, options):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return real(loaded, images, options)

    monkeypatch.setattr(captions, "caption_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_captions(loaded, source, output, OPTIONS)
    partial = tmp_path / "c.jsonl.unfinished"
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"id": "torn')
    monkeypatch.setattr(captions, "caption_batch", real)
    with pytest.raises(ValueError, match="is of an interrupted run with another max_new_tokens"):
        write_captions(loaded, source, output, CaptionOptions(max_new_tokens=9))
    with pytest.raises(ValueError, match="with another dtype"):
        write_captions(LoadedModel.load(checkpoint, "cpu", "bfloat16"), source, output, OPTIONS)
    with FileLock(f"{partial}.lock"), pytest.raises(ValueError, match="Another run writes"):
        write_captions(loaded, source, output, OPTIONS)
    assert write_captions(loaded, source, output, OPTIONS)[0] == 5
    continued = (tmp_path / "c.jsonl").read_text()
    write_captions(loaded, source, str(tmp_path / "whole.jsonl"), OPTIONS)
    assert continued == (tmp_path / "whole.jsonl").read_text() and not partial.exists()


def test_the_best_of_drawn_captions_is_taken(loaded, source, photos, tmp_path):
    options = CaptionOptions(draws=6, max_new_tokens=4)
    for name in ("c.jsonl", "again.jsonl"):
        assert write_captions(loaded, source, str(tmp_path / name), options)[0] == 5
    assert (tmp_path / "c.jsonl").read_text() == (tmp_path / "again.jsonl").read_text()
    model, processor = loaded.model, loaded.processor
    model.disable_adapters()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        drawn = draw_captions_of(model, processor, Image.open(photos / "0.jpg").convert("RGB"), 6, max_new_tokens=4)
        scale = float(model.logit_scale.scale)
    model.enable_adapters()
    best = max(drawn, key=lambda one: scale * one.cosine + LIKELIHOOD_WEIGHT * one.likelihood)
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])["caption"] == best.text
    assert len({one.text for one in drawn}) > 1


@pytest.mark.parametrize(
    ("output", "boxes", "message"),
    [
        ("c.xml", None, r"c.xml must end in .jsonl, .csv, .json, or be 'txt'"),
        ("there.jsonl", None, "there.jsonl exists. Give another --output, or --overwrite"),
        ("c.json", {"1.jpg": []}, "COCO's caption results hold no boxes"),
        ("txt", {"1.jpg": []}, "'txt' is for whole images in a folder"),
    ],
)
def test_outputs_that_make_no_sense(output, boxes, message, loaded, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=message):
        write_captions(loaded, source, output, OPTIONS, boxes)
    assert (tmp_path / "there.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", "[1]", "is neither COCO's"),
        ("b.json", '{"annotations": [{"bbox": [1, 2]}], "images": []}', "is not as COCO's"),
        ("b.jsonl", '{"boxes": []}', "Line 1 of .*b.jsonl needs boxes and one of id, path"),
        ("b.jsonl", "{", "Line 1 of .*is not valid JSON"),
    ],
)
def test_files_of_boxes_that_are_none(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_boxes(str(tmp_path / name))
