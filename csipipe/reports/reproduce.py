"""What `csipipe reproduce` does: the paper's table and figures, a report at a time."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from types import ModuleType

from csipipe.entry import refusing
from csipipe.reports import (
    accuracy,
    array,
    averaging,
    bytes,
    fig5,
    fig6,
    gap,
    headline,
    plan,
    search,
    table1,
)

ABOUT = """Makes the paper's figures from training runs. Missing runs are started, one torchrun
after the other; the same command resumes an interrupted report. Settings of training, such as
--data.source csinet --data.path DIR, are passed on to all runs."""

REPORTS: dict[str, ModuleType] = {
    "table1": table1,
    "fig5": fig5,
    "fig6": fig6,
    "headline": headline,
    "bytes": bytes,
    "averaging": averaging,
    "gap": gap,
    "accuracy": accuracy,
    "plan": plan,
    "search": search,
}
ARRAYS: dict[str, array.Wanted] = {
    "fig5": fig5.wanted,
    "fig6": fig6.wanted,
    "headline": headline.wanted,
    "bytes": bytes.wanted,
    "averaging": averaging.wanted,
    "gap": gap.wanted,
}
"""Reports whose runs can be started as a SLURM array."""


def parser() -> ArgumentParser:
    """A parser of the reports' own options."""
    prog = "python -m csipipe reproduce"
    parser = ArgumentParser(prog=prog, description=ABOUT, allow_abbrev=False)
    reports = parser.add_subparsers(dest="report", required=True, metavar="REPORT")
    for name, module in REPORTS.items():
        about = (module.__doc__ or "").strip()
        report = reports.add_parser(
            name,
            help=about.splitlines()[0],
            description=about,
            epilog="Reports with a --preset pass all other arguments on to their runs.",
            allow_abbrev=False,
        )
        module.add_arguments(report)
        report.set_defaults(
            decided=getattr(module, "DECIDED", ()),
            quick_seeds=getattr(module, "QUICK_SEEDS", None),
            sbatch=False,
            pick=None,
        )
        if name in ARRAYS:
            array.add_arguments(report)
        report.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


@refusing(OSError, RuntimeError, ValueError)
def main(arguments: list[str]) -> int:
    """Make one report; returns the exit code."""
    options, settings = parser().parse_known_args(arguments)
    options.settings = settings
    try:
        if settings and "preset" not in options:
            raise ValueError(f"{options.report} has no option {settings[0]}; see --help.")
        if array.asked(options):
            array.answer(options, ARRAYS[options.report])
            return 0
        return int(REPORTS[options.report].run(options) or 0)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130
