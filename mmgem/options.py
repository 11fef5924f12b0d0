"""Options of a script: dataclasses filled from a YAML file and the command line."""

import difflib
import json
import os
import re
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import field
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


def option(default: Any, description: str) -> Any:
    """Declares a field of a dataclass of options; the description is its help."""
    metadata = {"help": description.replace("%", "%%")}  # argparse formats it
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_options(
    types: Sequence[Any], script: str, arguments: list[str] | None = None, common: Container[str] | None = None
) -> tuple[Any, ...]:
    """
    Fills each dataclass of `types` from `--config file.yaml` and `--option value`; the command line wins.

    Args:
        script: name of the script in its help.
        arguments: the command line without the script; `sys.argv` by default.
        common: names of the options that `--help` lists, a line each; `--help_all` explains all of them.

    Raises:
        ValueError: for an unknown option, with the nearest known one; for a list where the option takes one value, or
            whose items have another type; for a path that the locale cannot write.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in (os.getcwd(), *arguments):
        check_encodable(word)
    usage = f"{script} [--config FILE] [--option VALUE …]   (--help lists the usual options, --help_all explains all)"
    parser = HfArgumentParser(list(types), usage=usage, allow_abbrev=False)  # type: ignore[arg-type]
    if "--help_all" in arguments:
        arguments = ["--help"]
    elif "--help" in arguments or "-h" in arguments:
        print(_short_help(parser, usage, common))
        sys.exit(0)
    named = [word.removeprefix("--").split("=")[0] for word in arguments if word.startswith("--")]
    options = {name.removeprefix("--") for name in parser._option_string_actions}
    _refuse_unknown((name for name in named if name not in {*options, "config"}), options, "on the command line")
    config_parser = ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", action="append", default=[])
    config, words = config_parser.parse_known_args(arguments)
    if len(config.config) > 1:
        raise ValueError(f"--config is given {len(config.config)} times: {', '.join(config.config)}. Give one file.")
    hints = {name: hint for data_class in types for name, hint in get_type_hints(data_class).items()}
    settings = _read_settings(config.config[0]) if config.config else {}
    known = {action.dest for action in parser._actions} - {"help"}
    _refuse_unknown(settings.keys() - known, known, "in the configuration file")
    for name, value in settings.items():
        if isinstance(value, list):
            _check_list(name, value, hints[name])
        if value is None or isinstance(value, list):
            parser.set_defaults(**{name: value})
        else:  # goes in front of the command line, so that argparse converts and checks it
            words.insert(0, f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    numbers = {f"--{name}" for name, hint in hints.items() if list[int] in (hint, *get_args(hint))}
    words = list(_numbers_apart(words, numbers))
    try:
        *parsed, remaining = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except RecursionError as error:  # transformers parses its own options that are mappings
        raise ValueError("An option holds JSON that is nested too deeply. Write it flatter.") from error
    if remaining:
        raise ValueError(f"Unexpected arguments: {' '.join(remaining)!r}. Write options as --name value.")
    return tuple(parsed)


def _short_help(parser: ArgumentParser, usage: str, common: Container[str] | None) -> str:
    """A line for each of the usual options."""
    lines = [f"usage: {usage}", ""]
    for action in parser._actions:
        if (
            action.dest != "help"
            and (common is None or action.dest in common)
            and action.option_strings[0][2:5] != "no_"
        ):
            description = (action.help or "").replace("%%", "%")
            lines.append(f"  --{action.dest:<30} {textwrap.shorten(description, 80, placeholder=' …')}")
    return "\n".join(lines)


def _numbers_apart(words: list[str], options: set[str]) -> Iterator[str]:
    """The words of a command line, with `4,8` behind one of these options as the words `4` and `8`."""
    option = ""
    for word in words:
        name, _, value = word.partition("=")
        if name in options and value:
            yield from (name, *value.split(","))
        elif word.startswith("--"):
            option = word
            yield word
        else:
            yield from word.split(",") if option in options else [word]


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
        raise ValueError(
            f"{path!a} cannot be a path in this locale, whose encoding is {sys.getfilesystemencoding()}. Set "
            "PYTHONUTF8=1 in the environment, or rename it in ASCII."
        ) from error


def load_yaml(source: Any, name: str) -> Any:
    """Parses a text or an open file; errors call it `name`."""
    try:
        return yaml.safe_load(source)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML: {error}") from error


def checked_token(token: str) -> str:
    """
    Returns the Hub token without surrounding white space.

    Raises:
        ValueError: for a token that no HTTP header can hold: httpx would put it into its exception, and so into the
            log.
    """
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("The Hub token is empty, or holds characters that no token has. Copy it once more.")
    return token


def _read_settings(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        settings = load_yaml(file, path)
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"{path} must hold a mapping of names of options to values.")
    return settings


def _check_list(name: str, values: list[Any], hint: Any) -> None:
    """Checks a list from YAML against the option's type, as argparse does with words of the command line."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    lists = [kind for kind in kinds if list in (kind, get_origin(kind))]
    if not lists:
        raise ValueError(f"{name} takes one value, not a list.")
    item_types = {item_type for kind in lists for item_type in get_args(kind)}
    allowed = item_types | {int} if float in item_types else item_types
    wrong = [item for item in values if type(item) not in allowed]
    if wrong and item_types <= {str, int, float}:
        expected = min(item_type.__name__ for item_type in item_types)
        raise ValueError(f"{name} takes a list of {expected}, but one is {wrong[0]!r}.")


def _refuse_unknown(unknown: Iterable[str], known: set[str], where: str) -> None:
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "; see --help."
        raise ValueError(f"Unknown option {name!r} {where}{hint}")
