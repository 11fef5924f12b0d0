"""The files of an index: vectors with what they belong to, ours and those that other programs wrote."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.json_files import read_json


INDEX_FILE = "index.json"
PARTS = "vectors"
# clip-retrieval's folders, which `--format npy` writes too.
NPY_PARTS, NPY_ROWS = "img_emb", "metadata"
# Columns of other programs' tables, by preference.
VECTOR_COLUMNS = ("vector", "embedding", "embeddings", "image_embedding", "image_embeddings", "image_embeds", "emb")
PATH_COLUMNS = ("path", "image_path", "file_name", "file", "url")


@dataclass
class Identity:
    """What the vectors of an index depend on: the model's name and weights, its preprocessing, and D."""

    model: str
    weights: str
    do_center_crop: bool
    preprocessing: str
    dimension: int


@dataclass
class Vectors:
    """
    Args:
        ids, paths: of each row; a path is empty where there is no file.
        parts: where the vectors are, part by part, and how many each has; they are read when they are needed.
        state: changes with the files.
    """

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray
    parts: list[Any]
    dimension: int
    state: str

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Parts of `(n, D)` in float32, normalised."""
        for part, count in self.parts:
            values, file = _read_part(part), part if isinstance(part, str) else part[0]
            if values.shape != (count, self.dimension):
                raise ValueError(f"{file} has changed since the index was opened. Open it again.")
            if not np.isfinite(values).all():
                raise ValueError(f"{file} holds vectors with NaN or infinity. Compute them again.")
            norms = np.linalg.norm(values, axis=1, keepdims=True)
            yield values / np.maximum(norms, 1e-12)


def write_part(folder: str, number: int, rows: dict[str, Sequence[Any]], vectors: np.ndarray, form: str) -> None:
    """
    Writes `part-<number>`, whole or not at all.

    Args:
        rows: columns beside the vectors.
        vectors: `(n, D)` float32.
        form: "parquet", or "npy" for clip-retrieval's two folders.
    """
    name = f"part-{number:06}"
    table = pa.table(dict(rows))
    if form == "npy":
        # The rows come first: a part without its vectors is not a part.
        _write(os.path.join(folder, NPY_ROWS, f"{name}.parquet"), lambda file: pq.write_table(table, file))
        _write(os.path.join(folder, NPY_PARTS, f"{name}.npy"), lambda file: np.save(file, vectors))
        return
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    _write(os.path.join(folder, PARTS, f"{name}.parquet"), lambda file: pq.write_table(table, file))


def _write(path: str, write: Any) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.unfinished"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def part_number(rows: str) -> int:
    """The number of a part by the file of its rows."""
    return int(os.path.splitext(os.path.basename(rows))[0].removeprefix("part-"))


def part_files(folder: str) -> list[tuple[str, str]]:
    """Of each whole part of one of our indexes, the files of its rows and of its vectors, which may be the same."""
    rows = os.path.join(folder, PARTS)
    if os.path.isdir(rows):
        names = sorted(name for name in os.listdir(rows) if name.endswith(".parquet"))
        return [(os.path.join(rows, name),) * 2 for name in names]
    vectors = os.path.join(folder, NPY_PARTS)
    names = sorted(name for name in os.listdir(vectors) if name.endswith(".npy")) if os.path.isdir(vectors) else []
    return [
        (os.path.join(folder, NPY_ROWS, _rows_of(name) + ".parquet"), os.path.join(vectors, name)) for name in names
    ]


def _rows_of(name: str) -> str:
    """The rows that belong to a file of vectors: clip-retrieval has img_emb_0.npy beside metadata_0.parquet."""
    return os.path.splitext(name)[0].replace("img_emb", "metadata")


def read_vectors(path: str) -> Vectors:
    """
    The vectors of an index: a folder of ours, clip-retrieval's, or of parquet or npy files; or one such file.

    Raises:
        ValueError: for files without vectors, of different dimensions, or that cannot be read.
        FileNotFoundError: if there is nothing.
    """
    check_exists(path)
    files = part_files(path) if os.path.isdir(path) else []
    if not files:
        names = [path]
        if os.path.isdir(path):
            names = sorted(os.path.join(path, name) for name in os.listdir(path))
        files = [(name, name) for name in names if name.endswith((".parquet", ".npy"))]
    if not files:
        raise ValueError(f"{path} holds no vectors: no parquet, no npy. Make an index: mmgem embed FOLDER -o {path}")
    parts, dimensions, state = [], {}, []
    ids: list[pa.Array] = []
    paths: list[pa.Array] = []
    for rows, vectors in files:
        try:
            count, dimension, part = _describe(vectors)
            own_ids, own_paths = _names(rows, count, sum(len(others) for others in ids))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{vectors} cannot be read as a part of an index: {error}") from error
        if not count:
            continue
        dimensions[dimension] = vectors
        parts.append((part, count))
        ids.append(own_ids)
        paths.append(own_paths)
        state.append((os.path.basename(vectors), count, os.path.getsize(vectors), os.stat(vectors).st_mtime_ns))
    if len(dimensions) > 1:
        (one, first), (other, second) = list(dimensions.items())[:2]
        raise ValueError(f"{first} holds vectors of {one} numbers, {second} of {other}. Keep one kind in a folder.")
    if not parts:
        raise ValueError(f"{path} holds no vectors. Embed images into it.")
    return Vectors(pa.chunked_array(ids), pa.chunked_array(paths), parts, min(dimensions), json.dumps(state))


def _describe(path: str) -> tuple[int, int, Any]:
    """Number and dimension of the vectors of a file, without reading them, and what [`_read_part`] takes."""
    if path.endswith(".npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(f"it holds {array.dtype} of shape {array.shape}, and no vectors")
        return len(array), array.shape[1], path
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    lists = [name for name in schema.names if _is_vector(schema.field(name).type)]
    column = next((name for name in VECTOR_COLUMNS if name in lists), lists[0] if len(lists) == 1 else None)
    if column is None:
        raise ValueError(f"none of its columns ({', '.join(schema.names)}) is known to hold vectors")
    count = file.metadata.num_rows
    first = next(file.iter_batches(1, columns=[column]))[0][0].as_py() if count else []
    if first is None:
        raise ValueError("its first row has no vector; drop such rows")
    return count, len(first), (path, column)


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _read_part(part: Any) -> np.ndarray:
    if isinstance(part, str):
        return np.load(part, mmap_mode="r", allow_pickle=False).astype(np.float32)
    path, name = part
    column = pq.read_table(path, columns=[name]).column(0).combine_chunks()
    if column.null_count:
        raise ValueError(f"{path} has {column.null_count} rows without a vector. Drop them.")
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if len(pc.unique(pc.list_value_length(column))) != 1:
        raise ValueError(f"{path} holds vectors of different dimensions.")
    return values.reshape(len(column), -1)


def _names(path: str, count: int, first: int) -> tuple[pa.Array, pa.Array]:
    """Ids and paths of a part's rows; where a file has none, the numbers of the rows."""
    numbers = pa.array(map(str, range(first, first + count)), pa.string())
    if not path.endswith(".parquet") or not os.path.exists(path):
        return numbers, pa.array([""] * count)
    names = pq.ParquetFile(path).schema_arrow.names
    of_path = next((name for name in PATH_COLUMNS if name in names), None)
    own = pq.read_table(path, columns=[name for name in ("id", of_path) if name in names])
    if len(own) != count:
        raise ValueError(f"{path} has {len(own)} rows for {count} vectors")
    paths = own[of_path].cast(pa.string()).fill_null("").combine_chunks() if of_path else pa.array([""] * count)
    ids = own["id"].cast(pa.string()).combine_chunks() if "id" in own.column_names else paths if of_path else numbers
    return ids, paths


def check_exists(path: str) -> None:
    """Raises FileNotFoundError if there is no index."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no index {path}. Make one: mmgem embed FOLDER -o {path}")


def read_index_file(folder: str) -> dict[str, Any]:
    """What index.json says; nothing for other programs' files."""
    path = os.path.join(folder, INDEX_FILE)
    if not os.path.exists(path):
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("model"), str):
        raise ValueError(f"{path} is damaged: it names no model. Make the index again.")
    return found
