"""NMSE, ρ and SGCS that methods reach in a given time, beside the ceiling and published figures.

Every run trains as many iterations as its method does in --budget, which a short run measures
first. Shown are the weights that were best on held-out training rows, never chosen by the test set.
"""

from __future__ import annotations

import math
import re
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.evaluation import samples, testset
from csipipe.evaluation.testset import Rows
from csipipe.files import write_file, write_table
from csipipe.measure.metrics import to_db
from csipipe.plotting import name_of
from csipipe.reports import budget, command, pages, runs
from csipipe.reports.command import Found, Report
from csipipe.reports.curves import Curve
from csipipe.reports.preset import OURS, REFERENCE
from csipipe.reports.runs import Run
from csipipe.run import ceiling, trained
from csipipe.settings.config import Environment, Settings

METHODS = (REFERENCE, OURS, "fedavg")
ENVIRONMENTS: tuple[Environment, ...] = ("indoor", "outdoor")
PUBLISHED: Mapping[str, Mapping[tuple[Environment, int], float]] = {
    "CsiNet": {("indoor", 512): -17.36, ("outdoor", 512): -8.75},
    "CRNet, 2,500 epochs": {
        ("indoor", 512): -26.99,
        ("outdoor", 512): -12.70,
        ("indoor", 256): -16.01,
        ("outdoor", 256): -8.04,
    },
    "CLNet, 1,000 epochs": {
        ("indoor", 512): -29.16,
        ("outdoor", 512): -12.88,
        ("indoor", 256): -15.60,
        ("outdoor", 256): -8.29,
    },
}
"""Centred NMSE in dB on COST 2100's files of 32 × 32, by environment and c1; from the authors'
repositories (sydney222/Python_CsiNet, Kylin9511/CRNet, SIJIEJI/CLNet)."""
_ABOUT_PUBLISHED = """Published figures are of one model trained on all of COST 2100's 100,000 rows,
of other architectures without a second bottleneck; CRNet's took 1.25 million steps of 200 rows,
and its checkpoint was chosen by the test set."""
_UNMEASURED = "the short run that measures how long its iterations take isn't finished"
DECIDED = ("train.iterations",)
"""What this report sets for each run, beside what all reports do."""
_UNITS = {"s": 1 / 60, "m": 1.0, "h": 60.0}

Cell = tuple[Environment, int]
"""Environment and c1."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a run reached on the test set, and by how much training.

    Attributes:
        nmse_db: centred; ρ and SGCS are NaN where the data have no HF_all.
        ceiling_db: PCA's with c2 components; NaN if it isn't known.
        rows: training rows seen, of all UEs, with repetition.
    """

    method: str
    cell: Cell
    seed: int
    nmse_db: float
    rho: float
    sgcs: float
    ceiling_db: float
    iterations: int
    rows: int
    seconds: float


def add_arguments(parser: ArgumentParser) -> None:
    """Options of every report, and the budget."""
    command.add_arguments(parser)
    parser.set_defaults(preset="accuracy")
    parser.add_argument(
        "--budget",
        default="30m",
        help="time of each run's training, such as 90s, 30m (the default), 2h; or iterations",
    )


def wanted(report: Report) -> dict[tuple[str, Cell, int], Run]:
    """Every method, cell and seed, their iterations still the preset's."""
    preset, found = report.preset, {}
    for ratio in preset.compression:
        for environment in ENVIRONMENTS:
            for method in METHODS:
                for seed in preset.seeds:
                    run = runs.make(preset, report.out, method, environment, ratio, seed)
                    cell = (environment, run.settings.model.c1)
                    found[method, cell, seed] = run
    return found


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    amount = parse(options.budget)
    report = command.report(options)
    every = wanted(report)
    keys = {one.name: key for key, one in every.items()}
    asked = amount(list(every.values()), report)
    found = command.obtain(report, asked) if asked else Found({}, {}, failed=False)
    measured = {one.name for one in asked}
    if unmeasured := {name: _UNMEASURED for name in keys if name not in measured}:
        failed = found.failed or not report.collect
        found = Found(found.finished, found.absent | unmeasured, failed)
    rows: dict[Environment, Rows] = {}
    reached, curves = [], {}
    for one in found.finished.values():
        method, cell, seed = keys[one.name]
        if cell[0] not in rows:
            rows[cell[0]] = testset.load(one.settings)
        reached.append(measure(one, rows[cell[0]], cell))
        curves[method, cell, seed] = one.curve()
    table, picture, page = files = [report.file(f"accuracy.{e}") for e in ("csv", "png", "md")]
    write_csv(table, reached)
    if reached:
        per_iteration = {one.method: one.rows / one.iterations for one in reached}
        plotting.save(draw(curves, per_iteration, reached), picture)
    write_file(page, text(reached, options.budget, report.preset.common(), found.notes()))
    return command.close(found, files)


def parse(text: str) -> Callable[[Sequence[Run], Report], list[Run]]:
    """What gives runs their iterations by a budget in words (ValueError)."""
    if text.isdigit() and int(text):
        return lambda asked, _: [budget.longest(one, int(text)) for one in asked]
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if matched is None or not float(matched[1]):
        raise ValueError(
            f"--budget is {text!r}; expected a time such as 90s, 30m or 2h, or a number of "
            "iterations such as 5000."
        )
    minutes = float(matched[1]) * _UNITS[matched[2]]

    def measured(asked: Sequence[Run], report: Report) -> list[Run]:
        return budget.within(asked, minutes, report.out, lambda p: command.obtain(report, p))

    return measured


