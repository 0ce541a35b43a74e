"""What `csipipe slurm` does: show where the sbatch scripts are, or copy them to be adapted."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path

from csipipe.files import in_words, naming, shipped

ABOUT = """Shows where the sbatch scripts that came with csipipe are, or copies them: a site changes
the #SBATCH lines on top of a script (partition, account, time) and the first lines of common.sh."""


def parser() -> ArgumentParser:
    """A parser of the command's option."""
    parser = ArgumentParser(prog="python -m csipipe slurm", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--copy", metavar="DIR", type=Path, help="a new folder to copy them to")
    return parser


def main(arguments: list[str]) -> int:
    """Show or copy; returns the exit code."""
    target: Path | None = parser().parse_args(arguments).copy
    folder = shipped("slurm")
    if target is not None:
        try:
            _copy(folder, target)
        except FileExistsError:
            print(f"csipipe: error: --copy: {target} exists; choose a new folder.", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"csipipe: error: --copy: {in_words(error)}", file=sys.stderr)
            return 1
        folder = target
    for script in sorted(folder.glob("*.sbatch")):
        print(script)
    return 0


def _copy(folder: Path, target: Path) -> None:
    """Copy the files of a folder into a new one, all or none (OSError)."""
    target.mkdir(parents=True)
    try:
        with naming(target):
            for file in folder.iterdir():
                shutil.copy(file, target)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
