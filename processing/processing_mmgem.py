"""The processor of MM-GEM: texts, prompts, images and regions to the inputs of the model."""

import difflib
import sys
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import logging

from ..configuration.hub_options_mmgem import checked_hub_options
from .chat_mmgem import CHAT_TEMPLATE, around_image
from .image_processors_mmgem import check_moments, load_image_processor
from .images_mmgem import is_one_image, read_image, with_one_scale
from .regions_mmgem import MMGEMBatchFeature, map_regions
from .tokenization_mmgem import (
    CAP_TOKEN,
    EMB_TOKEN,
    IMAGE_TOKEN,
    as_sentence,
    ends_with_emb,
    starts_with_bos,
    to_mmgem_tokenizer,
)


logger = logging.get_logger(__name__)

TASKS = ("embed", "caption", "region-caption", "score")
TEXT_KWARGS = ("max_length", "truncation", "padding", "padding_side")
GEOMETRY_KWARGS = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size")
KWARGS_BY_MODALITY = ("text_kwargs", "images_kwargs", "common_kwargs", "audio_kwargs", "videos_kwargs")


class MMGEMProcessor(ProcessorMixin):
    """
    A tokenizer that ends texts with [EMB], an image processor, and the regions between them.

    Args:
        image_processor: of the vision tower.
        tokenizer: from [`to_mmgem_tokenizer`].
        chat_template (`str`, *optional*): by default the texts of a chat, with `<image>` for its image.
        max_length (`int`, *optional*, defaults to 50): tokens of a text, BOS and [EMB] included (paper: 50
            in training, 200 for long captions at test time); at least 3.
        image_grid_size, region_grid_size (`int`, *optional*, default to 1 and 7): k of whole images and of regions, as
            in [`MMGEMConfig`].
        num_soft_prompts (`int`, *optional*, defaults to 64): as in [`MMGEMConfig`].

    Raises:
        ValueError: for a tokenizer that does not end texts with [EMB]; for a length or size that is too small; for an
            image processor that would make pixels infinite.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        max_length: int = 50,
        image_grid_size: int = 1,
        region_grid_size: int = 7,
        num_soft_prompts: int = 64,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        if not ends_with_emb(tokenizer):
            raise ValueError(
                f"This tokenizer does not end a text with {EMB_TOKEN}, so no sentence embedding could be read. It was "
                "probably loaded with add_bos_token or add_eos_token, or saved by hand. Load it without these, or "
                "convert it with mmgem.processing.to_mmgem_tokenizer."
            )
        self.bos = tokenizer.bos_token if starts_with_bos(tokenizer) else ""
        self.max_length = self.checked_length(max_length)
        self.image_grid_size = _at_least_one("image_grid_size", image_grid_size)
        self.region_grid_size = _at_least_one("region_grid_size", region_grid_size)
        self.num_soft_prompts = _at_least_one("num_soft_prompts", num_soft_prompts)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        check_moments(image_processor)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        image_size: int | None = None,
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The processor that belongs to [`MMGEMModel.from_vision_text_pretrained`]: mean, std and resampling of the
        vision checkpoint, the vocabulary of the text checkpoint.

        Args:
            vision, text (`str`): Hub ids or folders.
            image_size (`int`, *optional*): pixels per side, if it is not the checkpoint's.
            vision_kwargs, text_kwargs (`dict`, *optional*): as of the model.
            **kwargs: of the constructor.
        """
        vision_kwargs = checked_hub_options(vision_kwargs, "vision_kwargs")
        text_kwargs = checked_hub_options(text_kwargs, "text_kwargs")
        tokenizer = to_mmgem_tokenizer(AutoTokenizer.from_pretrained(text, **text_kwargs))
        return cls(load_image_processor(vision, image_size, **vision_kwargs), tokenizer, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values", "boxes", "masks", "region_mask", "image_embeds"]
        return [*names, "labels"]

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        boxes: Sequence[Sequence[Sequence[float]]] | None = None,
        masks: Sequence[Sequence[Any]] | None = None,
        image_embeds: Any = None,
        task: str | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Without a task, texts are sentences to embed, beside images or not (as in CLIP). With a task, or if every text
        of a call with images holds `<image>`, it writes prompts for `generate`; with "embed", texts around images.

        A text is letters, whatever it spells: `<image>` is a placeholder in a chat template, and in a call with images
        and without a task in which every text holds it. White space around a text and NUL are removed.

        Args:
            images: an image or a list of them (or of lists of them): PIL images, paths, URLs, bytes, `datasets`'
                `{"bytes", "path"}`, arrays or tensors (`(height, width, 3)` or `(3, height, width)`; floats from 0 to
                1), or a batch of these. Transparency becomes white, except behind a URL, which transformers reads and
                makes black.
            text (`str` or list of `str`): sentences; with a task, the beginning of the caption, behind [CAP]; without
                one, a prompt may also have text before its `<image>`.
            boxes: per image a list of `[x0, y0, x1, y1]` in pixels of the original image (upright, after EXIF).
            masks: per image a list of `(height, width)` arrays, 0 outside the region and 1 inside; instead of boxes.
            image_embeds: `(B, D)`, instead of images for `task="caption"`: see [`MMGEMModel.generate`].
            task (`str`, *optional*): "caption" (one prompt per image: k x k placeholders and [CAP]), "region-caption"
                (one per region: k x k placeholders and 64 [CAP]), "embed" (each text with its image, as one query), or
                "score": prompts of the images, or of the regions if there are any, and the texts as `labels` `(N, T)`,
                -100 behind their ends, for [`MMGEMModel.score`].
            return_tensors (`str`, *optional*): "pt" or "np".
            **kwargs: `max_length` (None: the processor's own), `truncation` (True truncates long texts without a
                warning, False leaves them; too long a prompt is refused), `padding`, `padding_side` for texts; options
                of the image processor, with boxes or masks only those that do not move pixels. Also sorted into
                `text_kwargs`, `images_kwargs` and `common_kwargs`, as in transformers.

        Returns:
            `BatchFeature` with those of `model_input_names` for which there is input.

        Raises:
            ValueError: nothing to process, an empty text, an unknown task or option, an image that cannot be read,
                images and prompts that do not match, or an invalid region (with its index).
        """
        if isinstance(text, bytes | dict) or (text is not None and not hasattr(text, "__iter__")):
            raise ValueError(f"text must be a str or a list of them, got {type(text).__name__}.")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        kwargs = _flatten_options(kwargs)
        return_tensors = kwargs.pop("return_tensors", return_tensors)
        self._check_texts(texts, images if image_embeds is None else image_embeds, task)
        text_kwargs: dict[str, Any] = {name: kwargs.pop(name) for name in TEXT_KWARGS if name in kwargs}
        self._check_image_kwargs(kwargs, boxes is not None or masks is not None)
        data: dict[str, Any] = {}
        images = self._load_images(images)
        if images:
            data.update(self.image_processor(images, return_tensors="np", **kwargs))
        if boxes is not None or masks is not None:
            data.update(self._regions(images, boxes, masks))
        if image_embeds is not None:
            if task != "caption" or images:
                raise ValueError('image_embeds stand for the images of task="caption". Leave out images.')
            data["image_embeds"] = image_embeds
        if task == "embed":
            if len(texts or []) != len(images):
                raise ValueError(f'task="embed" takes one image per text, got {len(images)} for {len(texts or [])}.')
            if "region_mask" in data:
                raise ValueError('task="embed" takes whole images. Leave out boxes and masks.')
            data.update(self._sentences(texts or [], text_kwargs, self.visual_placeholders))
        elif task is not None:
            prompts = [("", sample) for sample in texts or [""]]
            if task == "score":
                data["labels"] = self._labels(texts or [], text_kwargs)
                prompts, task = [("", "")], "region-caption" if "region_mask" in data else "caption"
            number = len(images if image_embeds is None else image_embeds)
            data.update(self._prompts(prompts, number, data.get("region_mask"), task, text_kwargs))
        elif texts is not None and images and all(IMAGE_TOKEN in sample for sample in texts):
            prompts = [around_image(sample, i) for i, sample in enumerate(texts)]
            data.update(self._prompts(prompts, len(images), None, "caption", text_kwargs))
        elif texts is not None:
            data.update(self._sentences(texts, text_kwargs))
        return MMGEMBatchFeature(data, tensor_type=return_tensors)

    @property
    def visual_placeholders(self) -> list[str]:
        """The tokens that a whole image becomes."""
        return [IMAGE_TOKEN] * self.image_grid_size**2

    @property
    def image_prompt(self) -> list[str]:
        """The tokens between BOS and the caption of a whole image."""
        return [*self.visual_placeholders, CAP_TOKEN]

    @property
    def region_prompt(self) -> list[str]:
        """The tokens between BOS and the caption of a region."""
        return [IMAGE_TOKEN] * self.region_grid_size**2 + [CAP_TOKEN] * self.num_soft_prompts

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest caption with its prompt: a sentence of `max_length` has [EMB] where this has EOS."""
        return self.max_length + len(self.image_prompt)

    def sentence_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids "(BOS) text [EMB]" of each text, not truncated; training and evaluation read texts by it too."""
        return self.tokenizer(list(map(as_sentence, texts)), split_special_tokens=True, verbose=False)["input_ids"]

    def with_opening(self, sentences: Sequence[list[int]], opening: Sequence[str]) -> list[list[int]]:
        """Token ids of sentences ([`sentence_ids`]) with these tokens behind BOS."""
        start, ids = int(bool(self.bos)), self.tokenizer.convert_tokens_to_ids(list(opening))
        return [[*row[:start], *ids, *row[start:]] for row in sentences]

    def caption_ids(self, sentences: Sequence[list[int]], max_length: int) -> list[list[int]]:
        """
        The tokens of captions with EOS, from those of sentences ([`sentence_ids`]). A truncated caption does not end
        where it is cut, so it has no EOS.
        """
        start, eos = int(bool(self.bos)), self.tokenizer.eos_token_id
        return [row[start : max_length - 1] if len(row) > max_length else [*row[start:-1], eos] for row in sentences]

    def checked_length(self, max_length: Any) -> int:
        """Returns `max_length`. Raises ValueError if it has no room for a token beside BOS and [EMB]."""
        least = 3 if self.bos else 2
        if not isinstance(max_length, Integral) or isinstance(max_length, bool) or max_length < least:
            raise ValueError(
                f"max_length must be an integer of at least {least} ({'BOS, ' if self.bos else ''}a token and "
                f"{EMB_TOKEN}), got {max_length!r}."
            )
        return int(max_length)

    def _check_texts(self, texts: list[str] | None, images: Any, task: str | None) -> None:
        if task is not None and task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(map(repr, TASKS))}, or None to embed.")
        if texts is None and images is None:
            raise ValueError("Nothing to process: pass text, images, or both.")
        if task is not None and images is None:
            raise ValueError(f"task={task!r} needs images, but there are none: pass images.")
        if task in ("embed", "score") and texts is None:
            raise ValueError(f'task="{task}" needs texts, but there are none: pass text.')
        if texts is not None and not texts:
            raise ValueError("text is an empty list.")
        for i, sample in enumerate(texts or ()):
            if not isinstance(sample, str):
                raise ValueError(f"text[{i}] must be a str, got {type(sample).__name__}.")
            try:
                is_empty = not as_sentence(sample)
            except ValueError as error:
                raise ValueError(f"text[{i}] of this call: {error}") from error
            if task in (None, "embed", "score") and is_empty:
                alone = ', leave text out to embed the image, or caption it: task="caption"'
                beside = "" if images is None or task == "score" else alone
                raise ValueError(f"text[{i}] of this call is empty, {sample!r}: drop it{beside}.")

    def _check_image_kwargs(self, kwargs: dict[str, Any], has_regions: bool) -> None:
        known = self.image_processor.valid_kwargs.__annotations__
        for name in kwargs:
            if name not in known:
                nearest = difflib.get_close_matches(name, [*known, *TEXT_KWARGS], n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
                raise ValueError(f"Unknown option {name!r} of the processor{hint}")
            if has_regions and name in GEOMETRY_KWARGS:
                raise ValueError(
                    f"Regions follow the image processor's own settings, so {name!r} cannot change in a call with "
                    "boxes or masks; set it on processor.image_processor."
                )

    @staticmethod
    def _load_images(images: Any) -> list[Image.Image]:
        if images is None:
            return []
        items = [images] if is_one_image(images) else list(with_one_scale(images))
        batch = [image for item in items for image in (item if isinstance(item, list | tuple) else [item])]
        if not batch:
            raise ValueError("images is an empty list.")
        loaded = []
        for i, image in enumerate(batch):
            try:
                loaded.append(read_image(image))
            except Exception as error:
                raise ValueError(f"images[{i}] could not be read: {error}.") from error
        return loaded

    def _regions(self, images: list[Image.Image], boxes: Any, masks: Any) -> dict[str, Any]:
        if not images:
            raise ValueError("boxes and masks need their images: pass images.")
        if boxes is not None and masks is not None:
            raise ValueError("A region is a box or a mask: pass boxes or masks, not both.")
        kind = "boxes" if boxes is not None else "masks"
        sizes = [image.size for image in images]
        regions, region_mask = map_regions(boxes if masks is None else masks, sizes, self.image_processor, kind)
        return {kind: regions, "region_mask": region_mask}

    def _sentences(self, texts: list[str], text_kwargs: dict[str, Any], opening: Sequence[str] = ()) -> dict[str, Any]:
        """Rows "(BOS) text [EMB]", with the tokens of `opening` before the text."""
        rows, limit, max_length = self._limited(texts, text_kwargs)
        rows = self.with_opening([row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows], opening)
        return self._padded(rows, max_length + len(opening), {"padding": True, **text_kwargs})

    def _labels(self, texts: list[str], text_kwargs: dict[str, Any]) -> Any:
        """Rows "text EOS", `(N, T)`, -100 behind their ends."""
        rows = self.caption_ids(*self._limited(texts, text_kwargs)[:2])
        longest = max(map(len, rows))
        return np.array([row + [-100] * (longest - len(row)) for row in rows])

    def _limited(self, texts: list[str], text_kwargs: dict[str, Any]) -> tuple[list[list[int]], int, int]:
        """Tokens of the sentences, how many of them may stay, and `max_length`; a warning if some are too long."""
        max_length = text_kwargs.pop("max_length", None)
        if max_length is None:
            max_length = min(self.max_length, self.tokenizer.model_max_length)
        max_length = self.checked_length(max_length)
        truncation = text_kwargs.pop("truncation", None)
        rows = self.sentence_ids(texts)
        too_long = [i for i, row in enumerate(rows) if len(row) > max_length]
        if truncation is None and too_long:
            first = too_long[0]
            logger.warning(
                f"{len(too_long)} of {len(rows)} texts are longer than max_length={max_length} tokens and were "
                f"truncated before [EMB], the first of them text[{first}] of this call with {len(rows[first])}: "
                f"{texts[first][:40]!r}…"
            )
        limit = sys.maxsize if truncation in (False, "do_not_truncate") else max_length
        return rows, limit, max_length

    def _padded(self, rows: list[list[int]], max_length: int, options: dict[str, Any]) -> dict[str, Any]:
        if options["padding"] == "max_length":
            options["max_length"] = max_length
        return dict(self.tokenizer.pad({"input_ids": rows}, **options))

    def _prompts(
        self,
        texts: list[tuple[str, str]],
        number: int,
        region_mask: Any,
        task: str,
        text_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """
        Rows "(BOS) before <image>*n [CAP]*m behind", padded left, since generation continues at the right end. The
        texts are tokenized by themselves, as in training, so that `<image>` in them is letters.
        """
        if task == "region-caption":
            if region_mask is None:
                raise ValueError('task="region-caption" needs boxes or masks; task="caption" takes whole images.')
            number = int(region_mask.sum())
            opening = self.region_prompt
        else:
            opening = self.image_prompt
        if len(texts) == 1:
            texts = texts * max(number, 1)
        if len(texts) != number:
            raise ValueError(f"There are {len(texts)} prompts for {number} images or regions.")
        start = int(bool(self.bos))
        before, behind = ([row[start:-1] for row in self.sentence_ids(part)] for part in zip(*texts))
        bos = self.tokenizer.convert_tokens_to_ids([self.bos] * start)
        placeholders = self.tokenizer.convert_tokens_to_ids(opening)
        rows = [[*bos, *b, *placeholders, *a] for b, a in zip(before, behind)]
        truncation = text_kwargs.pop("truncation", None)
        max_length = text_kwargs.pop("max_length", None)
        if max_length is not None and truncation not in (False, "do_not_truncate"):
            limit = self.checked_length(max_length)
        else:
            limit = int(self.tokenizer.model_max_length) if truncation else sys.maxsize
        if too_long := next((row for row in rows if len(row) > limit), None):
            raise ValueError(
                f"A prompt has {len(too_long)} tokens, but max_length is {limit}, and a prompt cannot be truncated. "
                "Shorten its text, or leave out max_length and truncation."
            )
        max_length = self.max_length if max_length is None else self.checked_length(max_length)
        return self._padded(rows, max_length, {"padding": True, "padding_side": "left", **text_kwargs})


def _flatten_options(options: dict[str, Any]) -> dict[str, Any]:
    """Merges options that are sorted by modality, as transformers allows: no two of them share a name here."""
    flat = {name: value for name, value in options.items() if name not in KWARGS_BY_MODALITY}
    for name in ("text_kwargs", "images_kwargs", "common_kwargs"):
        flat.update(options.get(name) or {})
    for name in ("audio", "videos"):
        if flat.pop(name, None) is not None:
            raise ValueError(f"MM-GEM takes texts and images, not {name}. Leave {name} out.")
    return flat


def _at_least_one(name: str, value: Any) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value!r}.")
    return int(value)
