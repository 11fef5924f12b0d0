"""Indexes that are built, brought up to date, interrupted, and built by several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmgem.library import Index, LoadedModel, SourceOptions, building
from mmgem.library.building import LEFT_OUT, PartWriter, build
from mmgem.library.sources import open_source
from mmgem.library.tables import part_files, read_vectors
from mmgem.output_lock import output_lock

from ..conftest import make_model, make_picture, write_shards
from .conftest import rows_of


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_vectors_are_those_of_get_embedding(form, workers, photos, loaded, tmp_path):
    report = build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded, form, batch_size=2, workers=workers)
    assert (report.embedded, report.present, report.removed, report.left_out) == (5, 0, 0, {})
    found = rows_of(tmp_path / "index")
    assert set(found) == {"0.jpg", "1.jpg", "2.jpg", "3.jpg", "sub/4.PNG"}
    for name, vector in found.items():
        inputs = loaded.processor(images=[str(photos / name)], return_tensors="pt")
        expected = loaded.model.get_embedding(**inputs)[0].detach().numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    table = pq.read_table(part_files(str(tmp_path / "index"))[0][0])
    assert set(table["model"].to_pylist()) == {loaded.name} and set(table["dimension"].to_pylist()) == {16}


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_second_run_adds_what_is_new_and_removes_what_is_gone_or_changed(form, photos, loaded, tmp_path):
    index = str(tmp_path / "index")
    build(SourceOptions(str(photos)), index, loaded, form)
    assert build(SourceOptions(str(photos)), index, loaded, form).embedded == 0
    make_picture(9).save(photos / "new.jpg")
    (photos / "0.jpg").unlink()
    make_picture(10).save(photos / "1.jpg")
    report = build(SourceOptions(str(photos)), index, loaded, form)
    assert (report.embedded, report.present, report.removed) == (2, 3, 2)
    found = rows_of(index)
    assert len(read_vectors(index)) == 5 and set(found) == {"1.jpg", "2.jpg", "3.jpg", "sub/4.PNG", "new.jpg"}
    inputs = loaded.processor(images=[str(photos / "1.jpg")], return_tensors="pt")
    np.testing.assert_allclose(found["1.jpg"], loaded.model.get_embedding(**inputs)[0].detach().numpy(), atol=1e-5)


def test_shards_are_not_embedded_twice(loaded, tmp_path):
    write_shards(tmp_path)
    options, index = SourceOptions(str(tmp_path / "{0..3}.tar")), str(tmp_path / "index")
    assert build(options, index, loaded).embedded == 48
    assert (second := build(options, index, loaded)).embedded == 0 and second.present == 48


def test_bad_files_are_skipped_counted_and_listed(photos, loaded, tmp_path):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no jpeg")
    (photos / "page.png").write_text("<html>")
    report = build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    assert report.embedded == 5 and set(report.left_out) == {"broken.jpg", "page.png"}
    listed = [json.loads(line) for line in (tmp_path / "index" / LEFT_OUT).read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in listed} == report.left_out
    assert "an HTML page; download the image itself" in report.left_out["page.png"]
    (photos / "broken.jpg").unlink()
    (photos / "page.png").unlink()
    build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    assert not (tmp_path / "index" / LEFT_OUT).exists()


def test_an_index_inside_of_its_folder_is_not_embedded(photos, loaded):
    index = Index.build(str(photos), str(photos / "index"), loaded)
    make_picture(0).save(photos / "index" / "sheet.png")
    assert build(SourceOptions(str(photos)), str(photos / "index"), loaded).embedded == 0 and len(index) == 5


def test_another_model_format_or_crop_is_refused_and_nothing_is_lost(photos, loaded, checkpoint, processor, tmp_path):
    index = str(tmp_path / "index")
    build(SourceOptions(str(photos)), index, loaded)
    before = rows_of(index)
    other = LoadedModel("other", make_model(processor, seed=1), loaded.processor)
    with pytest.raises(ValueError, match=r"was made by .*model with another value of weights"):
        build(SourceOptions(str(photos)), index, other)
    with pytest.raises(ValueError, match="with another value of format"):
        build(SourceOptions(str(photos)), index, loaded, "npy")
    with pytest.raises(ValueError, match="with another value of do_center_crop"):
        build(SourceOptions(str(photos)), index, LoadedModel.load(checkpoint, device="cpu", do_center_crop=False))
    (tmp_path / "foreign/vectors").mkdir(parents=True)
    pq.write_table(pq.read_table(part_files(index)[0][0]), tmp_path / "foreign/vectors/part-000000.parquet")
    with pytest.raises(ValueError, match="foreign holds vectors of another program"):
        build(SourceOptions(str(photos)), str(tmp_path / "foreign"), loaded)
    after = rows_of(index)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_two_runs_into_one_index(photos, loaded, tmp_path):
    with output_lock(str(tmp_path / "index")), pytest.raises(ValueError, match=r"is in use by process .*--output"):
        build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)


def test_another_source_does_not_wipe_the_first(photos, loaded, tmp_path):
    build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    other = tmp_path / "other"
    other.mkdir()
    make_picture(8).save(other / "8.jpg")
    with pytest.raises(ValueError, match=r"is an index of .*photos, and would lose its images"):
        build(SourceOptions(str(other)), str(tmp_path / "index"), loaded)
    assert len(read_vectors(str(tmp_path / "index"))) == 5


def test_an_emptied_folder_does_not_empty_the_index(photos, loaded, tmp_path):
    build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    for photo in photos.rglob("*.*"):
        if photo.is_file():
            photo.unlink()
    with pytest.raises(ValueError, match="photos holds no images"):
        build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    assert len(read_vectors(str(tmp_path / "index"))) == 5


def test_a_folder_that_cannot_be_listed_ends_the_run(photos, loaded, tmp_path, monkeypatch):
    index, real = str(tmp_path / "index"), os.scandir
    build(SourceOptions(str(photos)), index, loaded)

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="sub"):
        build(SourceOptions(str(photos)), index, loaded)
    assert len(read_vectors(index)) == 5


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_part_of_which_nothing_is_left_goes_away(form, photos, loaded, tmp_path):
    index = str(tmp_path / "index")
    build(SourceOptions(str(photos)), index, loaded, form)
    make_picture(9).save(photos / "new.jpg")
    build(SourceOptions(str(photos)), index, loaded, form)
    (photos / "new.jpg").unlink()
    assert build(SourceOptions(str(photos)), index, loaded, form).removed == 1
    assert len(read_vectors(index)) == 5 and len(part_files(index)) == 1


def test_an_npy_part_that_was_torn_apart_is_embedded_again(photos, loaded, tmp_path):
    """As a process leaves it that is killed between the two files of a part."""
    index = str(tmp_path / "index")
    build(SourceOptions(str(photos)), index, loaded, "npy")
    rows, _ = part_files(index)[0]
    pq.write_table(pq.read_table(rows).slice(0, 3), rows)
    with pytest.raises(ValueError, match="has 3 rows for 5 vectors"):
        read_vectors(index)
    assert build(SourceOptions(str(photos)), index, loaded, "npy").embedded == 5
    assert len(read_vectors(index)) == 5


def test_parts_of_seven_digits_are_counted_and_no_part_is_overwritten(photos, loaded, tmp_path):
    index = str(tmp_path / "index")
    build(SourceOptions(str(photos)), index, loaded)
    rows, _ = part_files(index)[0]
    os.rename(rows, rows.replace("part-000000", "part-1000000"))
    make_picture(9).save(photos / "new.jpg")
    build(SourceOptions(str(photos)), index, loaded)
    assert [os.path.basename(path) for path, _ in part_files(index)] == [
        "part-1000000.parquet",
        "part-1000001.parquet",
    ]
    with PartWriter(index, loaded.identity(), "parquet", 1000000) as writer:
        items = list(open_source(SourceOptions(str(photos))).items("0.jpg"))
        writer.add(items, np.ones((1, 16), np.float32))
    assert len(part_files(index)) == 3 and len(read_vectors(index)) == 7


def test_shards_are_the_same_by_any_path(loaded, tmp_path, monkeypatch):
    write_shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert build(SourceOptions("{0..3}.tar"), "index", loaded).embedded == 48
    assert build(SourceOptions(str(tmp_path / "{0..3}.tar")), "index", loaded).embedded == 0
    monkeypatch.chdir(tmp_path.parent)
    index = Index(str(tmp_path / "index"), loaded)
    assert index.image(index.search(text="a dog", top=1)[0]).size == (48, 40)


def test_a_changed_file_behind_a_path_of_a_table_is_embedded_again(photos, loaded, tmp_path):
    (tmp_path / "table.csv").write_text("image\nphotos/0.jpg\nphotos/1.jpg\n")
    options, index = SourceOptions(str(tmp_path / "table.csv")), str(tmp_path / "index")
    build(options, index, loaded)
    make_picture(11).save(photos / "1.jpg")
    report = build(options, index, loaded)
    assert (report.embedded, report.present, report.removed) == (1, 1, 1)


def test_large_photographs_have_the_vectors_of_get_embedding(loaded, tmp_path):
    """A JPEG may be decoded at a smaller size, but not below that to which it is resized."""
    loaded.processor.image_processor.size = {"shortest_edge": 40}
    make_picture(3, (320, 256)).save(tmp_path / "large.jpg", quality=95)
    (tmp_path / "photos").mkdir()
    os.rename(tmp_path / "large.jpg", tmp_path / "photos/large.jpg")
    build(SourceOptions(str(tmp_path / "photos")), str(tmp_path / "index"), loaded)
    inputs = loaded.processor(images=[str(tmp_path / "photos/large.jpg")], return_tensors="pt")
    expected = loaded.model.get_embedding(**inputs)[0].detach().numpy()
    found = rows_of(tmp_path / "index")["large.jpg"]
    assert float(found @ expected) > 0.995


def test_dropout_is_off_and_the_mode_stays(photos, loaded, tmp_path):
    build(SourceOptions(str(photos)), str(tmp_path / "eval"), loaded)
    loaded.model.language_model.train()
    build(SourceOptions(str(photos)), str(tmp_path / "train"), loaded)
    assert loaded.model.language_model.training
    expected, found = rows_of(tmp_path / "eval"), rows_of(tmp_path / "train")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_index_is_searched_in_another_precision(dtype, photos, checkpoint, tmp_path):
    low = LoadedModel.load(checkpoint, device="cpu", dtype=dtype)
    Index.build(str(photos), str(tmp_path / "index"), low)
    hits = Index(str(tmp_path / "index")).search(image=str(photos / "2.jpg"), top=1)
    assert hits[0].id == "2.jpg" and hits[0].score == pytest.approx(1, abs=0.02)


def test_a_full_disk_keeps_whole_parts_and_says_so(photos, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PART_ROWS", 2)
    write, calls = building.write_part, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(building, "write_part", full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left on device.*Make room"):
        build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded, batch_size=1)
    monkeypatch.setattr(building, "write_part", write)
    present = len(read_vectors(str(tmp_path / "index")))
    report = build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    assert present == 2 and report.present == 2 and report.embedded == 3


def test_a_torn_part_is_no_part(photos, loaded, tmp_path):
    build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)
    (tmp_path / "index/vectors/part-000007.parquet.unfinished").write_bytes(b"PAR1")
    assert len(read_vectors(str(tmp_path / "index"))) == 5
    (tmp_path / "index/vectors/part-000008.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part-000008.parquet cannot be read as a part of an index"):
        read_vectors(str(tmp_path / "index"))


def test_embeddings_that_are_not_finite_are_refused(photos, loaded, tmp_path):
    with torch.no_grad():
        loaded.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"The embedding of .*\.jpg holds NaN or infinity"):
        build(SourceOptions(str(photos)), str(tmp_path / "index"), loaded)


def test_sigkill_loses_one_part_at_most_and_repeats_nothing(photos, checkpoint, tmp_path):
    """A process that is killed behind its second part, and another run."""
    code = f"""
