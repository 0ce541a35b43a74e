"""What the reports' commands share: options, and runs from a folder, started if missing."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from csipipe.reports import preset as presets
from csipipe.reports import runs as states
from csipipe.reports import start
from csipipe.reports.preset import Preset
from csipipe.reports.runs import Run, State
from csipipe.settings.config import DataSettings


@dataclass(frozen=True)
class Report:
    """A report being made: its preset and folder."""

    preset: Preset
    out: Path
    quick: bool
    collect: bool
    jobs: int

    def file(self, name: str) -> Path:
        """A file of the report; quick ones have another name."""
        stem, _, ending = name.partition(".")
        return self.out / (f"{stem}-quick.{ending}" if self.quick else name)


@dataclass(frozen=True)
class Found:
    """What became of the runs that a report asked for."""

    finished: dict[str, Run]
    absent: dict[str, str]
    """Why a run is missing, by its name."""
    failed: bool
    """Whether a run was started and didn't finish."""

    def notes(self) -> str:
        """A paragraph for the verdict; empty if no run is missing."""
        if not self.absent:
            return ""
        lines = [f"- {name}: {why}" for name, why in self.absent.items()]
        return f"{len(self.absent)} run(s) are not in this report:\n\n" + "\n".join(lines)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of every report; what isn't one of them is a setting of the runs."""
    parser.add_argument(
        "--preset",
        default="laptop",
        help="laptop, paper, generated, accuracy, or a YAML file of that kind (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer panels, points or seeds")
    parser.add_argument(
        "--out", help="folder of the reports and their runs; by default reports/<preset>-<data>"
    )
    parser.add_argument(
        "--collect", action="store_true", help="start nothing; draw what is finished"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument(
        "--processes", type=int, help="ranks of a run, at most; by default the preset's. One GPU: 1"
    )
    parser.add_argument("--seeds", type=int, help="only the first so many of the preset's seeds")


def report(options: Namespace) -> Report:
    """The report that the options ask for.

    Raises:
        ValueError: options or settings that can't be used.
    """
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}; it must be at least 1.")
    preset = presets.load(options.preset, options.quick, options.settings, options.decided)
    if options.processes is not None:
        if options.processes < 1:
            raise ValueError(f"--processes is {options.processes}; it must be at least 1.")
        preset = replace(preset, processes=options.processes)
    if options.seeds is not None:
        if not 1 <= options.seeds <= len(preset.seeds):
            raise ValueError(
                f"--seeds is {options.seeds}; preset {preset.name} has {len(preset.seeds)}, so "
                f"choose a number from 1 to {len(preset.seeds)}."
            )
        preset = replace(preset, seeds=preset.seeds[: options.seeds])
    elif options.quick:
        preset = replace(preset, seeds=preset.seeds[: options.quick_seeds])
    data = preset.common().data
    out = Path(options.out or f"reports/{preset.name}-{_data_name(data)}")
    return Report(preset, out, options.quick, options.collect, options.jobs)


def _data_name(data: DataSettings) -> str:
    return data.source if data.path is None else Path(data.path).resolve().name


def obtain(report: Report, wanted: Iterable[Run]) -> Found:
    """The runs that a report needs, trained if they are missing.

    Raises:
        ValueError: one of their folders can't be used, two runs have one name, or none can train on
            these data; nothing was started.
    """
    runs = states.named(wanted)
    found = states.sort(runs.values())
    finished, missing = found[State.FINISHED], [*found[State.INTERRUPTED], *found[State.MISSING]]
    print(f"{report.out}: {len(finished)} of {len(runs)} runs are finished", file=sys.stderr)
    if report.collect or not missing:
        absent = {r.name: "interrupted" for r in found[State.INTERRUPTED]}
        absent |= {r.name: "not started yet" for r in found[State.MISSING]}
        for name, why in absent.items():
            print(f"  {name}: {why}", file=sys.stderr)
        return Found({run.name: run for run in finished}, absent, failed=False)
    unfit = states.unfit(missing)
    if len(unfit) == len(runs):
        reasons = "\n  ".join(dict.fromkeys(unfit.values()))
        raise ValueError(f"none of the {len(runs)} runs can train on these data:\n  {reasons}")
    for name, why in unfit.items():
        print(f"  {name}: not started: {why}", file=sys.stderr)
    ready = [run for run in missing if run.name not in unfit]
    failed = unfit | start.start(ready, report.out, report.preset.processes, report.jobs)
    done = {run.name: run for run in states.sort(runs.values())[State.FINISHED]}
    absent = {name: failed.get(name, "not finished") for name in runs if name not in done}
    return Found(done, absent, failed=bool(absent))


def close(found: Found, files: Iterable[Path]) -> int:
    """Report what failed and which of these files there are; returns the exit code."""
    for file in files:
        if file.exists():
            print(file)
    if found.failed:
        names = ", ".join(found.absent)
        print(
            f"csipipe: error: {len(found.absent)} run(s) failed and are not in the report: "
            f"{names}; the same command starts them again.",
            file=sys.stderr,
        )
    return int(found.failed)
