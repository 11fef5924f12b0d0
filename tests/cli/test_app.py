"""`mmgem` as a user types it."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmgem.cli.app import app

from ..conftest import make_picture


LIBRARY = ("embed", "search", "caption", "serve")


@pytest.fixture
def mmgem(monkeypatch, tmp_path):
    """Runs a command in a folder of its own; returns its result with `.output` of both streams."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, list(map(str, arguments)), prog_name="mmgem")
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run


@pytest.fixture
def index(mmgem, checkpoint, photos):
    mmgem("embed", photos, "-o", "index", "--model", checkpoint, "--num_workers", 0)
    return "index"


def test_embed_search_and_caption(mmgem, index, checkpoint, photos, tmp_path):
    again = json.loads(mmgem("embed", photos, "-o", index, "--model", checkpoint, "--json").stdout)
    assert again == {"index": "index", "embedded": 0, "present": 5, "removed": 0, "left_out": {}}
    result = mmgem("search", "a dog", "--index", index, "--top", 3)
    assert re.search(r"1\s+-?\d\.\d{3}\s+photos/", result.stdout) and "5 images searched" in result.stdout
    assert Image.open("search.png").width > 3 * 168
    hits = json.loads(mmgem("search", "a dog", "--index", index, "--json", "--regions").stdout)["hits"]
    assert len(hits) == 5 and all(len(hit["box"]) == 4 for hit in hits)
    both = ["search", "--image", photos / "1.jpg", "--text", "but red", "--index", index, "--json", "-o", "both.png"]
    assert len(json.loads(mmgem(*both).stdout)["hits"]) == 5 and Path("both.png").exists()
    box = mmgem("search", "--image", photos / "1.jpg", "--box", "0,0,20,20", "--index", index, "--json")
    assert len(json.loads(box.stdout)["hits"]) == 5
    told = mmgem("caption", photos, "--model", checkpoint, "-o", "c.csv", "--max_new_tokens", 4)
    assert told.stdout == "5 captions: c.csv\n" and len(Path("c.csv").read_text().splitlines()) == 6


def test_left_out_images_are_counted_and_the_first_named(mmgem, checkpoint, photos):
    (photos / "broken.jpg").write_bytes(b"nothing")
    out = mmgem("embed", photos, "--model", checkpoint, "--num_workers", 0).stdout
    assert out.startswith("5 images embedded") and "1 left out (index/left_out.jsonl): broken.jpg: " in out
    out = mmgem("caption", photos, "--model", checkpoint, "--max_new_tokens", 3).stdout
    assert "1 left out: broken.jpg: " in out


def test_without_cropping(mmgem, checkpoint, photos):
    mmgem("embed", photos, "-o", "whole", "--model", checkpoint, "--no_do_center_crop", "--num_workers", 0)
    make_picture(4, (40, 60)).save("query.png")
    hits = json.loads(mmgem("search", "--image", "query.png", "--index", "whole", "--json").stdout)["hits"]
    assert hits[0]["id"] == "sub/4.PNG" and hits[0]["score"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["search", "a", "--index", "nowhere", "--model", "x"],
            "error: There is no index nowhere. Make one: mmgem embed",
        ),
        (["search", "a", "--index", "index", "--model", "photos"], "error: photos is no checkpoint"),
        (["search", "--index", "index"], "error: Search for a text, an image, or both"),
        (["search", "a", "--text", "b", "--index", "index"], "error: QUERY and --text are the same"),
        (
            ["search", "--image", "photos/1.jpg", "--box", "1,2", "--index", "index"],
            "error: --box must be four numbers",
        ),
        (["search", "--image", "missing.jpg", "--index", "index"], r"error: .*missing\.jpg"),
        (["search", "a", "--index", "index", "-o", "no/folder/s.png"], "error: .*no/folder/s.png"),
        (["embed", "empty", "--model", "CHECKPOINT"], "error: empty holds no images"),
        (
            ["embed", "bad", "-o", "new", "--model", "CHECKPOINT", "--num_workers", "0"],
            "error: No image can be read; a.jpg: ",
        ),
        (["embed", "photos", "--model", "CHECKPOINT", "-o", "photos/0.jpg"], "error: .*photos/0.jpg"),
        (["embed", "photos", "--model", "CHECKPOINT", "-o", "/proc/index"], "error: .*/proc/index"),
        (["embed", "photos", "--model", "CHECKPOINT", "--device", "gpu"], "error: There is no device 'gpu'"),
        (
            ["caption", "photos", "--model", "CHECKPOINT", "--rerank", "3", "--num_beams", "2", "-o", "d.csv"],
            "error: Captions are drawn of whole images, without beams",
        ),
        (["caption", "photos", "--model", "CHECKPOINT", "-o", "c.xml"], "error: c.xml must end in"),
        (["caption", "photos", "--model", "CHECKPOINT", "--boxes", "b.json"], "error: .*b.json"),
        (["serve"], "error: There is no outputs/scenes: run make demo, or give --index|error: The page needs Gradio"),
    ],
)
def test_errors_are_one_line(arguments, message, mmgem, index, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"nothing")
    result = mmgem(*(checkpoint if word == "CHECKPOINT" else word for word in arguments), code=1)
    line = str(result.exception)
    assert re.match(message, line) and "\n" not in line.strip() and "Traceback" not in result.output


def test_names_are_printed_as_they_are(mmgem, checkpoint, tmp_path):
    (tmp_path / "odd").mkdir()
    for i, name in enumerate(("IMG[final].jpg", "[red]b.jpg")):
        make_picture(i).save(tmp_path / "odd" / name)
    mmgem("embed", "odd", "--model", checkpoint, "--num_workers", 0)
    out = mmgem("search", "a dog", "--index", "index").stdout
    assert "odd/IMG[final].jpg" in out and "odd/[red]b.jpg" in out


def test_an_index_is_searched_from_another_folder(mmgem, checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(checkpoint).parent)
    folder = str(tmp_path / "index")
    assert CliRunner().invoke(app, ["embed", str(photos), "-o", folder, "--model", "model"]).exit_code == 0
    monkeypatch.chdir(tmp_path)
    mmgem("search", "a dog", "--index", "index")


def test_options_that_do_not_exist_are_corrected(mmgem):
    result = mmgem("search", "a", "--index", "index", "--tpo", "3", code=2)
    assert "--tpo" in result.output and "--top" in result.output


@pytest.mark.parametrize("command", LIBRARY)
def test_help_fits_a_screen_and_names_are_the_same_everywhere(command, mmgem):
    lines = mmgem(command, "--help").output.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    assert {"--model", "--device", "--dtype"} <= {*re.findall(r"--\w+", " ".join(lines))}


@pytest.mark.parametrize("command", ["train", "evaluate", "push"])
def test_scripts_are_commands_too(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, "--help"])
    text = result.output + capsys.readouterr().out
    assert result.exit_code == 0 and "--output_dir" in text and len(text.splitlines()) <= 55
    result = CliRunner().invoke(app, [command, "--outptu_dir", "x"])
    assert result.exit_code == 1 and "did you mean 'output_dir'?" in str(result.exception)


def test_interrupted_it_says_how_to_go_on(mmgem, index, checkpoint, photos, monkeypatch):
    from mmgem.library import captions

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(captions, "caption_batch", interrupted)
    result = mmgem("caption", photos, "--model", checkpoint, code=130)
    assert "interrupted; mmgem embed and mmgem caption go on where they stopped" in result.output
