"""A report's runs as a SLURM array: slurm/sweep.sbatch starts one per index.

An index is a run's place among the report's runs, which depend only on preset and settings.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from csipipe.files import whole
from csipipe.reports import command
from csipipe.reports import runs as states
from csipipe.reports.command import Report
from csipipe.reports.runs import Run, State, named
from csipipe.run import lock
from csipipe.settings import commandline

SCRIPT = "slurm/sweep.sbatch"
AT_ONCE = 16
"""Jobs of an array that run at the same time, as the script has it; `--array` overrides that."""
Wanted = Callable[[Report], Mapping[Any, Run]]
"""Which runs a report is made of."""


def add_arguments(parser: ArgumentParser) -> None:
    """Options of reports whose runs can be started as an array."""
    parser.add_argument(
        "--sbatch", action="store_true", help="print the sbatch line for what is missing"
    )
    parser.add_argument(
        "--pick", type=int, metavar="INDEX", help="print the settings file of one run of the report"
    )


def asked(options: Namespace) -> bool:
    """Whether the line or the settings of a run are wanted instead of the report."""
    return options.sbatch or options.pick is not None


def answer(options: Namespace, wanted: Wanted) -> None:
    """Print what is `asked`; raises as `pick` and `line`."""
    report = command.report(options)
    runs = wanted(report).values()
    if options.pick is not None:
        print(pick(report, runs, options.pick))
    elif (text := line(report, runs, given(options))) is not None:
        print(text)
    else:
        print(f"{report.out}: no run is missing", file=sys.stderr)


def given(options: Namespace) -> list[str]:
    """The words of the command line that determine a report's runs."""
    words = [options.report, "--preset", options.preset]
    words += ["--quick"] if options.quick else []
    words += ["--out", options.out] if options.out else []
    words += ["--seeds", str(options.seeds)] if options.seeds else []
    words += ["--processes", str(options.processes)] if options.processes else []
    return [*words, *options.settings]


def numbered(wanted: Iterable[Run]) -> list[Run]:
    """Runs by index, each once; raises as `named`."""
    return list(named(wanted).values())


def pick(report: Report, wanted: Iterable[Run], index: int) -> Path:
    """Write the settings of one run; returns their file.

    Raises:
        ValueError: there is no such run, or its folder can't be used.
    """
    runs = numbered(wanted)
    if not 0 <= index < len(runs):
        raise ValueError(
            f"the index is {index}, but the report has {len(runs)} runs; submit it with "
            f"sbatch --array=0-{len(runs) - 1}."
        )
    run = runs[index]
    run.state()
    file = report.out / "configs" / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file, file.with_suffix(f".{os.getpid()}.partial")) as partial:
        partial.write_text(commandline.to_yaml(run.settings))
    return file


def line(report: Report, wanted: Iterable[Run], words: Sequence[str]) -> str | None:
    """The sbatch line for runs that are neither finished nor in progress; None if there are none.

    Args:
        words: those that determine the runs, for the script.

    Raises:
        ValueError: one of their folders can't be used.
    """
    runs = numbered(wanted)
    found = states.sort(runs)
    ready = {run.name for run in found[State.FINISHED]}
    live = set(lock.live([run.folder for run in found[State.INTERRUPTED]]))
    missing = [i for i, run in enumerate(runs) if run.name not in ready and run.folder not in live]
    if not missing:
        return None
    limit = f"%{AT_ONCE}" if len(missing) > AT_ONCE else ""
    head = f"sbatch --array={ranges(missing)}{limit} --ntasks={report.preset.processes} {SCRIPT}"
    return f"{head} {shlex.join(words)}"


def ranges(indices: Sequence[int]) -> str:
    """Ascending indices as SLURM writes them, such as `0-3,7`."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and groups[-1][-1] == index - 1:
            groups[-1][1:] = [index]
        else:
            groups.append([index])
    return ",".join("-".join(map(str, group)) for group in groups)
