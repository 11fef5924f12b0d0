"""JSON that others wrote."""

import json
from collections.abc import Sequence
from typing import Any


def read_json(path: str) -> Any:
    """
    Raises:
        ValueError: for a file that is no JSON, with its name.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or nested too deeply
            raise ValueError(f"{path} is no JSON: {error}.") from error


def read_json_lines(path: str) -> list[Any]:
    """
    One value a line, empty lines passed over.

    Raises:
        ValueError: for a line that is no JSON, with its number.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error
    return rows


def no_such_split(path: str, asked: Sequence[str] | None, there: set[str]) -> ValueError:
    """What to raise for a file without the splits that were asked for."""
    return ValueError(f"{path} has no split {' or '.join(asked or ())}; it has {', '.join(sorted(there))}.")
