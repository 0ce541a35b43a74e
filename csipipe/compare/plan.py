"""Which runs a comparison needs, and how long each trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csipipe import models
from csipipe.reports import start
from csipipe.reports.runs import Run, State, placed, sort
from csipipe.settings.config import ModelSettings, Settings

PROBED = 12
"""Iterations by which a model's speed is measured."""


def runs(
    settings: Settings, names: Sequence[str], codewords: Sequence[int], out: Path, seeds: int = 1
) -> list[Run]:
    """A run for every model, codeword size and seed, each model checked.

    Args:
        seeds: how many, from `train.seed` on.

    Raises:
        ValueError: a model that can't be used; named before anything is started.
    """
    found = []
    for name in names:
        for c in codewords:
            model = replace(settings.model, name=name, c1=c)
            models.check(model)
            label = name.replace(":", "-").replace("/", "-")
            for more in range(seeds):
                train = replace(settings.train, seed=settings.train.seed + more)
                seed = f"-seed{train.seed}" if more else ""
                chosen = replace(settings, model=model, train=train)
                found.append(placed(f"{label}-c{c}{seed}", chosen, out))
    return found


def longest(run: Run, iterations: int) -> Run:
    """The same run with so many iterations."""
    train = replace(run.settings.train, iterations=iterations)
    return Run(run.name, replace(run.settings, train=train))


def within(wanted: Sequence[Run], minutes: float, out: Path, processes: int) -> list[Run]:
    """Give every run as many iterations as its model trains in `minutes`, measured one by one.

    All seeds of a model get the same number.

    The measurement is a short run in `out`/runs/probe-…, which stays there, so that the same
    comparison started again continues.

    Raises:
        ValueError: a model that can't be trained; says why.
    """
    first: dict[ModelSettings, Run] = {}
    for run in wanted:
        first.setdefault(run.settings.model, run)
    probes = {
        model: longest(placed(f"probe-{run.name}", _quiet(run.settings), out), PROBED)
        for model, run in first.items()
    }
    complete(list(probes.values()), out, processes)
    seconds = {model: seconds_per_iteration(probe) for model, probe in probes.items()}
    return [longest(run, max(1, int(60 * minutes / seconds[run.settings.model]))) for run in wanted]


def _quiet(settings: Settings) -> Settings:
    """Evaluated once, at the end, and on few rows."""
    return replace(settings, run=replace(settings.run, eval_every=PROBED, save_every=PROBED))


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
