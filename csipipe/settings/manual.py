"""The pages of `--help`: an overview, and a page for each section of the settings.

Names, defaults and sentences are those of `csipipe.settings.config`.
"""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import DefaultHelpFormatter

from csipipe.settings import tables
from csipipe.settings.config import Settings

SECTIONS: dict[str, Any] = {
    field.name: field.default_factory
    for field in dataclasses.fields(Settings)
    if field.default_factory is not dataclasses.MISSING
}
"""Sections of the settings by name, in order."""
_LEFT, _WIDEST = 34, 110


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of `overview`."""


def overview() -> str:
    """What the first page says about the settings."""
    rows = [(name, section.__doc__ or "") for name, section in SECTIONS.items()]
    return "\n".join(
        [_no_section(), "", "sections with more settings (--help SECTION):", *_columns(rows)]
    )


def everything() -> str:
    """Every setting: those in no section, then the page of each section."""
    return "\n\n".join([_no_section(), *map(page, SECTIONS)])


def _no_section() -> str:
    return "\n".join(["settings:", *_columns(_settings(Settings, "", ["method"]))])


def page(name: str) -> str:
    """Every setting of a section, with its default and meaning."""
    section = SECTIONS[name]
    names = [field.name for field in dataclasses.fields(section)]
    return "\n".join([f"{section.__doc__}", *_columns(_settings(section, f"{name}.", names))])


def _settings(section: Any, prefix: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name with default, and meaning, of some settings."""
    defaults, types = section(), get_type_hints(section)
    meanings = {p.arg_name: p.description or "" for p in parse_from_object(section).params}
    for name in names:
        if dataclasses.is_dataclass(inner := getattr(defaults, name)):
            yield from _settings(type(inner), f"{prefix}{name}.", vars(inner))
            continue
        meaning = " ".join(meanings[name].split())
        if f"{prefix}{name}" in tables.TABLES:
            meaning += f" {tables.listed(f'{prefix}{name}')}"
        choices = [choice for choice in get_args(types[name]) if isinstance(choice, str)]
        if any(choice not in meaning for choice in choices):
            meaning += f" One of {', '.join(choices)}."
        yield f"--{prefix}{name} {_text(getattr(defaults, name))}", meaning


def _text(value: Any) -> str:
    """A default as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    return str(value)


def _columns(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Names and their texts side by side, as wide as the terminal, within reason."""
    rows = list(rows)
    left = min(_LEFT, 4 + max(len(name) for name, _ in rows))
    width = min(shutil.get_terminal_size().columns, _WIDEST) - left
    for name, text in rows:
        first, *rest = textwrap.wrap(text, max(30, width)) or [""]
        if len(name) + 4 > left:
            yield f"  {name}"
            name = ""
        yield f"  {name:<{left - 2}}{first}"
        yield from (" " * left + line for line in rest)
