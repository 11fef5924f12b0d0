"""Nearest vectors, by FAISS: an exact scan of few, an inverted file of many (docs/cli.md says why FAISS)."""

import os
from contextlib import suppress
from typing import Any

import faiss
import numpy as np
from transformers.utils import logging

from .tables import Vectors


logger = logging.get_logger(__name__)


EXACT = 100_000  # vectors that are scanned one by one: 6 ms a query
STORE_FILE = "store-{precision}.faiss"
PRECISIONS = {"float32": "Flat", "int8": "SQ8"}
TRAINED = 64  # vectors per list that its centre is found from
PROBED = 16  # one list of so many is searched


def open_store(vectors: Vectors, folder: str | None, precision: str = "float32") -> Any:
    """
    The index of the vectors, by inner product. One of many vectors is kept in a file of `folder`, and made anew where
    the vectors have changed since.

    Args:
        folder: None keeps nothing.
        precision: "float32", or "int8" with a quarter of the bytes.
    """
    if len(vectors) < EXACT or folder is None:
        return _build(vectors, PRECISIONS[precision])
    path = os.path.join(folder, STORE_FILE.format(precision=precision))
    if _is_current(path, vectors.state):
        with suppress(RuntimeError):  # a damaged file, which is made anew
            return _probing(faiss.read_index(path, faiss.IO_FLAG_MMAP))
    lists = 2 ** round(float(np.log2(4 * len(vectors) ** 0.5)))
    built = _build(vectors, f"IVF{lists},{PRECISIONS[precision]}")
    unfinished = f"{path}.{os.getpid()}"
    try:
        with suppress(FileNotFoundError):
            os.remove(f"{path}.state")
        faiss.write_index(built, unfinished)
        os.replace(unfinished, path)
        with open(f"{path}.state", "w", encoding="utf-8") as file:
            file.write(vectors.state)
    except (RuntimeError, OSError) as error:  # FAISS raises RuntimeError
        logger.warning(f"{path} cannot be written ({error}): every search builds it anew, in memory.")
    return built


def _is_current(path: str, state: str) -> bool:
    if not os.path.exists(path) or not os.path.exists(f"{path}.state"):
        return False
    with open(f"{path}.state", encoding="utf-8") as file:
        return file.read() == state


def _build(vectors: Vectors, kind: str) -> Any:
    """`kind` is a word of FAISS's index factory."""
    index: Any = faiss.index_factory(vectors.dimension, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(_sample(vectors, TRAINED * getattr(index, "nlist", EXACT)))
    for part in vectors:
        index.add(part)
    return _probing(index)


def _probing(index: Any) -> Any:
    if hasattr(index, "nlist"):
        index.nprobe = max(index.nlist // PROBED, 1)
    return index


def _sample(vectors: Vectors, count: int) -> np.ndarray:
    """About `count` vectors, drawn evenly from all parts."""
    rng, share = np.random.default_rng(0), min(count / max(len(vectors), 1), 1.0)
    return np.concatenate([part[rng.random(len(part)) < share] if share < 1 else part for part in vectors])
