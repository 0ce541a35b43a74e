"""Settings from the command line and from YAML files, and back."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from csipipe.files import given_or_shipped
from csipipe.settings import manual
from csipipe.settings.config import Settings

PATHS = {
    "topology": ("profile",),
    "data": ("path",),
    "train": ("deepspeed",),
    "run": ("dir", "resume"),
}
"""Settings that are paths, by section."""
_ALIKE = 0.8
"""Of two names of settings, of which one may be the other mistyped; 1 is the same."""
TRAIN = "torchrun --nproc_per_node=4 -m csipipe train"


def parser(description: str, prog: str = TRAIN) -> ArgumentParser:
    """A parser of `--help`, `--config`, `--print_config` and `--debug`; `settings` adds the rest.

    So help is a page of these, and a page for each section of the settings.

    Args:
        description: what the command does.
        prog: how it is started.
    """
    parser = ArgumentParser(
        prog=prog,
        description=description,
        usage="%(prog)s [options] [--section.key value …]",
        formatter_class=manual.Formatter,
        epilog=manual.overview(),
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "-h",
        "--help",
        nargs="?",
        action=_Help,
        default=SUPPRESS,
        metavar="SECTION",
        help=f"this page, or the settings of a section: {', '.join(manual.SECTIONS)}, all",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; later arguments win"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


class _Help(Action):
    """Print the first page, or a section, and exit."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        if values is None:
            parser.print_help()
        elif values == "all":
            print(manual.everything())
        elif values in manual.SECTIONS:
            print(manual.page(values))
        else:
            raise ArgumentError(
                self,
                f"there is no section {values!r}; expected {', '.join(manual.SECTIONS)} or all.",
            )
        parser.exit()


def read(arguments: Sequence[str]) -> Settings:
    """The settings that arguments give, where nobody asks for help: a run's, a report's.

    Raises:
        ValueError: an unknown setting, a wrong type or a value that can't be used.
    """
    return Settings(**sections(arguments))


def sections(arguments: Sequence[str]) -> dict[str, Any]:
    """As `read`, but by section, before anything is refused that doesn't suit the method."""
    found, _ = _parsed(_reader(), arguments)
    return found


def settings(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Settings, Namespace]:
    """As `read`, with a command's own parser; returns everything that was parsed, too."""
    found, values = _parsed(parser, arguments)
    return Settings(**found), values


@functools.cache
def _reader() -> ArgumentParser:
    return parser("")


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[dict[str, Any], Namespace]:
    try:
        # the first page of help has no room for every setting
        if not parser.groups and not _asks_for_help(arguments):
            parser.add_class_arguments(Settings)
        parsed = parser.parse_args(list(_with_shipped(arguments)))
        _refuse_null(Settings, parsed)
        values = parser.instantiate(parsed)
    except (ArgumentError, TypeError) as error:
        near = f"\nDid you mean {known}?" if (known := _nearest(str(error))) else ""
        file = _refused_file(parser, arguments)
        said = f"{file}: {error}" if file and file not in str(error) else f"{error}"
        raise ValueError(f"{said}{near}\nRun with --help for the settings.") from error
    return {f.name: _at_home(f.name, values[f.name]) for f in fields(Settings)}, values


