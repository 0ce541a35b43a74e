"""What `csipipe channels` does: generate DIR, check DIR, look DIR [--output FILE.png]."""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser

from csipipe import channels
from csipipe.channels import checkup, export, profileplot, statistics
from csipipe.channels.layout import ANGLES, DELAYS
from csipipe.channels.source import Site
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import SOURCES

ABOUT = "Generates, examines and draws CSI data in CsiNet's format, in one process."
BUILT_IN = [name for name, source in SOURCES.items() if not source.folder]
"""Sources that may be given instead of a folder."""


def generate(
    folder: str,
    environment: Site = "indoor",
    train: int = 8000,
    val: int = 1000,
    test: int = 1000,
    seed: int = 0,
) -> bool:
    """Write generated channels as CsiNet's files; nothing is overwritten.

    Args:
        folder: where to write; created if it doesn't exist.
        environment: indoor or outdoor.
        train: rows of DATA_Htrain…; CsiNet has 100,000.
        val: rows of DATA_Hval…; CsiNet has 30,000.
        test: rows of DATA_Htest… and of DATA_HtestF…_all (for ρ); CsiNet has 20,000.
        seed: of the channels; the same seed makes the same rows, however many are asked for.
    """
    for file in export.write_files(
        Path(folder), environment, train=train, val=val, test=test, seed=seed
    ):
        speed = file.rows / max(file.seconds, 1e-9)
        size = file.path.stat().st_size / 2**20
        print(f"{file.path}: {file.rows:,} rows, {size:.1f} MiB, {speed:,.0f} rows/s of CPU time")
    return True


def check(
    source: str,
    environment: Site | None = None,
    beside: str | None = None,
    seed: int = 0,
) -> bool:
    """Examine CsiNet's files: layout, range, scaling, domain, duplicates; with a verdict.

    Exits with status 1 unless every file is good.

    Args:
        source: folder with DATA_Htrainin.mat and its siblings, or synthetic.
        environment: indoor or outdoor; by default both, as far as there are files.
        beside: another folder, or synthetic, whose statistics go into a second column.
        seed: seed of synthetic channels.
    """
    good = True
    for site in _sites(source, environment):
        checked = _channels(source, site, seed)
        good = good and checked.good
        print("\n".join(checkup.report(checked)))
        columns = {_title(source): checked.figures()}
        if beside is not None:
            columns[_title(beside)] = _channels(beside, site, seed).figures()
        print(f"\n{site}\n{statistics.table(columns)}\n", flush=True)
    return good


def look(
    source: str, output: str = "channels.png", environment: Site | None = None, seed: int = 0
) -> bool:
    """Draw channels: three samples, the mean delay profile and the mean angle profile.

    Args:
        source: folder with DATA_Htrainin.mat and its siblings, or synthetic.
        output: the PNG file to write; an existing one is replaced.
        environment: indoor or outdoor; by default both, as far as there are files.
        seed: seed of synthetic channels.
    """
    sets = {}
    for site in _sites(source, environment):
        found = _channels(source, site, seed).sets
        if found is not None:
            sets[f"{site} ({_title(source)}, {len(found[1]):,} test rows)"] = found[1]
    if not sets:
        raise ValueError(f"no file in {source} has rows that can be drawn; run check on it.")
    profileplot.draw(sets, Path(output))
    print(f"{output}: {', '.join(sets)}")
    return True


def _sites(source: str, environment: Site | None) -> list[Site]:
    found: list[Site] = ["indoor", "outdoor"]
    if source not in BUILT_IN:
        found = checkup.environments(Path(source))
    if environment is None:
        return found
    if environment not in found:
        raise ValueError(f"{source} has no {environment} files, only {found[0]} ones.")
    return [environment]


def _channels(source: str, site: Site, seed: int) -> checkup.Checked:
    if source in BUILT_IN:
        data = DataSettings(source=source, seed=seed)
        return checkup.generated(channels.open_source(data, ANGLES, DELAYS), site)
    return checkup.check_folder(Path(source), site)


def _title(source: str) -> str:
    return "generated" if source in BUILT_IN else Path(source).resolve().name


COMMANDS: dict[str, Callable[..., bool]] = {"generate": generate, "check": check, "look": look}


def parser() -> ArgumentParser:
    """A parser of the three commands, from their signatures and docstrings."""
    prog = "python -m csipipe channels"
    parser = ArgumentParser(prog=prog, description=ABOUT, exit_on_error=False)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        about = (function.__doc__ or "").split("Args:")[0].strip()
        command = ArgumentParser(description=about, exit_on_error=False)
        command.add_function_arguments(function, as_positional=True)
        commands.add_subcommand(name, command, help=about.splitlines()[0])
    return parser


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    debug = "--debug" in arguments
    try:
        values = parser().parse_args(arguments)
        name = values.subcommand
        return 0 if COMMANDS[name](**values[name].as_dict()) else 1
    except (ArgumentError, OSError, TypeError, ValueError) as error:
        if debug:
            traceback.print_exception(error)
        print(f"csipipe: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