import sys, torch
from mmgem.library import LoadedModel, SourceOptions
from mmgem.library import building
building.PART_ROWS = 2
write = building.write_part
def slow(*args):
    write(*args)
    print(args[1], flush=True)
    if args[1] == 1:
        sys.stdin.read()  # until it is killed
building.write_part = slow
loaded = LoadedModel.load({checkpoint!r})
building.build(SourceOptions({str(photos)!r}), {str(tmp_path / "index")!r}, loaded, batch_size=1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert [process.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows_of(tmp_path / "index")
    files = {path: os.stat(path).st_mtime_ns for path, _ in part_files(str(tmp_path / "index"))}
    report = build(SourceOptions(str(photos)), str(tmp_path / "index"), LoadedModel.load(checkpoint, device="cpu"))
    assert len(before) == 4 and (report.embedded, report.present) == (1, 4)
    assert len(read_vectors(str(tmp_path / "index"))) == 5
    assert all(os.stat(path).st_mtime_ns == at for path, at in files.items())


def test_two_processes_share_the_work(checkpoint, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmgem"]
    command += [
        "embed",
        "scenes",
        "-o",
        str(tmp_path / "index"),
        "--model",
        checkpoint,
        "--num_workers",
        "0",
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["embedded"] == 500
    alone = Index.build("scenes", str(tmp_path / "alone"), LoadedModel.load(checkpoint, device="cpu"))
    both = rows_of(tmp_path / "index")
    expected = dict(zip(alone.vectors.ids.to_pylist(), np.concatenate(list(alone.vectors))))
    assert both.keys() == expected.keys() and len(part_files(str(tmp_path / "index"))) == 2
    np.testing.assert_allclose(np.stack([both[k] for k in expected]), np.stack(list(expected.values())), atol=1e-5)
