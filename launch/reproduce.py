"""The paper's tables and figures: python launch/reproduce.py table1 [--quick]"""

from __future__ import annotations

import argparse
import sys
import traceback
from types import ModuleType

from csipipe.reports import table1

ABOUT = """Measures the paper's tables and figures anew: CSV, plots and a verdict. Plain python."""
REPORTS: dict[str, ModuleType] = {"table1": table1}


def parser() -> argparse.ArgumentParser:
    """A subcommand per report."""
    parser = argparse.ArgumentParser(description=ABOUT)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subparsers(dest="report", required=True, metavar="REPORT")
    for name, report in REPORTS.items():
        about = (report.__doc__ or "").strip()
        report.add_arguments(
            commands.add_parser(name, help=about.splitlines()[0], description=about)
        )
    return parser


def main(arguments: list[str]) -> int:
    """Run one report; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        REPORTS[options.report].run(options)
    except (OSError, RuntimeError, ValueError) as error:
        if options.debug:
            traceback.print_exception(error)
        print(f"csipipe: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
