"""Tables from files. They are checked line by line before `datasets` reads them, whose errors name no line."""

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa

from .json_files import parse_json, read_json


FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
# Only an empty field is a missing value. pandas also takes "None", "NA" and "null" for one, and they may be captions.
CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}
MAX_FIELD_BYTES = 2**27
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_file(path: str, split: str) -> datasets.Dataset:
    """
    A table from parquet, jsonl, json or csv; of a txt, each line is a row of the column `text`.

    Raises:
        ValueError: for an unknown format, an invalid file (with the line, if it has lines), or one without rows.
        FileNotFoundError: for a missing file.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension not in FORMATS:
        raise ValueError(f"{path}: unknown format {extension!r}; use one of {', '.join(FORMATS)}.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}.")
    if not os.path.getsize(path):
        raise ValueError(f"{path} is empty: it has 0 bytes. Write it anew.")
    if check := CHECKS.get(extension):
        check(path)
    options = CSV_OPTIONS if extension == ".csv" else {}
    try:
        return datasets.load_dataset(FORMATS[extension], data_files={split: path}, split=split, **options)
    except Exception as error:  # of pandas, pyarrow or datasets, which raises "no data" for a file without rows
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no rows.") from error
        raise ValueError(f"{path} could not be read as {FORMATS[extension]}: {root_cause(error)}.") from error


def load_named(name: str, config: str | None, split: str | None = None) -> Any:
    """
    A dataset of the Hub or of a folder: the table of a split, or all splits by name. A folder's tables are checked as
    in [`read_file`].

    Raises:
        ValueError: for files that cannot be read, with the line of a local file.
        FileNotFoundError: for a dataset that does not exist.
    """
    builder = datasets.load_dataset_builder(name, config)
    has_metadata = hasattr(builder.config, "drop_metadata")  # a folder of images with a table beside them
    if not _has_own_dialect(builder.config):
        for path in dict.fromkeys(path for paths in (builder.config.data_files or {}).values() for path in paths):
            check = CHECKS.get(os.path.splitext(path)[1].lower())
            is_table = not has_metadata or os.path.basename(path).startswith("metadata.")
            if check and is_table and os.path.isfile(path):
                check(path)
                if has_metadata and path.endswith(".csv"):
                    _refuse_lost_words(path)
    options = CSV_OPTIONS if hasattr(builder.config, "keep_default_na") else {}
    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(f"The dataset {name} could not be read: {root_cause(error)}.") from error


def _has_own_dialect(config: datasets.BuilderConfig) -> bool:
    """Whether the README of a dataset changes how its CSV files are read, such as their separator."""
    common = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    own = [field for field in dataclasses.fields(config) if field.name not in common]
    return hasattr(config, "sep") and any(getattr(config, field.name) != field.default for field in own)


def _refuse_lost_words(path: str) -> None:
    """Raises ValueError for "None", "NA" and the like: `datasets` reads a metadata.csv without `CSV_OPTIONS`."""
    written = pd.read_csv(path, dtype=str, **CSV_OPTIONS)  # type: ignore[call-overload]
    lost = (pd.read_csv(path, dtype=str).isna() & written.notna()).to_numpy()
    if lost.any():
        row, column = (int(numbers[0]) for numbers in lost.nonzero())
        raise ValueError(
            f"Row {row} of {path} has the {written.columns[column]} {written.iat[row, column]!r}, which datasets "
            "would read as nothing. Save the table as metadata.jsonl."
        )


def root_cause(error: BaseException) -> str:
    """The first error of a chain: `datasets` raises one that only says that another occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".rstrip(".")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file. Raises ValueError if it is not in UTF-8."""
    with open(path, "rb") as file:
        if file.read(2) in UTF_16:
            raise ValueError(f"{path} is in UTF-16, not in UTF-8. {_conversion('UTF-16', path)}")
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                remedy = _conversion("CP1252", path)
                raise ValueError(f"Line {number} of {path} is not in UTF-8: {error}. {remedy}") from error
            if "\0" in text:
                raise ValueError(f"Line {number} of {path} holds NUL. {_conversion('UTF-16LE', path)}")
            yield number, text


def _conversion(encoding: str, path: str) -> str:
    return f"If it is in {encoding}, convert it: iconv -f {encoding} -t UTF-8 {path} > {path}.utf8"


def _check_json_rows(path: str) -> None:
    """Each line must be a JSON object without half characters."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        name = f"Line {number} of {path}"
        try:
            row = parse_json(line.strip())
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{name} holds half a surrogate pair, which is no character: {half!r}. Drop it."
            ) from error
        except ValueError as error:
            raise ValueError(f"{name} is not valid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name} is not an object with columns: {line[:40].strip()}.")


def _check_json(path: str) -> None:
    """A .json file is one document, or JSON lines in spite of its name."""
    text = next((line for _, line in _lines(path) if line.strip()), "")
    if text.lstrip().startswith("["):
        rows = read_json(path)
        if wrong := [i for i, row in enumerate(rows) if not isinstance(row, dict)]:
            raise ValueError(f"Row {wrong[0]} of {path} is not an object with columns: {str(rows[wrong[0]])[:40]}.")
    else:
        with contextlib.suppress(ValueError):
            read_json(path)
            return
        _check_json_rows(path)


def _check_csv(path: str) -> None:
    limit = csv.field_size_limit(MAX_FIELD_BYTES)
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next((row for row in rows if row), [])
        if len(header) == 1 and (separator := next((s for s in ";\t|" if s in header[0]), None)):
            raise ValueError(f"The fields of {path} are separated by {separator!r}. Separate them by commas.")
        if twice := next((name for i, name in enumerate(header) if name in header[:i]), None):
            raise ValueError(f"The header of {path} names the column {twice!r} twice. Rename or remove one of them.")
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"Line {rows.line_num} of {path} has {len(row)} fields, but its header has {len(header)} "
                    f"({', '.join(header)}). Put quotes around a text that holds commas."
                )
    except csv.Error as error:
        if "new-line character" in str(error):
            remedy = f"If its lines end in CR alone, convert them: tr '\\r' '\\n' < {path} > {path}.lf"
        else:
            remedy = "Check that its quotes come in pairs."
        raise ValueError(f"Line {rows.line_num} of {path} is not valid CSV: {error}. {remedy}") from error
    finally:
        csv.field_size_limit(limit)


def _check_text(path: str) -> None:
    for _ in _lines(path):
        pass


CHECKS: dict[str, Callable[[str], None]] = {
    ".jsonl": _check_json_rows,
    ".json": _check_json,
    ".csv": _check_csv,
    ".txt": _check_text,
}
