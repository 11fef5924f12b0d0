"""An index of images: built, brought up to date, and searched."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ..evaluation.embedding import evaluating
from ..evaluation.likelihood import rerank as rerank_by_likelihood
from ..evaluation.regions import adapters_off
from ..processing.image_processors_mmgem import least_side_of
from ..processing.images_mmgem import read_image
from .building import build
from .encoding import embed_any
from .loaded import LoadedModel
from .regions import best_region
from .sources import Source, SourceOptions, open_source
from .store import PRECISIONS, open_store
from .tables import INDEX_FILE, check_exists, read_index_file, read_vectors


logger = logging.get_logger(__name__)

REGION_CANDIDATES = 100  # images whose regions are compared
RERANK_BATCH = 16  # images whose likelihoods are computed together


@dataclass
class Hit:
    """
    An image that was found.

    Args:
        score: the cosine with the query; with `rerank` cosine / tau + likelihood; with `regions` that of the region.
        box: `[x0, y0, x1, y1]` of the best region, in pixels of the image.
    """

    id: str
    path: str
    score: float
    box: list[float] | None = None


class Index:
    """
    Images that a text, an image, or both find.

    ```python
    >>> from mmgem.library import Index
    >>> index = Index.build("photos", "index", model="outputs/scenes")
    >>> index.search(text="a red car at night", top=5)
    ```

    Args:
        folder: of an index, or vectors of another program: clip-retrieval's folder, parquet, npy. Those are read as
            they are, for a model whose pooling is "tower" and whose tower made them.
        model: that reads queries; by default the one that the index names.
        precision: "float32", or "int8" with a quarter of the memory.
        **loading: `device` and `dtype` of [`LoadedModel.load`].

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: for an index of another model or dimension, and damaged files.
    """

    def __init__(
        self, folder: str, model: str | LoadedModel | None = None, precision: str = "float32", **loading: Any
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        check_exists(folder)
        self.folder = folder
        self.about = read_index_file(folder) if os.path.isdir(folder) else {}
        self.vectors = read_vectors(folder)
        name = model or self.about.get("model")
        if name is None:
            raise ValueError(f"{folder} does not say which model made its vectors. Give --model.")
        if isinstance(name, str):
            name = LoadedModel.load(name, do_center_crop=self.about.get("do_center_crop", True), **loading)
        self.loaded = name
        self._check_model()
        self.store = open_store(self.vectors, folder if os.path.isdir(folder) else None, precision)
        self._source = self._open_source()

    @classmethod
    def build(
        cls,
        source: str | SourceOptions,
        folder: str,
        model: str | LoadedModel,
        form: str = "parquet",
        batch_size: int = 32,
        workers: int = 0,
    ) -> "Index":
        """
        Embeds images into an index, or brings it up to date: new and changed images are embedded, rows of deleted ones
        are removed.

        Args:
            source: a folder, table, dataset or shards; see [`SourceOptions`].
            folder: of the index.
            form, batch_size, workers: as of [`build`].

        Raises:
            ValueError, OSError: as [`build`] and [`open_source`].
        """
        loaded = model if isinstance(model, LoadedModel) else LoadedModel.load(model)
        options = source if isinstance(source, SourceOptions) else SourceOptions(source)
        build(options, folder, loaded, form, batch_size, workers)
        return cls(folder, loaded)

    def _check_model(self) -> None:
        dimension = self.loaded.model.config.projection_dim
        if dimension != self.vectors.dimension:
            raise ValueError(
                f"{self.folder} holds vectors of {self.vectors.dimension} numbers, and {self.loaded.name} makes "
                f"{dimension}. Give the --model that made them."
            )
        if not self.about:
            if self.loaded.model.config.image_pooling != "tower":
                raise ValueError(
                    f"{self.folder} was not made by {self.loaded.name}: it has no {INDEX_FILE}. Vectors of CLIP or "
                    'SigLIP need a model with image_pooling "tower" (configs/keep-your-index.yaml).'
                )
            return
        for name, value in asdict(self.loaded.identity()).items():
            if name != "model" and self.about.get(name) != value:
                raise ValueError(
                    f"{self.folder} was made by {self.about['model']} with other {name} than {self.loaded.name} has. "
                    "Give the model that made it, or embed the images again."
                )

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        boxes: Sequence[float] | None = None,
        top: int = 20,
        rerank: int = 0,
        regions: bool = False,
    ) -> list[Hit]:
        """
        The images nearest to a query, best first.

        Args:
            text: what they show; beside an image, how they differ from it.
            image: a path, URL or PIL image.
            boxes: `[x0, y0, x1, y1]`, the part of the image to search with.
            rerank: as many of the nearest are ordered by cosine and likelihood of the text.
            regions: orders the nearest 100 by their best region, whose box is returned.

        Raises:
            ValueError: for a query without text and image; for rerank or regions without a text alone.
        """
        query = self._embed_query(text, image, boxes)
        if (rerank or regions) and (text is None or image is not None):
            raise ValueError("rerank and regions compare images with a sentence: give a text, and no image.")
        count = min(max(top, rerank, REGION_CANDIDATES if regions else 0), len(self))
        scores, rows = self.store.search(query[None].numpy(), count)
        hits = [self._hit(row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist()) if row >= 0]
        if regions:
            hits = self._by_region(hits, query)
        if rerank:
            assert text is not None
            hits = [*self._by_likelihood(hits[:rerank], text), *hits[rerank:]]
        return hits[:top]

    def _embed_query(self, text: str | None, image: Any, boxes: Sequence[float] | None) -> torch.Tensor:
        model, processor = self.loaded.model, self.loaded.processor
        if text is None and image is None:
            raise ValueError("Search for a text, an image, or both.")
        if text is not None and not text.strip():
            raise ValueError("The text to search for is empty.")
        try:
            image = None if image is None else read_image(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"The image to search with is too large: {error}.") from error
        if boxes is not None and (image is None or text is not None):
            raise ValueError("boxes are a part of the image to search with: give an image, and no text.")
        with evaluating(model), torch.inference_mode():
            if boxes is None:
                return embed_any(model, processor, [image], [text or ""])[0]
            inputs = processor(images=[image], boxes=[[list(boxes)]], return_tensors="pt").to(model.device)
            return model.get_embedding(**inputs)[0, 0].float().cpu()

    def _hit(self, row: int, score: float) -> Hit:
        return Hit(self.vectors.ids[row].as_py(), self.vectors.paths[row].as_py(), float(score))

    def _by_likelihood(self, hits: list[Hit], text: str) -> list[Hit]:
        """Hits whose image is gone stay behind the others."""
        side = least_side_of(self.loaded.processor.image_processor)
        scores: dict[int, float] = {}
        for start in range(0, len(hits), RERANK_BATCH):
            batch = range(start, min(start + RERANK_BATCH, len(hits)))
            images = {i: image for i in batch if (image := self.image(hits[i], side)) is not None}
            if images:
                with adapters_off(self.loaded.model):
                    found = rerank_by_likelihood(self.loaded.model, self.loaded.processor, text, list(images.values()))
                scores.update({list(images)[place]: score for place, score in found})
        ordered = sorted(scores, key=lambda i: -scores[i])
        gone = [hit for i, hit in enumerate(hits) if i not in scores]
        return [*(replace(hits[i], score=scores[i]) for i in ordered), *gone]

    def _by_region(self, hits: list[Hit], query: torch.Tensor) -> list[Hit]:
        found = []
        with evaluating(self.loaded.model):
            for hit in hits:
                image = self.image(hit)
                if image is not None:
                    box, score = best_region(self.loaded.model, self.loaded.processor, image, query)
                    found.append(replace(hit, box=box, score=score))
        return sorted(found, key=lambda hit: -hit.score)

    def image(self, hit: Hit, least_side: int = 0) -> Image.Image | None:
        """
        The image of a hit in RGB; None if it is no longer there.

        Args:
            least_side: a JPEG may be decoded at a smaller size, with so many pixels per side or more.
        """
        try:
            if self._source is not None:
                return self._source.item(hit.id).image(least_side)
            return read_image(hit.path) if hit.path else None
        except Exception:  # of many types, from Pillow's readers and file systems
            return None

    def _open_source(self) -> Source | None:
        """Where the images are; None for vectors of other programs, and with a warning where they have changed."""
        if "source" not in self.about:
            return None
        name, reason = self.about["source"]["name"], "it has changed since it was embedded"
        try:
            source = open_source(SourceOptions(**self.about["source"]))
            if source.state == self.about.get("state"):
                return source
        except (ValueError, OSError, TypeError) as error:
            reason = str(error)
        logger.warning(f"The images of {name} cannot be shown: {reason}. Embed again, or correct {INDEX_FILE}.")
        return None
