"""The runs that a report needs: which are finished, which are missing, and whether they fit.

A run is identified by its settings; its folder's name gives those in which a report's runs differ,
so that reports can share runs. Nothing is started here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import yaml

from csipipe import channels
from csipipe.channels import manifest, split
from csipipe.files import DAMAGED, in_words
from csipipe.reports import curves
from csipipe.reports.curves import REMEDY, Curve
from csipipe.reports.preset import DECIDED, Preset, plain
from csipipe.run import lock, slurm, stopping
from csipipe.run.resuming import BEFORE, FREE, OF_THE_DATA
from csipipe.settings import commandline
from csipipe.settings.commandline import argument
from csipipe.settings.config import Environment, Settings

_BEFORE = {lock.NAME, stopping.STOP_FILE, slurm.FILE}
"""What may be in a run's folder before the run starts."""
_SHOWN = 5
"""Most folders that one message names."""
_OF_CURVES = ("run.eval_every", "run.eval_ues")
"""Settings of `run` that decide what a curve's points are."""


class State(Enum):
    """What a run's folder holds."""

    MISSING = "missing"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"


@dataclass(frozen=True)
class Run:
    """One run of `csipipe train` for a report; `settings.run.dir` is its folder."""

    name: str
    settings: Settings

    @property
    def folder(self) -> Path:
        assert self.settings.run.dir is not None
        return Path(self.settings.run.dir)

    def state(self) -> State:
        """What the folder holds.

        Raises:
            ValueError: a damaged or foreign folder, or a run of other settings; says which.
        """
        if not self.folder.exists():
            return State.MISSING
        if self.folder.is_dir() and {file.name for file in self.folder.iterdir()} <= _BEFORE:
            return State.MISSING
        config = self.folder / "config.yaml"
        if not config.is_file():
            raise ValueError(
                f"{self.folder} is in the way: it isn't empty, but holds no run (no config.yaml); "
                "move it away or choose another --out."
            )
        self._check_settings(config)
        summary = self.folder / "summary.json"
        if not summary.is_file():
            return State.INTERRUPTED
        try:
            status = json.loads(summary.read_text())["status"]
        except DAMAGED as error:
            raise ValueError(f"{summary} can't be read ({error}); {REMEDY}.") from error
        if status == "finished":
            curves.read(self.folder)
            return State.FINISHED
        return State.INTERRUPTED

    def curve(self) -> Curve:
        """The learning curve of the finished run."""
        return curves.read(self.folder)

    def dealt(self) -> channels.Deal:
        """Which rows of its data it trains on and is tested on; no values are read.

        Raises:
            ValueError, OSError: it can't train on them; says what has to be another.
        """
        data, model = self.settings.data, self.settings.model
        there = channels.open_source(data, model.angles, model.delays).environments
        if data.where not in (*there, split.ALL, split.NONIID):
            raise ValueError(
                f"this report is on {data.where} channels; {data.path} has {', '.join(there)}. "
                f"Convert them with --environments {data.where} to use them as such."
            )
        return channels.dealt(self.settings)[1]

    def _check_settings(self, config: Path) -> None:
        wanted, usual = plain(self.settings), plain(Settings()) | BEFORE
        try:
            # a setting that is newer than the run had the effect of its default
            found = usual | commandline.dotted(yaml.safe_load(config.read_text()))
        except (AttributeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{config} holds no settings of a run ({' '.join(str(error).split())}); {REMEDY}."
            ) from error
        if unknown := sorted(set(found) - set(wanted)):
            raise ValueError(f"{config} has {unknown[0]}, which is not a setting; {REMEDY}.")
        for key, value in found.items():
            free = key.startswith(FREE) and key not in _OF_CURVES
            free = free or (wanted[key] is None and key in OF_THE_DATA)
            if key == "data.path" and value != wanted[key]:
                self._check_rows()
            if free or value == wanted[key]:
                continue
            remedy = f"start the report with --{key} {argument(value)} to use such runs"
            if key in ("method", *DECIDED):
                remedy = "move the folder away"
            raise ValueError(
                f"{self.folder} was made with {key} {argument(value)}, this report needs "
                f"{argument(wanted[key])}; {remedy}, or choose another --out."
            )

    def _check_rows(self) -> None:
        """Refuse (ValueError) a run of other rows, whose data.path was another."""
        if not (self.folder / manifest.NAME).is_file():
            return
        model = self.settings.model
        source = channels.open_source(self.settings.data, model.angles, model.delays)
        try:
            channels.Manifest.read(self.folder).check(source)
        except ValueError as error:
            raise ValueError(
                f"{self.folder} was made with other data than {self.settings.data.path} ({error}) "
                "Choose another --out for these."
            ) from error


def make(
    preset: Preset, out: Path, method: str, environment: Environment, ratio: int, seed: int
) -> Run:
    """The run of a method at one point of the figures."""
    settings = preset.settings(method, environment, ratio, seed)
    name = f"{method}-{environment}-c{settings.model.c1}-seed{seed}"
    return placed(name, settings, out)


def placed(name: str, settings: Settings, out: Path) -> Run:
    """A run with its folder under `out`."""
    folder = str(out / "runs" / name)
    return Run(name, replace(settings, run=replace(settings.run, dir=folder)))


def unfit(runs: Iterable[Run]) -> dict[str, str]:
    """Why runs can't train on their data, by name."""
    found = {}
    for run in runs:
        try:
            run.dealt()
        except (OSError, ValueError) as error:
            found[run.name] = in_words(error)
    return found


def named(runs: Iterable[Run]) -> dict[str, Run]:
    """Runs by name, each once.

    Raises:
        ValueError: two of one name have other settings; names one of them.
    """
    found: dict[str, Run] = {}
    for run in runs:
        first = found.setdefault(run.name, run)
        if first.settings != run.settings:
            one, other = plain(first.settings), plain(run.settings)
            key = next(key for key in one if one[key] != other[key])
            raise ValueError(
                f"two runs of this report are called {run.name}, one with {key} {one[key]!r}, one "
                f"with {other[key]!r}, so that they would be one; name them by what they differ in."
            )
    return found


def sort(runs: Iterable[Run]) -> dict[State, list[Run]]:
    """Runs by state, each folder once.

    Raises:
        ValueError: naming the folders that are damaged, foreign or of other settings; as `named`.
    """
    sorted_runs: dict[State, list[Run]] = {state: [] for state in State}
    wrong = []
    for run in named(runs).values():
        try:
            sorted_runs[run.state()].append(run)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        more = [f"… and {len(wrong) - _SHOWN} more."] if len(wrong) > _SHOWN else []
        lines = [f"{len(wrong)} run(s) can't be used:", *wrong[:_SHOWN], *more]
        raise ValueError("\n  ".join(lines))
    return sorted_runs
