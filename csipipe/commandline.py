"""Settings from the command line and from YAML files, and back."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from csipipe.config import Settings


def parser(description: str) -> ArgumentParser:
    """A parser of every setting, `--config`, `--print_config` and `--debug`."""
    # the sentence under each field of the settings is its help
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; later arguments win"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_class_arguments(Settings)
    return parser


def settings(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Settings, bool]:
    """Parse arguments; returns the settings and whether `--debug` was given.

    Raises:
        ValueError: an unknown setting, a wrong type or a value that can't be used.
    """
    try:
        parsed = parser.parse_args(list(arguments))
        values = parser.instantiate(parsed)
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{error}\nRun with --help for every setting.") from error
    fields = {name: getattr(values, name) for name in Settings.__dataclass_fields__}
    return Settings(**fields), bool(values.debug)


def to_yaml(settings: Settings) -> str:
    """Complete settings as YAML, to be read with `--config`."""
    return yaml.safe_dump(_plain(asdict(settings)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
