"""What the processor makes of good input, and what it says to bad."""

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMProcessor, PoolAggregator
from mmgem.processing import set_image_size, to_mmgem_tokenizer
from mmgem.processing.images_mmgem import to_rgb
from mmgem.processing.regions_mmgem import geometry_of
from tests.conftest import make_picture


def tokens(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_texts_end_in_emb_and_prompts_do_not(processor):
    text = processor(text=["a dog"])["input_ids"][0]
    assert tokens(processor, text)[0] == "<s>" and tokens(processor, text)[-1] == "[EMB]"
    prompt = processor(images=[make_picture(0)], task="caption")["input_ids"][0]
    assert tokens(processor, prompt) == ["<s>", "<image>", "[CAP]"]
    # The pipelines call the tokenizer alone.
    assert processor.tokenizer("a dog")["input_ids"] == text
    cut = processor.tokenizer("a dog on a beach", truncation=True, max_length=4)["input_ids"]
    assert len(cut) == 4 and tokens(processor, cut)[-1] == "[EMB]"


@pytest.mark.parametrize(
    "special, bos",
    [
        ({"bos_token": "<s>"}, "<s>"),
        ({}, "</s>"),
        ({"bos_token": "<s>", "unk_token": "<|endoftext|>"}, "<|endoftext|>"),  # SmolLM2-Instruct
        ({"pad_token": "<|endoftext|>"}, "<|endoftext|>"),  # Qwen
    ],
)
def test_texts_start_with_bos_even_if_the_tokenizer_writes_none(base_tokenizer, special, bos):
    from tokenizers.processors import ByteLevel, TemplateProcessing

    plain = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer.backend_tokenizer, eos_token="</s>", **special)
    plain.backend_tokenizer.post_processor = ByteLevel()
    assert plain("dog")["input_ids"][0] not in plain.all_special_ids
    processor = MMGEMProcessor(CLIPImageProcessorPil(), to_mmgem_tokenizer(plain))
    assert processor.bos == bos
    assert processor.tokenizer.pad_token == special.get("pad_token", "<pad>")
    text = tokens(processor, processor(text=["dog"])["input_ids"][0])
    assert text[0] == bos and bos not in text[1:]
    prompt = processor(images=[make_picture(0)], task="caption")["input_ids"][0]
    assert tokens(processor, prompt) == [bos, "<image>", "[CAP]"]
    # A processor that was saved without BOS goes on without.
    emb = ("[EMB]", processor.tokenizer.convert_tokens_to_ids("[EMB]"))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A [EMB]", special_tokens=[emb])
    older = MMGEMProcessor(CLIPImageProcessorPil(), processor.tokenizer)
    prompt = older(images=[make_picture(0)], task="caption")["input_ids"][0]
    assert older.bos == "" and tokens(processor, prompt) == ["<image>", "[CAP]"]


def test_tokenizer_without_eos_is_refused(base_tokenizer):
    endless = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(ValueError, match="no EOS token"):
        to_mmgem_tokenizer(endless)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "CMYK"])
def test_a_path_gives_the_pixels_that_its_picture_gives(processor, tmp_path, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48))
    else:
        picture = make_picture(0).convert(mode)
    if mode == "RGBA":
        picture.putalpha(100)
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    picture.save(path)
    expected = processor(images=[picture], return_tensors="np")["pixel_values"]
    for image in (path, str(path)):
        assert np.array_equal(processor(images=[image], return_tensors="np")["pixel_values"], expected)


def test_truncated_picture_is_named(processor, tmp_path):
    make_picture(0).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for half in (tmp_path / "half.png", Image.open(tmp_path / "half.png")):
        with pytest.raises(ValueError, match=r"images\[1\] could not be read"):
            processor(images=[tmp_path / "whole.png", half])
    with pytest.raises(ValueError, match=r"images\[0\] could not be read: .*No such file.*gone\.png"):
        processor(images=[tmp_path / "gone.png"])