def _refused_file(parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """The first `--config` that can't be read, which an error doesn't name; empty: none."""
    words = [part for word in _with_shipped(arguments) for part in word.split("=", 1)]
    files = [file for option, file in pairwise(words) if option == "--config"]
    for file in filter(os.path.isfile, files):
        try:
            parser.parse_args(["--config", file])
        except (ArgumentError, TypeError):
            return file
    return ""


def _nearest(refusal: str) -> str:
    """The settings whose names are nearest to those that a parser didn't recognise."""
    _, found, words = refusal.partition("unrecognized arguments:")
    wrong = [w.split("=")[0].lstrip("-") for w in words.split() if w.startswith("--")]
    names = list(dotted(plain(Settings()))) if found else []
    near = [get_close_matches(name, names, 1, _ALIKE) for name in wrong]
    return " ".join(f"--{name}" for names in near for name in names)


def _refuse_null(section: Any, parsed: Any, prefix: str = "") -> None:
    """Refuse (ValueError) null where a setting has a value, and where settings belong."""
    for field in fields(section):
        value, inner = parsed[field.name], field.default_factory
        if value is None and field.default is not None:
            raise ValueError(
                f"{prefix}{field.name} is null; leave it out for its default, or see --help."
            )
        if inner is not MISSING and is_dataclass(inner):
            _refuse_null(inner, value, f"{prefix}{field.name}.")


def _at_home(name: str, section: Any) -> Any:
    """A section with `~` expanded in its paths, which no shell does in a file."""
    paths = {path: getattr(section, path) for path in PATHS.get(name, ())}
    home = {path: os.path.expanduser(value) for path, value in paths.items() if value is not None}
    return replace(section, **home) if home else section


def _with_shipped(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with presets that come with csipipe found from any folder."""
    before = ""
    for word in arguments:
        option, is_pair, value = word.partition("=")
        if before == "--config":
            yield given_or_shipped(word)
        elif is_pair and option == "--config":
            yield f"{option}={given_or_shipped(value)}"
        else:
            yield word
        before = word


class RunParser(argparse.ArgumentParser):
    """A parser of `RUN [options] [--section.key value …]`, for commands on an existing run.

    Args:
        prog: how the command is started.
        about: what it does.
    """

    def __init__(self, prog: str, about: str) -> None:
        more = (
            "All other arguments are settings of training that replace the run's, "
            "for example --data.source csinet --data.path DIR."
        )
        super().__init__(prog=prog, description=about, epilog=more, allow_abbrev=False)
        self.add_argument("run", metavar="RUN", help="directory of a run")
        self.add_argument(
            "--weights",
            default="last",
            help="last (default), best (on held-out rows), or the number of a checkpoint",
        )
        self.add_argument("--debug", action="store_true", help="show a traceback with an error")

    def parse(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own options, and the remaining arguments, which are settings.

        Raises:
            ValueError: an option that is missing or can't be used.
        """
        if not arguments:
            self.print_help()
            sys.exit(2)
        if arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments):
            self.error(f"RUN comes first, before {arguments[0]}")
        options, changes = self.parse_known_args(arguments)
        own = [name for action in self._actions for name in action.option_strings]
        for name in (word.split("=")[0] for word in changes if word.startswith("--")):
            near = get_close_matches(name, own, 1, _ALIKE)
            if near and "." not in name:
                self.error(f"there is no option {name} (did you mean {near[0]}?)")
        return options, changes

    def error(self, message: str) -> NoReturn:
        """Report a mistake like any other error."""
        raise ValueError(f"{message}; see {self.prog} --help.")


def print_if_asked(about: str, arguments: Sequence[str], speaks: bool) -> None:
    """Print help or the configuration and exit, if asked.

    Args:
        about: what the command does.
        speaks: this is the rank that prints.
    """
    asked = _asks_for_help(arguments) or any(a.startswith("--print_config") for a in arguments)
    if asked and not speaks:
        sys.exit(0)
    if asked:
        try:
            settings(parser(about), arguments)  # prints and exits
        except ValueError as error:
            sys.exit(f"csipipe: error: {error}")


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(a.split("=")[0] in ("-h", "--help") for a in arguments)


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as 1e-3 too, which are numbers to jsonargparse, but not in YAML 1.1."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


def to_yaml(settings: Settings) -> str:
    """Complete settings as YAML, to be read with `--config`."""
    return yaml.dump(plain(settings), Dumper=_Dumper, sort_keys=False)


def plain(settings: Settings) -> dict[str, Any]:
    """Complete settings as YAML and JSON have them."""
    return plainly(vars(settings))


def plainly(sections: Mapping[str, Any]) -> dict[str, Any]:
    """As `plain`, of sections."""
    return {name: _plain(section) for name, section in sections.items()}


def dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings from `plain`, or from a YAML file, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in dotted(value).items()}
        else:
            flat[name] = value
    return flat


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key and both values, None for a missing one, wherever two flat dictionaries differ."""
    for key in dict.fromkeys([*wanted, *found]):
        if found.get(key) != wanted.get(key):
            yield key, found.get(key), wanted.get(key)


def argument(value: Any) -> str:
    """A setting's value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
