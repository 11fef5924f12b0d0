"""Files of captions and references, as COCO and NoCaps have them."""

import json
import logging

import pytest

from mmgem.evaluation.caption_files import (
    read_caption_references,
    read_caption_results,
    score_captions,
    write_caption_results,
)
from mmgem.evaluation.captioning import best_constant_caption, bleu, cider_d, rouge_l


REFERENCES = {"1": ["a dog runs", "the dog"], "02": ["two cats sleep"], "x": ["a boat at night", "a red boat"]}
RESULTS = {"1": "a dog runs fast", "02": "two cats", "x": "a red boat at sea"}


def test_what_is_written_is_read(tmp_path):
    path = str(tmp_path / "captions.json")
    write_caption_results(path, list(RESULTS), list(RESULTS.values()))
    assert read_caption_results(path) == RESULTS
    assert [row["image_id"] for row in json.loads((tmp_path / "captions.json").read_text())] == [1, "02", "x"]


def test_scores_are_the_metrics_whatever_order_the_files_have():
    scores = score_captions(RESULTS, REFERENCES)
    captions = [RESULTS[image] for image in REFERENCES]
    assert scores["caption_cider"] == cider_d(captions, list(REFERENCES.values()))[0]
    assert scores["caption_bleu2"] == bleu(captions, list(REFERENCES.values()))[1]
    assert scores["caption_rouge_l"] == rouge_l(captions, list(REFERENCES.values()))[0]
    assert score_captions(dict(reversed(RESULTS.items())), REFERENCES) == scores


def test_domains_are_scored_each_by_its_own_references(tmp_path):
    domains = {"1": "in-domain", "02": "out-domain", "x": "out-domain"}
    images = [{"id": image, "domain": domain} for image, domain in domains.items()]
    annotations = [{"image_id": image, "caption": text} for image, of in REFERENCES.items() for text in of]
    (tmp_path / "nocaps.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    references, read_domains = read_caption_references(str(tmp_path / "nocaps.json"))
    assert (references, read_domains) == (REFERENCES, domains)
    scores = score_captions(RESULTS, references, read_domains)
    of_out = cider_d([RESULTS["02"], RESULTS["x"]], [REFERENCES["02"], REFERENCES["x"]])[0]
    assert scores["caption_cider_out_domain"] == of_out != scores["caption_cider"]
    assert "caption_cider_near_domain" not in scores


def test_references_of_karpathys_split(tmp_path):
    path = tmp_path / "dataset_coco.json"
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"{split} {k}"} for k in range(2)]}
        for i, split in enumerate(("train", "test", "val"))
    ]
    images[1]["cocoid"] = 42
    path.write_text(json.dumps({"images": images}))
    assert read_caption_references(str(path)) == ({"42": ["test 0", "test 1"]}, {})
    assert read_caption_references(str(path), "val") == ({"2.jpg": ["val 0", "val 1"]}, {})
    with pytest.raises(ValueError, match=r"dataset_coco\.json has no split dev; it has test, train, val"):
        read_caption_references(str(path), "dev")


def test_bad_files_name_the_offender(tmp_path, caplog):
    path = tmp_path / "captions.json"
    path.write_text("[{")
    for read in (read_caption_results, read_caption_references):
        with pytest.raises(ValueError, match=r"captions\.json is not valid JSON"):
            read(str(path))
    path.write_text('[{"image_id": 7, "caption": "a"}, {"image_id": "7", "caption": "b"}]')
    with pytest.raises(ValueError, match="several captions for 1 images, such as image_id 7"):
        read_caption_results(str(path))
    path.write_text('[{"image_id": 7, "caption": null}]')
    with pytest.raises(ValueError, match="no text as the caption of image_id 7"):
        read_caption_results(str(path))
    path.write_text('{"7": "a"}')
    with pytest.raises(ValueError, match="no list of image_id and caption"):
        read_caption_results(str(path))
    path.write_text('{"images": [{"id": 3}, {"id": 3}], "annotations": []}')
    with pytest.raises(ValueError, match="several images of the id 3"):
        read_caption_references(str(path))
    path.write_text('{"images": [{"id": 3}], "annotations": [{"image_id": 4, "caption": "a"}]}')
    assert read_caption_references(str(path)) == ({"3": []}, {}), "whatever is said about images that are not listed"
    path.write_text('{"images": [{"id": 3}], "annotations": [{"image_id": 3, "caption": null}]}')
    with pytest.raises(ValueError, match=r"captions\.json has None as a text about image 3"):
        read_caption_references(str(path))
    with pytest.raises(ValueError, match="1 captions have no references, such as that of image_id 9"):
        score_captions({**RESULTS, "9": "a dog"}, REFERENCES)
    with pytest.raises(ValueError, match="1 of 3 images have no caption, such as image_id x"):
        score_captions({"1": "a", "02": "b"}, REFERENCES)
    two = {image: REFERENCES[image] for image in ("1", "02")}
    results = {image: RESULTS[image] for image in two}
    assert score_captions(results, REFERENCES, subset=True) == score_captions(results, two)
    scores = score_captions({**RESULTS, "02": " "}, REFERENCES)
    assert "1 of 3 captions are empty" in caplog.text and scores["caption_empty"] == pytest.approx(1 / 3)


def test_cider_of_a_single_image_is_left_out_and_said(caplog):
    """Of all, and of a domain that has one: its n-grams are in every image that there is."""
    for name in ("mmgem", "mmgem.evaluation.captioning"):
        logging.getLogger(name).propagate = True
    scores = score_captions(RESULTS, REFERENCES, {"1": "in-domain", "02": "out-domain", "x": "out-domain"})
    assert "caption_cider_in_domain" not in scores and scores["caption_bleu1_in_domain"] >= 0
    assert "caption_cider_out_domain" in scores
    assert "CIDEr of in-domain is left out: it is undefined for a single image" in caplog.text
    one = score_captions({"1": RESULTS["1"]}, {"1": REFERENCES["1"]})
    assert "caption_cider" not in one and "caption_rouge_l" in one
    for function in (cider_d, lambda _, references: best_constant_caption(references)):
        with pytest.raises(ValueError, match="CIDEr is undefined for a single image"):
            function([RESULTS["1"]], [REFERENCES["1"]])