def test_unknown_options_and_regions_under_another_geometry_are_refused(processor):
    with pytest.raises(ValueError, match=r"'do_resiz'.*'do_resize'"):
        processor(images=[make_picture(0)], do_resiz=False)
    with pytest.raises(ValueError, match="text must be a str or a list of them, got int"):
        processor(text=5)
    assert len(processor(text=np.array(["a dog", "cat"]))["input_ids"]) == 2
    with pytest.raises(ValueError, match=r"'max_lenght'.*'max_length'"):
        processor(text=["a dog"], max_lenght=7)
    with pytest.raises(ValueError, match="'do_resize' cannot change in a call with boxes"):
        processor(images=[make_picture(0)], boxes=[[[0, 0, 9, 9]]], do_resize=False)
    assert processor(images=[make_picture(0)], do_normalize=False)["pixel_values"][0].min() >= 0


def test_saved_and_loaded_processor_is_the_same(processor, tmp_path):
    processor.max_length = 17
    try:
        processor.save_pretrained(tmp_path)
    finally:
        processor.max_length = 50
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MMGEMProcessor and loaded.max_length == 17
    picture = make_picture(0)
    for inputs in ({"text": ["a dog on a beach"]}, {"images": [picture]}, {"images": [picture], "task": "caption"}):
        a, b = processor(**inputs, return_tensors="pt"), loaded(**inputs, return_tensors="pt")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_tokenizer_that_lost_emb_is_refused(processor, base_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"does not end a text with \[EMB\].*to_mmgem_tokenizer"):
        MMGEMProcessor(processor.image_processor, base_tokenizer)


