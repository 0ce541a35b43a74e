"""The learning-rate search: one grid for every method, judged on held-out training rows.

The test set is reported by every run, as always, and not read here.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.command import Found, Report, add_arguments
from csipipe.reports.curves import LAST, Curve
from csipipe.reports.preset import METHODS, PANELS, REFERENCE, Search, panel_name
from csipipe.reports.runs import Run

__all__ = ["add_arguments", "run"]

DECIDED = ("train.iterations", "data.holdout")
"""What this report sets for each run, beside what all reports do."""
DIVERGED = "a lower train.lr usually helps"
"""What a run prints when it ends because its loss isn't finite."""
Key = tuple[str, float, int]
"""Method, rate, seed."""


def wanted(report: Report, search: Search) -> dict[Key, Run]:
    """A run per method, rate and seed."""
    asked: dict[Key, Run] = {}
    for method in (*METHODS, REFERENCE):
        for rate in search.grid:
            for seed in search.seeds:
                preset = replace(report.preset, rates={method: rate})
                settings = preset.settings(method, *PANELS[search.panel], seed)
                name = f"search-{method}-lr{rate:g}-seed{seed}"
                asked[method, rate, seed] = runs.placed(name, settings, report.out)
    return asked


def run(options: Namespace) -> int:
    """Search, and write the table and the preset's rates; returns the exit code."""
    report = command.report(options)
    if report.quick:
        raise ValueError(
            "search has no --quick; leave it out, or write fewer rates or iterations into `search` "
            "of a preset of your own."
        )
    search, rates = report.preset.search, report.preset.rates_file
    if search is None or rates is None:
        raise ValueError(
            f"--preset {report.preset.name} takes its learning rates from the paper; there is "
            "nothing to search. Use --preset laptop."
        )
    if options.seeds is not None:
        search = replace(search, seeds=report.preset.seeds)
    own = ("--train.iterations", str(search.iterations), "--data.holdout", str(search.holdout))
    preset = replace(report.preset, arguments=(*report.preset.arguments, *own))
    report = replace(report, preset=preset)
    asked = wanted(report, search)
    found = command.obtain(report, asked.values())
    losses = held_out(asked, found)
    table, page = report.file("search.csv"), report.file("search.md")
    write_table(
        table,
        ["method", "rate", "seed", "holdout_loss"],
        [[*key, loss] for key, loss in losses.items()],
    )
    best = winners(losses, search)
    complete = len(losses) == len(asked)
    write_file(page, verdict(losses, best, search, complete))
    files = [table, page]
    if complete:
        write_rates(rates, best, search, report.preset.common().data.source)
        files.append(rates)
        print("to make figures with the new rates, choose another --out")
    for file in files:
        print(file)
    return 0 if complete else 1


def held_out(asked: Mapping[Key, Run], found: Found) -> dict[Key, float]:
    """Loss on held-out rows at the end of every run; infinite for one that diverged."""
    losses = {}
    for key, one in asked.items():
        if one.name in found.finished:
            losses[key] = _end(one.name, one.curve())
        elif DIVERGED in found.absent.get(one.name, ""):
            losses[key] = math.inf
    return losses


def _end(name: str, curve: Curve) -> float:
    seen = [loss for loss in curve.holdout[-LAST:] if loss is not None]
    if not seen:
        raise ValueError(
            f"run {name} held out no training rows to judge it by; "
            "set search.holdout in the preset above 0."
        )
    return sum(seen) / len(seen)


def medians(losses: Mapping[Key, float], method: str, search: Search) -> dict[float, float]:
    """Median over seeds of a method's held-out loss, by rate; rates without a run are left out."""
    found = {
        rate: [loss for (m, r, _), loss in losses.items() if (m, r) == (method, rate)]
        for rate in search.grid
    }
    return {rate: statistics.median(values) for rate, values in found.items() if values}


def winners(losses: Mapping[Key, float], search: Search) -> dict[str, float]:
    """The rate with the lowest median for every method that has one."""
    best: dict[str, float] = {}
    for method in (*METHODS, REFERENCE):
        by_rate = medians(losses, method, search)
        finite = {rate: loss for rate, loss in by_rate.items() if math.isfinite(loss)}
        if finite:
            best[method] = min(finite, key=lambda rate: finite[rate])
    return best


def write_rates(file: Path, best: Mapping[str, float], search: Search, source: str) -> None:
    """Write the preset's rates."""
    lines = [
        "# Written by csipipe reproduce search: "
        f"{source} channels, panel {search.panel} of Fig. 6.",
        *(f"{method}: {rate!r}" for method, rate in best.items()),
    ]
    write_file(file, "\n".join(lines) + "\n")


def verdict(
    losses: Mapping[Key, float], best: Mapping[str, float], search: Search, complete: bool
) -> str:
    """The Markdown page."""
    rows = []
    for method in (*METHODS, REFERENCE):
        by_rate = medians(losses, method, search)
        cells = []
        for rate in search.grid:
            loss = by_rate.get(rate)
            text = "missing" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.3e}"
            cells.append(f"**{text}**" if best.get(method) == rate else text)
        rows.append([name_of(method), *cells])
    edge = [name_of(m) for m, rate in best.items() if rate in (min(search.grid), max(search.grid))]
    return pages.page(
        "Learning-rate search",
        f"{panel_name(search.panel)}, {search.iterations} iterations, "
        f"{len(search.seeds)} seed(s). Loss on the {search.holdout:.0%} of the training rows that "
        "were held out: mean of the last three evaluations, median over seeds; the best in bold.",
        pages.table(["method", *(f"lr {rate:g}" for rate in search.grid)], rows),
        f"At the edge of the grid: {', '.join(edge)}." if edge else "",
        "" if complete else "Runs are missing, so the preset's rates were left as they are.",
    )
