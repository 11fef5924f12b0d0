"""JSON from users and other programs."""

import json
import re
from typing import Any


MAX_DEPTH = 100  # parsers recurse, and some crash the process when the stack overflows
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


def read_json(path: str) -> Any:
    """
    The content of a JSON file.

    Raises:
        ValueError: for a file that is not valid JSON, or nested too deeply, with its name.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            return parse_json(file.read())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error


def read_json_lines(path: str) -> list[Any]:
    """
    The value of each line that is not empty.

    Raises:
        ValueError: for a line that is not valid JSON, or nested too deeply, with its number.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [parse_json(line.decode("utf-8-sig"))] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is not valid JSON: {error}.") from error
    return rows


def parse_json(text: str) -> Any:
    """Parses JSON. Raises ValueError if it is invalid, or nested more than `MAX_DEPTH` deep."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for match in TOKEN.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep at character {match.start()}")
    return json.loads(text)