def test_long_text_is_cut_before_emb_with_one_warning_and_a_count(processor, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    module_logger = logging.getLogger("mmgem.processing.processing_mmgem")
    module_logger.propagate = True
    texts = ["a dog", "a dog on a beach " * 5, "the cat sat on the mat " * 6]
    inputs = processor(text=texts, max_length=10, return_tensors="pt")
    assert inputs["input_ids"].shape == (3, 10)
    assert (inputs["input_ids"][1:, -1] == processor.tokenizer.convert_tokens_to_ids("[EMB]")).all()
    warnings = [record for record in caplog.records if "max_length" in record.message]
    assert len(warnings) == 1 and "2 of 3" in warnings[0].message and "text[1]" in warnings[0].message


def test_special_tokens_spelled_out_in_a_sentence_are_letters(processor):
    ids = processor(text=["a [EMB] b </s>"])["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("[EMB]")) == 1
    assert processor.tokenizer.eos_token_id not in ids


def test_prompts_take_text_before_the_picture_and_behind_cap(processor):
    pictures = [make_picture(0), make_picture(1)]
    behind = processor(images=pictures, text="a photo of", task="caption")["input_ids"]
    assert tokens(processor, behind[0])[:3] == ["<s>", "<image>", "[CAP]"]
    assert processor.decode(behind[1], skip_special_tokens=True) == "a photo of"
    before = processor(images=pictures[:1], text="look: <image>")["input_ids"][0]
    assert tokens(processor, before)[-2:] == ["<image>", "[CAP]"] and tokens(processor, before)[0] == "<s>"
    ragged = processor(images=pictures, text=["a", "a photo of a dog"], task="caption", return_tensors="pt")
    assert ragged["input_ids"][0, 0] == processor.tokenizer.pad_token_id and ragged["attention_mask"][0, 0] == 0


def test_region_prompts(processor):
    boxes = [[[0, 0, 20, 20]], [[0, 0, 48, 40], [10, 10, 30, 30]]]
    inputs = processor(
        images=[make_picture(0), make_picture(1)], boxes=boxes, task="region-caption", return_tensors="pt"
    )
    assert inputs["input_ids"].shape == (3, 1 + 1 + 64)
    assert inputs["boxes"].shape == (2, 2, 4) and inputs["region_mask"].tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "LA", "1", "F"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.linear_gradient("L").resize((32, 32))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "RGBA":
        picture = Image.merge("RGBA", (grey, grey, grey, Image.new("L", grey.size, 255)))
    else:
        picture = grey.convert(mode)
    rgb = to_rgb(picture)
    assert rgb.mode == "RGB"
    if mode not in ("1", "CMYK"):
        assert np.abs(np.asarray(rgb, dtype=int)[..., 0] - np.asarray(grey, dtype=int)).max() <= 2


def test_transparent_pixels_are_white_and_exif_is_honoured(tmp_path):
    assert to_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    picture = make_picture(0, (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = to_rgb(Image.open(tmp_path / "turned.png"))
    assert turned.size == (20, 30)
    assert np.array_equal(np.asarray(turned), np.asarray(picture.rotate(-90, expand=True)))


@pytest.mark.parametrize("size", [(48, 40), (40, 64), (32, 32), (101, 57)])
def test_boxes_survive_resize_and_crop(processor, size):
    """A picture that is white inside the box: so is `pixel_values`, and black outside, up to the blur of resizing."""
    width, height = size
    box = [width * 0.3, height * 0.25, width * 0.7, height * 0.8]
    array = np.zeros((height, width, 3), dtype=np.uint8)
    x0, y0, x1, y1 = (round(v) for v in box)
    array[y0:y1, x0:x1] = 255
    inputs = processor(images=[Image.fromarray(array)], boxes=[[[x0, y0, x1, y1]]], return_tensors="pt")
    left, top, right, bottom = inputs["boxes"][0, 0].round().int().tolist()
    bright = inputs["pixel_values"][0, 0]
    bright = (bright - bright.min()) / (bright.max() - bright.min())
    assert bright[top + 1 : bottom - 1, left + 1 : right - 1].min() > 0.6
    outside = bright.clone()
    outside[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = 0
    assert outside.max() < 0.4
    masks = processor(images=[Image.fromarray(array)], masks=[[array[..., 0] > 0]], return_tensors="pt")["masks"]
    assert masks.shape == (1, 1, 32, 32)
    agreement = (masks[0, 0] == (bright > 0.5)).float().mean()
    assert agreement > 0.93


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(24, 160), st.integers(24, 160)),
    corner=st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)),
    extent=st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)),
    seed=st.integers(0, 5),
)
def test_box_holds_what_cutting_the_picture_by_hand_holds(processor, size, corner, extent, seed):
    """Mean colour of the box in `pixel_values`, against the part of it inside the middle square, cut from the file."""
    width, height = size
    picture = make_picture(seed, size)
    x0, y0 = corner[0] * width, corner[1] * height
    x1, y1 = min(x0 + extent[0] * width, width), min(y0 + extent[1] * height, height)
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    kept = (max(x0, left), max(y0, top), min(x1, left + side), min(y1, top + side))
    if min(kept[2] - kept[0], kept[3] - kept[1]) < side / 16:  # a pixel or two of 32: nothing to compare
        return
    inputs = processor(images=[picture], boxes=[[[x0, y0, x1, y1]]], return_tensors="pt")
    by_hand = (np.array(kept) - [left, top, left, top]) * 32 / side
    assert np.allclose(inputs["boxes"][0, 0], by_hand, atol=1.0), "sizes and offsets are rounded to whole pixels"
    # The part of the file that these pixels of the input show: the longer side and the crop are whole pixels.
    resized = [32 * length // side for length in size]
    scale = np.tile(np.array(resized) / size, 2)
    crop = np.tile([(length - 32) // 2 for length in resized], 2)
    box = inputs["boxes"][0, 0].numpy().astype(float)
    shown = ((box + crop) / scale).clip(0, [width, height, width, height])
    patch = picture.resize((1, 1), Image.Resampling.BOX, box=tuple(shown))
    expected = np.asarray(patch).reshape(3) / 255
    weights = PoolAggregator(1).weights_of_boxes(inputs["boxes"], (32, 32))[0, 0]
    mean = (inputs["pixel_values"][0].flatten(1) @ weights).numpy()
    image_processor = processor.image_processor
    mean = mean * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    assert np.allclose(mean, expected, atol=0.06)


def test_geometry_equals_the_image_processor(processor):
    geometry = geometry_of(processor.image_processor, 48, 40)
    assert geometry.resized == (38, 32) and geometry.offset == (3, 0) and geometry.window == (32, 32)


def test_partly_outside_is_clipped(processor):
    square = make_picture(0, (32, 32))
    boxes = processor(images=[square], boxes=[[[-5, -5, 10, 12]]], return_tensors="pt")["boxes"]
    assert boxes[0, 0].tolist() == [0, 0, 10, 12]


PICTURE = make_picture(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass text, images, or both"),
        ({"text": []}, "empty list"),
        ({"text": [""]}, r"text\[0\] of this call is empty, ''"),
        ({"text": ["a", " "]}, r"text\[1\] of this call is empty, ' '"),
        ({"text": ["a", 3]}, r"text\[1\] must be a str"),
        ({"images": []}, "empty list"),
        ({"images": [PICTURE], "task": "describe"}, "'describe'.*'caption'"),
        ({"text": ["a"], "task": "caption"}, "there are none: pass images"),
        ({"images": [PICTURE], "text": ["a", "b"], "task": "caption"}, "2 prompts for 1 images"),
        ({"images": [PICTURE], "text": "<image><image>"}, "2 <image>, but a caption is of one image"),
        ({"images": [PICTURE], "task": "region-caption"}, "needs boxes or masks"),
        ({"images": [PICTURE], "boxes": [[[0, 0, float("nan"), 5]]]}, r"boxes\[0\]\[0\].*finite"),
        ({"images": [PICTURE], "boxes": [[[0, 0, 5, 5], [9, 0, 5, 5]]]}, r"boxes\[0\]\[1\].*no area"),
        ({"images": [PICTURE], "boxes": [[[3, 3, 3, 9]]]}, r"boxes\[0\]\[0\].*no area"),
        ({"images": [PICTURE], "boxes": [[[60, 60, 70, 70]]]}, r"boxes\[0\]\[0\].*outside"),
        ({"images": [PICTURE], "boxes": [[[0, 0, 2, 2]]]}, r"boxes\[0\]\[0\].*crop"),
        ({"images": [PICTURE], "boxes": [[[0, 0, 5]]]}, r"boxes\[0\]\[0\].*four"),
        ({"images": [PICTURE], "boxes": [None]}, r"boxes\[0\] must be the list of boxes of an image, got None"),
        ({"images": [PICTURE], "boxes": [0, 0, 5, 5]}, r"boxes\[0\] must be the list of boxes of an image, got 0"),
        ({"images": [PICTURE], "boxes": []}, "0 images, but there are 1"),
        ({"images": [PICTURE], "boxes": [[]]}, "no region"),
        ({"boxes": [[[0, 0, 5, 5]]], "text": ["a"]}, "pass images"),
        ({"images": [PICTURE], "masks": [[np.ones((3, 3))]]}, r"masks\[0\]\[0\].*\(40, 48\)"),
        ({"images": [PICTURE], "masks": [[np.zeros((40, 48))]]}, r"masks\[0\]\[0\] is empty"),
        ({"images": [PICTURE], "boxes": [[]], "masks": [[]]}, "not both"),
        ({"images": ["/nowhere/picture.png"]}, r"images\[0\] could not be read"),
    ],
)
def test_bad_input_is_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_options_sorted_by_modality_mean_the_same(processor):
    text, picture = ["a dog on a beach with two people"], make_picture(0)
    nested = processor(
        text=text,
        images=picture,
        text_kwargs={"max_length": 4, "truncation": True},
        images_kwargs={"do_normalize": False},
        audio_kwargs={"padding": True},
        videos_kwargs={},
        common_kwargs={"return_tensors": "pt"},
    )
    flat = processor(
        text=text, images=[[picture]], max_length=4, truncation=True, do_normalize=False, return_tensors="pt"
    )
    assert nested.keys() == flat.keys() and nested["input_ids"].shape == (1, 4)
    assert all(torch.equal(nested[name], flat[name]) for name in flat)
    with pytest.raises(ValueError, match="not audio"):
        processor(text=text, audio=[0.0])
    with pytest.raises(ValueError, match=r"Unknown option 'image_kwargs'"):
        processor(text=text, image_kwargs={})


def test_a_chat_is_its_picture_and_its_words(processor):
    pictures = [make_picture(0), make_picture(1)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a photo of"}]}]
        for picture in pictures
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor(images=pictures, text=["<image>a photo of"] * 2, return_tensors="pt")
    found = processor.apply_chat_template(chats, **options)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    prefilled = [chats[0][0] | {"content": chats[0][0]["content"][:1]}, {"role": "assistant", "content": "a photo of"}]
    found = processor.apply_chat_template(prefilled, continue_final_message=True, **options)
    assert torch.equal(found["input_ids"], expected["input_ids"][:1])


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_geometry_survives_the_cast_of_images(processor, kind):
    """`inputs.to(torch.bfloat16)`, as every example of transformers has it; bfloat16 knows 300 and 302."""
    processor = copy.deepcopy(processor)
    set_image_size(processor.image_processor, 512)
    image = make_picture(0, (512, 512))
    mask = np.zeros((512, 512), dtype=bool)
    mask[301:400, 7:301] = True
    regions = {"boxes": [[[301, 33, 437, 511]]], "masks": [[mask]]}[kind]
    inputs = processor(images=[image], return_tensors="pt", **{kind: regions})
    expected = inputs[kind].clone()
    cast = inputs.to("cpu", torch.bfloat16)
    assert cast["pixel_values"].dtype == torch.bfloat16 and torch.equal(cast[kind], expected)
    if kind == "boxes":
        assert cast["boxes"][0, 0].tolist() == [301, 33, 437, 511]
        assert inputs.to(dtype=torch.float16)["boxes"].dtype == torch.float32


@pytest.mark.parametrize("return_tensors", ["np", None])
def test_a_batch_without_tensors_can_be_moved(processor, return_tensors):
    inputs = processor(images=[make_picture(0)], boxes=[[[3, 3, 30, 30]]], return_tensors=return_tensors)
    boxes = inputs["boxes"]
    assert np.array_equal(inputs.to(torch.bfloat16)["boxes"], boxes)
    assert np.array_equal(inputs.to("cpu")["boxes"], boxes)


@pytest.mark.parametrize("length", [0, -1, 2, 2.5])
def test_a_max_length_that_holds_no_prompt_is_refused(processor, length):
    with pytest.raises(ValueError, match="max_length must be an integer of at least 3"):
        processor(images=[make_picture(0)], task="caption", max_length=length)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 3"):
        processor(images=[make_picture(0)], task="caption", max_length=length, truncation=False)


def test_a_prompt_is_never_truncated_without_a_word(processor):
    options = {"images": [make_picture(0)], "text": ["the cat sat on"], "task": "caption"}
    expected = processor(**options)["input_ids"]
    for truncation in (True, "longest_first", None):
        with pytest.raises(ValueError, match=rf"A prompt has {len(expected[0])} tokens, but max_length is 4"):
            processor(**options, max_length=4, truncation=truncation)
    assert processor(**options, max_length=4, truncation=False)["input_ids"] == expected
    assert processor(**options, max_length=len(expected[0]), truncation=True)["input_ids"] == expected
    padded = processor(**options, max_length=20, padding="max_length")["input_ids"]
    assert len(padded[0]) == 20 and padded[0][-len(expected[0]) :] == expected[0]
    regions = {"boxes": [[[3, 3, 30, 30]]], "task": "region-caption", "truncation": True}
    assert len(processor(images=[make_picture(0)], **regions)["input_ids"][0]) > processor.max_length
