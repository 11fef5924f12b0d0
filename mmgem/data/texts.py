"""Texts alone, for the stage text-distillation, and what a teacher makes of them and of captions."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from ..modeling_mmgem.loading_mmgem import digest_of_tensors
from .arguments import DataArguments
from .loading import BUILT_IN, Table, load_tables
from .pairs import TEACHER_EMBEDS, as_captions, digest


TEXT = "text"
EVALUATED_TEXTS = 2000  # by default, whose pairs are two million
TEACHER_BATCH = 256  # texts that the teacher embeds at a time


def load_texts(arguments: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """
    The distinct texts of the training data in a column `text`, and those of the data to evaluate on (None where there
    is none; by default the first 2,000). Every text of `arguments.text_columns` is one; with
    `arguments.teacher_column` a row's one text has a vector `teacher_embeds`.

    Raises:
        ValueError: for a missing column; for one that holds neither texts nor lists of texts; for a teacher's column
            without a vector of the same length in each row.
    """
    if arguments.train_shards:
        raise ValueError("Shards are streamed with their images. Give text-distillation a table of texts.")
    if arguments.dataset_name in BUILT_IN:
        raise ValueError(f"{arguments.dataset_name} are drawn, for images. Give text-distillation a table of texts.")
    train, held_out = load_tables(arguments, image_size=0, seed=seed)
    return (
        _texts_of(train, arguments, arguments.max_train_samples),
        None if held_out is None else _texts_of(held_out, arguments, arguments.max_eval_samples or EVALUATED_TEXTS),
    )


def _texts_of(table: Table, arguments: DataArguments, limit: int | None) -> datasets.Dataset:
    rows, columns = table.rows, arguments.text_columns or [arguments.caption_column]
    vectors = [] if arguments.teacher_column is None else [arguments.teacher_column]
    if missing := [name for name in (*columns, *vectors) if name not in rows.column_names]:
        raise ValueError(
            f"The dataset has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}. Set "
            f"--{'teacher_column' if missing[0] in vectors else 'text_columns'}."
        )
    found: dict[str, int] = {}  # the row of each text, in their order
    for i, row in enumerate(rows.select_columns(columns)):
        if limit is not None and len(found) >= limit:
            break
        try:
            texts = [text for name in columns for text in as_captions(row[name])]
        except ValueError as error:
            raise ValueError(f"Row {i}: {error}. Set --text_columns.") from error
        if vectors and len(texts) != 1:
            raise ValueError(
                f"Row {i} has {len(texts)} texts for one vector of {vectors[0]!r}. Give each its own row."
            )
        for text in texts:
            found.setdefault(text, i)
    if not found:
        raise ValueError(f"The dataset has no text in {', '.join(columns)}.")
    texts = list(found)[:limit]
    data: dict[str, Any] = {TEXT: texts}
    if vectors:
        data[TEACHER_EMBEDS] = _unit_rows(rows, vectors[0], [found[text] for text in texts])
    return as_tensors(datasets.Dataset.from_dict(data))


def _unit_rows(rows: datasets.Dataset, name: str, indices: list[int]) -> np.ndarray:
    """The vectors of some rows, float32 as NumPy reads them from the table."""
    try:
        chosen = rows.select_columns([name]).with_format("numpy", dtype=np.float32)
        vectors = np.stack(list(chosen.select(indices)[name]))
        assert vectors.ndim == 2 and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"Column {name!r} must hold a vector of finite numbers in each row, all as long.") from error
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def as_tensors(texts: datasets.Dataset) -> datasets.Dataset:
    """Vectors as tensors, since a list of Python's numbers for each row takes longer than a step of a small model."""
    columns = [TEACHER_EMBEDS] if TEACHER_EMBEDS in texts.column_names else []
    return texts.with_format("torch", columns=columns, output_all_columns=True) if columns else texts


def load_teacher(name: str) -> Any:
    """
    A model of sentence-transformers.

    Args:
        name: folder or Hub id.

    Raises:
        ValueError: without sentence-transformers, or for a model that it cannot load.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError("--teacher needs sentence-transformers: pip install 'mmgem[sentence-transformers]'.")
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--teacher {name} is no model of sentence-transformers: {error}") from error


class TeacherVectors(Mapping[str, torch.Tensor]):
    """
    The unit vectors `(E,)` of a teacher by their texts, read from a file when they are asked for.

    Args:
        texts: with the columns `text` and `teacher_embeds`.
    """

    def __init__(self, texts: datasets.Dataset):
        self.texts = as_tensors(texts)
        self.rows = {text: i for i, text in enumerate(texts[TEXT])}

    def __getitem__(self, text: str) -> torch.Tensor:
        return self.texts[self.rows[text]][TEACHER_EMBEDS]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def distinct_texts(texts: Iterable[str]) -> datasets.Dataset:
    """A table of texts, each once."""
    return datasets.Dataset.from_dict({TEXT: list(dict.fromkeys(texts))})


def with_teacher(tables: Sequence[datasets.Dataset], teacher: Any, folder: str) -> list[datasets.Dataset]:
    """
    The tables of texts with a column `teacher_embeds`: the unit vectors of the teacher, computed once for each table
    and kept in `folder`.
    """
    # Of its weights, its modules with their settings, and its prompts.
    parts = [digest_of_tensors(sorted(teacher.state_dict().items())), repr(teacher), repr(teacher.prompts)]

    def embed(batch: dict[str, Any]) -> dict[str, Any]:
        return {TEACHER_EMBEDS: teacher.encode(batch[TEXT], batch_size=TEACHER_BATCH, normalize_embeddings=True)}

    os.makedirs(folder, exist_ok=True)
    embedded = []
    for texts in tables:
        known = f"{digest(chr(0).join([*parts, *texts[TEXT]]).encode()) % 2**64:016x}"
        kept = {"cache_file_name": os.path.join(folder, f"teacher-{known}.arrow"), "new_fingerprint": known}
        rows = texts.map(embed, batched=True, batch_size=4 * TEACHER_BATCH, desc="Teacher", **kept)
        embedded.append(as_tensors(rows))
    return embedded
