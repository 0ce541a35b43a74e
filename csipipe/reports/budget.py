"""How long runs train: as many iterations as each takes in a given time, measured first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from csipipe.reports import start
from csipipe.reports.runs import Run, State, placed, sort
from csipipe.settings.config import ModelSettings, Settings

PROBED = 12
"""Iterations by which a run's speed is measured."""
EVALUATED = 64
"""Test rows of such a run."""


def within(
    wanted: Sequence[Run], minutes: float, out: Path, train: Callable[[Sequence[Run]], object]
) -> list[Run]:
    """Give every run as many iterations as its method and model train in `minutes`.

    All others that differ in data or seed get the same number. The measurement is a short run in
    `out`/runs/probe-…, which stays there, so that the same command started again continues.

    Args:
        train: trains what isn't finished, and says or raises what failed.

    Returns:
        The runs whose speed is known.

    Raises:
        ValueError: so short a time that there wouldn't be an iteration.
    """
    first: dict[tuple[str, ModelSettings], Run] = {}
    for run in wanted:
        first.setdefault(_kind(run), run)
    probes = {
        kind: longest(placed(f"probe-{run.name}", _quiet(run), out), PROBED)
        for kind, run in first.items()
    }
    train(list(probes.values()))
    known = {run.name for run in sort(probes.values())[State.FINISHED]}
    seconds = {
        kind: seconds_per_iteration(probe) for kind, probe in probes.items() if probe.name in known
    }
    found = []
    for run in wanted:
        if (each := seconds.get(_kind(run))) is None:
            continue
        if 60 * minutes < each:
            raise ValueError(
                f"a budget of {60 * minutes:g} s is shorter than one iteration of {run.name} "
                f"({each:.2g} s), and there is an evaluation at the end; give more."
            )
        found.append(longest(run, int(60 * minutes / each)))
    return found


def longest(run: Run, iterations: int) -> Run:
    """The same run with so many iterations."""
    train = replace(run.settings.train, iterations=iterations)
    return Run(run.name, replace(run.settings, train=train))


def complete(wanted: Sequence[Run], out: Path, processes: int) -> None:
    """Train what isn't finished, one run after the other.

    Raises:
        ValueError: a run failed; says which and why.
    """
    states = sort(wanted)
    missing = [*states[State.INTERRUPTED], *states[State.MISSING]]
    if failed := start.start(missing, out, processes) if missing else {}:
        lines = [f"{name}: {why}" for name, why in failed.items()]
        raise ValueError("\n  ".join([f"{len(failed)} run(s) failed:", *lines]))


def seconds_per_iteration(run: Run) -> float:
    """Median of a finished run, without evaluations."""
    return float(json.loads((run.folder / "summary.json").read_text())["seconds_per_iteration"])


def _kind(run: Run) -> tuple[str, ModelSettings]:
    return run.settings.method, run.settings.model


def _quiet(run: Run) -> Settings:
    """Evaluated once, at the end, on few rows: only seconds per iteration are wanted."""
    settings = run.settings
    there = sum(span.size for span in run.dealt().test)
    return replace(
        settings,
        data=replace(settings.data, test_samples=min(there, EVALUATED)),
        train=replace(settings.train, personal_iterations=0),
        run=replace(settings.run, profile=False, eval_every=PROBED, save_every=PROBED),
    )
