"""Options of a script: dataclasses filled from a YAML file and the command line."""

import difflib
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


def parse_options(
    types: Sequence[Any],
    script: str,
    arguments: list[str] | None = None,
    implied: Callable[[Namespace], list[str]] = lambda known: [],
) -> tuple[Any, ...]:
    """
    An instance of each dataclass of `types`, from `--config file.yaml` and `--option value`, the command line winning.

    Args:
        script: as the help calls it.
        arguments: of the command line, without the script.
        implied: options that follow from others.

    Raises:
        ValueError: for an unknown option, with the nearest known one; for a list where the option takes one value, or
            a list of other things than it takes; for what the locale cannot write.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in (os.getcwd(), *arguments):
        check_encodable(word)
    parser = HfArgumentParser(list(types), allow_abbrev=False)  # type: ignore[arg-type]
    known = {f.name for data_class in types for f in fields(data_class) if f.init}
    hints = {name: hint for data_class in types for name, hint in get_type_hints(data_class).items()}
    settings, rest = _read_config(arguments)
    _refuse_unknown([name for name in settings if name not in known], known, "in the configuration file")
    parser.usage = f"{script} [--config FILE] [--option VALUE …]   (--help lists the options)"
    for name, value in settings.items():
        _check_setting(name, value, hints[name])
    # Single values go the way of the command line, and are checked like those from there.
    single = {name: value for name, value in settings.items() if value is not None and not isinstance(value, list)}
    parser.set_defaults(**{name: value for name, value in settings.items() if name not in single})
    words = [f"--{name}={_as_word(value)}" for name, value in single.items()]
    words += implied(parser.parse_known_args(words + rest)[0])
    try:
        *parsed, remaining = parser.parse_args_into_dataclasses(words + rest, return_remaining_strings=True)
    except RecursionError as error:  # transformers parses its own options that are mappings
        raise ValueError("an option holds JSON that is nested too deeply. Write it flatter.") from error
    unknown = [word.removeprefix("--").split("=")[0] for word in remaining if word.startswith("--")]
    _refuse_unknown(unknown, known | {"config"}, "on the command line")
    if remaining:
        raise ValueError(f"Could not make sense of {' '.join(remaining)!r}: options are written --name value.")
    return tuple(parsed)


def check_encodable(path: str) -> None:
    """
    Raises:
        ValueError: for a path that Python could not decode in this locale, or cannot encode: the libraries that write
            weights and tokenizers take UTF-8 alone.
    """
    try:
        path.encode("utf-8")
        os.fsencode(path)
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise ValueError(
            f"{path!a} cannot be a path in this locale, whose encoding is {encoding}. Set PYTHONUTF8=1 in the "
            "environment, or name it in ASCII."
        ) from error


def load_yaml(source: Any, name: str) -> Any:
    """What a text or an open file holds; a fault in it names `name`."""
    try:
        return yaml.safe_load(source)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML: {error}") from error


def _check_setting(name: str, value: Any, hint: Any) -> None:
    """Of lists, which do not go the way of the command line."""
    if not isinstance(value, list):
        return
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    lists = [kind for kind in kinds if kind is list or get_origin(kind) is list]
    if not lists:
        raise ValueError(f"{name} takes one value, not a list.")
    of = {kind for of_list in lists for kind in get_args(of_list)}
    allowed = of | {int} if float in of else of
    wrong = [item for item in value if type(item) not in allowed]
    if wrong and of <= {str, int, float}:
        raise ValueError(f"{name} takes a list of {min(kind.__name__ for kind in of)}, but one is {wrong[0]!r}.")


def _as_word(value: Any) -> str:
    """A value from YAML as it would stand on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_config(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of `--config FILE` (or `--config=FILE`), and the other arguments."""
    rest = [*arguments]
    for i, word in enumerate(rest):
        if word == "--config" and i + 1 < len(rest):
            path, rest[i : i + 2] = rest[i + 1], []
        elif word.startswith("--config="):
            path, rest[i : i + 1] = word.removeprefix("--config="), []
        else:
            continue
        with open(path, "rb") as file:
            settings = load_yaml(file, path)
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise ValueError(f"{path} must hold a mapping of names of options to values.")
        return settings, rest
    return {}, rest


def _refuse_unknown(unknown: list[str], known: set[str], where: str) -> None:
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "; see --help."
        raise ValueError(f"Unknown option {unknown[0]!r} {where}{hint}")


def checked_token(token: str) -> str:
    """
    Without white space around it.

    Raises:
        ValueError: for what no header can hold: errors of the library would print it.
    """
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("The Hub token is empty, or holds characters that no token has; copy it once more.")
    return token