def measure(run: Run, rows: Rows, cell: Cell) -> Reached:
    """Figures of a finished run.

    Raises:
        ValueError: weights that are missing or damaged.
    """
    settings, bound = run.settings, ceiling.noted(run.folder)
    known = bound.nmse_db if bound is not None and bound.bound else None
    train = settings.train
    best = trained.BEST if settings.data.holdout else trained.LAST
    mean = samples.means(trained.read(run.folder, weights=best), rows)
    each = settings.participants * train.batch_size * train.local_steps
    return Reached(
        method=settings.method,
        cell=cell,
        seed=train.seed,
        nmse_db=to_db(mean["nmse"]),
        rho=mean["rho"],
        sgcs=mean["sgcs"],
        ceiling_db=math.nan if known is None else known,
        iterations=train.iterations,
        rows=train.iterations * each,
        seconds=train.iterations * budget.seconds_per_iteration(run),
    )


def write_csv(file: Path, reached: Sequence[Reached]) -> None:
    """One row per run: the cell, and the fields of `Reached`."""
    names = [field.name for field in fields(Reached) if field.name != "cell"]
    rows = [[*r.cell, *(getattr(r, name) for name in names)] for r in reached]
    write_table(file, ["environment", "c", *names], rows)


def text(reached: Sequence[Reached], amount: str, common: Settings, notes: str) -> str:
    """The Markdown page."""
    parts = []
    for cell in dict.fromkeys(r.cell for r in reached):
        here = [r for r in reached if r.cell == cell]
        lines = [
            _row(mine)
            for method in METHODS
            if (mine := [one for one in here if one.method == method])
        ]
        parts += [
            f"## {name_of(cell[0])}, c = {cell[1]}",
            pages.table(
                ["method", "NMSE (dB)", "ρ", "SGCS", "ceiling (dB)", "iterations", "rows seen"],
                lines,
            ),
            _published(cell, common),
        ]
    seeds = sorted({r.seed for r in reached})
    data = f"{common.data.source}{f' ({common.data.path})' if common.data.path else ''}"
    about = (
        f"{common.topology.ues} UEs × {common.train.batch_size} rows per iteration, channels: "
        f"{data}; each run: {_in_words(amount)}; seeds {seeds}: medians, in "
        "brackets the lowest and the highest. Weights are the best on held-out training rows. "
        "ceiling: PCA with c2 components of the training rows; that of unlimited rows is what a "
        "linear head can't beat."
    )
    return pages.page("Accuracy", about, *parts, notes)


def _in_words(amount: str) -> str:
    return f"{amount} iterations" if amount.isdigit() else f"{amount} of training"


def _row(found: Sequence[Reached]) -> list[str]:
    nmse = [r.nmse_db for r in found]
    middle = f"{statistics.median(nmse):.2f}"
    if len(found) > 1:
        middle += f" ({min(nmse):.2f} … {max(nmse):.2f})"
    others = [
        statistics.median(getattr(r, name) for r in found) for name in ("rho", "sgcs", "ceiling_db")
    ]
    shown = ["" if math.isnan(x) else f"{x:.{n}f}" for x, n in zip(others, (3, 3, 2), strict=True)]
    amounts = ([r.iterations for r in found], [r.rows for r in found])
    totals = [f"{round(statistics.median(amount)):,}" for amount in amounts]
    return [name_of(found[0].method), middle, *shown, *totals]


def _published(cell: Cell, common: Settings) -> str:
    """Published figures of this cell, in a paragraph."""
    if (common.model.angles, common.model.delays) not in ((32, 32), (None, None)):
        return ""
    found = [f"{name}: {of[cell]:.2f} dB" for name, of in PUBLISHED.items() if cell in of]
    if not found:
        return ""
    return "Published: " + "; ".join(found) + ". " + " ".join(_ABOUT_PUBLISHED.split())


def draw(
    curves: Mapping[tuple[str, Cell, int], Curve],
    per_iteration: Mapping[str, float],
    reached: Sequence[Reached],
) -> Figure:
    """NMSE over training rows, a panel per cell; one seed.

    Args:
        per_iteration: training rows of an iteration, by method.
    """
    cells = list(dict.fromkeys(cell for _, cell, _ in curves))
    first = min(seed for _, _, seed in curves)
    wide = min(2, len(cells))
    high = -(-len(cells) // wide)
    figure = Figure(figsize=(4.0 * wide, 3.2 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).flat
    for axes, cell in zip(panels, cells, strict=False):
        for (method, of, seed), curve in curves.items():
            if of == cell and seed == first:
                x = [n * per_iteration[method] for n in curve.iterations]
                axes.plot(x, curve.nmse_db, **plotting.style(method) | {"marker": ""})
        bounds = [r.ceiling_db for r in reached if r.cell == cell and not math.isnan(r.ceiling_db)]
        if bounds:
            axes.axhline(bounds[0], color="0.4", linestyle=":", linewidth=1.2, label="ceiling")
        axes.set_title(f"{name_of(cell[0])}, c = {cell[1]}", fontsize=10)
        axes.set_xlim(left=0)
        axes.set_xlabel("training rows seen")
        axes.set_ylabel("test NMSE (dB)")
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize=8)
    return figure
