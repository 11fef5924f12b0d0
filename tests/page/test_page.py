"""The page, driven in a headless Chromium as a person would: `make test-page`."""

import os
import queue
import runpy
import shutil
from pathlib import Path

import pytest

from mmgem.library import Index, LoadedModel
from mmgem.library.captions import CaptionOptions, caption_image

from ..library.conftest import checkpoint, photos  # noqa: F401


pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture
def index(checkpoint, photos, tmp_path):  # noqa: F811
    return Index.build(str(photos), str(tmp_path / "index"), LoadedModel.load(checkpoint, device="cpu"))


@pytest.fixture
def boxes():
    """The boxes that reach a function of the page, which runs in a thread of the server."""
    return queue.Queue()


@pytest.fixture
def page(index, boxes, monkeypatch):
    from mmgem.page import app

    real = app._box_of

    def recorded(stage):
        box = real(stage)
        boxes.put(box)
        return box

    monkeypatch.setattr(app, "_box_of", recorded)
    blocks = app.build_page(index)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_port=0 or None, **app.APPEARANCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1100})
        failures = []
        tab.on("pageerror", lambda error: failures.append(str(error)))
        tab.goto(url)
        tab.wait_for_selector("#sentence textarea")
        yield tab
        browser.close()
    blocks.close()
    assert not failures


def search(tab, sentence):
    tab.fill("#sentence textarea", sentence)
    tab.click("#search")
    tab.wait_for_selector("#found button.thumbnail-item")


def choose_first(tab):
    tab.locator("#found button.thumbnail-item").first.click()
    tab.wait_for_selector("#stage img[src^='data:']")


def text_of(tab, place):
    """The caption box once it is filled."""
    tab.wait_for_function(f"() => document.querySelector('{place} textarea').value !== ''")
    return tab.input_value(f"{place} textarea")


def test_search_describe_point_and_search_with_a_box(page, index, boxes):
    search(page, "a dog on a beach")
    hits = index.search(text="a dog on a beach")
    labels = page.locator("#found button.thumbnail-item").all_inner_texts()
    assert (
        len(labels) == len(hits)
        and os.path.basename(hits[0].path) in labels[0]
        and f"{hits[0].score:.3f}" in labels[0]
    )
    assert "5 of 5 images" in page.inner_text("#status")

    choose_first(page)
    expected = caption_image(index.loaded, index.image(hits[0]), CaptionOptions())
    if expected:
        assert text_of(page, "#caption") == expected

    area = page.locator("#stage .stage").bounding_box()
    page.mouse.move(area["x"] + 0.25 * area["width"], area["y"] + 0.5 * area["height"])
    page.mouse.down()
    page.mouse.move(area["x"] + 0.75 * area["width"], area["y"] + 0.9 * area["height"], steps=4)
    page.mouse.up()
    page.click("#search-box")
    width, height = index.image(hits[0]).size
    drawn = boxes.get(timeout=60)
    assert drawn == pytest.approx([width / 4, height / 2, 0.75 * width, 0.9 * height], abs=1)
    page.click("#describe")
    assert boxes.get(timeout=60) == drawn

    page.fill("#where textarea", "a dog")
    page.click("#point")
    page.wait_for_selector("#map img")


def test_the_space_serves_the_same_page(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    import gradio

    served = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", checkpoint)
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: served.append((page, options)))
    runpy.run_path(str(Path(__file__).parents[2] / "examples/space/app.py"), run_name="__main__")
    ((page, options),) = served
    assert "500 images" in str(page.config["components"]) and {"theme", "css"} <= options.keys()


def test_what_is_missing_is_said(page):
    page.click("#search")
    page.wait_for_selector("text=Search for a text, an image, or both.")
    page.click("#point")
    page.wait_for_selector("text=Write a sentence to look for.")
    page.fill("#where textarea", "a dog")
    page.click("#point")
    page.wait_for_selector("text=Click a result first.")


def test_an_image_that_goes_away_is_left_out(page, index):
    search(page, "snow")
    hit = index.search(text="snow")[0]

    os.remove(hit.path)
    page.locator("#found button.thumbnail-item").first.click()
    page.wait_for_selector("text=This image is not there any more.")
    page.click("#search")
    page.wait_for_selector("text=4 of 5 images; 1 are not there any more")
