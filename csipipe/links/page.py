"""Measured beside planned seconds, and who reaches a loss first: a page, a table, a picture."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.links.ranks import Found
from csipipe.plotting import name_of
from csipipe.reports import curves, pages
from csipipe.reports.preset import plain
from csipipe.run import trained
from csipipe.run.resuming import FREE, OF_THE_DATA
from csipipe.settings import commandline
from csipipe.settings.commandline import argument
from csipipe.settings.config import Settings

_OWN = (
    "train.iterations",
    "train.personal_iterations",
    "train.lr",
    "train.rates",
    "train.warmup",
    "train.betas",
    "train.seed",
)
"""Settings, or prefixes of them, that a curve has of its own: how long it is, its seed, and Adam's
steps, whose best size isn't the same for all methods. No iteration takes longer with them."""


@dataclass(frozen=True)
class Row:
    """A method over the links of one case; seconds are of an iteration."""

    method: str
    links: str
    free: float
    planned: float
    found: Found
    iterations: int | None
    """Until the loss is reached; None: unknown, or never."""

    @property
    def reaches(self) -> float | None:
        """Seconds of training until the loss is reached."""
        return None if self.iterations is None else self.iterations * self.found.seconds


def times_to(
    folders: Sequence[str], runs: Mapping[str, Settings], loss: float | None
) -> dict[str, int | None]:
    """Iterations until the test loss is reached, by method.

    Args:
        folders: finished runs.
        runs: what is trained over links, by method.
        loss: None: the highest of the curves' lowest, which all of them reach.

    Raises:
        ValueError: a run of another method, or of settings that make another task of it or other
            iterations.
    """
    found = {}
    for folder in folders:
        settings = trained.read(Path(folder)).settings
        method = settings.method
        ours = runs.get(method)
        if ours is None:
            raise ValueError(f"--curves: {folder} trained {method}, not one of --methods.")
        _check_curve(folder, settings, ours)
        found[method] = curves.read(Path(folder))
    target = max(curve.lowest for curve in found.values()) if loss is None else loss
    return {
        method: next(
            (n for n, v in zip(curve.iterations, curve.loss, strict=True) if v <= target), None
        )
        for method, curve in found.items()
    }


def _check_curve(folder: str, theirs: Settings, ours: Settings) -> None:
    """Refuse (ValueError) a run of something else than what is trained over links."""
    for key, there, here in commandline.differences(plain(theirs), plain(ours)):
        free = key.startswith((*FREE, *_OWN)) and key != "data.path"
        if free or (there is None and key in OF_THE_DATA):
            continue
        raise ValueError(
            f"--curves: {folder} was trained with {key} {argument(there)}, links trains with "
            f"{argument(here)}; give --{key} {argument(there)} or another run."
        )


def text(runs: Mapping[str, Settings], rows: Sequence[Row], options: Namespace) -> str:
    """The page, as Markdown."""
    first = next(iter(runs.values()))
    heads = ["method", "links", "s without links", "s planned", "s measured"]
    heads += ["measured / planned", "bytes on the links / in the ledger"]
    if options.curves:
        heads += ["iterations to the loss", "s to the loss"]
    trouble = ""
    if options.trouble:
        trouble = (
            f"Trouble: --trouble {options.trouble}, run.timeout {first.run.timeout:g} s. Median "
            "seconds don't show it; seconds in all: "
            + "; ".join(f"{r.method} {r.links}: {_number(r.found.in_all, '.1f')}" for r in rows)
            + "."
        )
    periods = any(settings.aggregate_every > 1 for settings in runs.values())
    failed = [f"- {r.method}, {r.links}: {r.found.error}" for r in rows if r.found.error]
    return pages.page(
        "Training over links",
        f"{first.topology.ues} UEs on {options.hosts} UE ranks, each rank behind a link of its "
        f"own; {first.train.iterations} iterations, delay {options.delay:g} ms, "
        f"{first.train.precision}. Seconds are medians of an iteration.",
        pages.table(heads, [_cells(row, bool(options.curves)) for row in rows]),
        "Planned: an iteration without links, and the transfers of the method's schedule with "
        "frames' headers, as if computing hid nothing of them. Bytes on the links also hold "
        "set-up, signs of life and evaluations' exchange."
        + (" Averaging every few iterations shows in bytes, not in medians." if periods else ""),
        trouble,
        "Failed:\n\n" + "\n".join(failed) if failed else "",
    )


def _cells(row: Row, reach: bool) -> list[str]:
    ratio = row.found.seconds / row.planned
    seconds = (row.free, row.planned, row.found.seconds)
    cells = [name_of(row.method), row.links, *(_number(value, ".3f") for value in seconds)]
    cells += [_number(ratio, ".2f")]
    cells += [_number(row.found.overhead, ".3f")]
    if reach:
        cells.append("—" if row.iterations is None else f"{row.iterations:,}")
        cells.append("—" if row.reaches is None else _number(row.reaches, ",.0f"))
    return cells


def _number(value: float, form: str) -> str:
    return "—" if math.isnan(value) else format(value, form)


def write(rows: Sequence[Row], page: str, out: Path) -> list[Path]:
    """`links.md`, `links.csv` and, of several links, `links.png`; returns these files."""
    markdown, table, picture = files = [out / f"links.{e}" for e in ("md", "csv", "png")]
    write_file(markdown, page)
    heads = ["method", "links", "free_s", "planned_s", "measured_s", "overhead"]
    heads += ["in_all_s", "iterations_to_loss", "s_to_loss", "error"]
    write_table(
        table,
        heads,
        [
            [
                *(r.method, r.links, r.free, r.planned, r.found.seconds, r.found.overhead),
                *(r.found.in_all, r.iterations, r.reaches, r.found.error),
            ]
            for r in rows
        ],
    )
    over_links = [row for row in rows if not math.isnan(row.planned)]
    if len({row.links for row in over_links}) < 2:
        return [markdown, table]
    plotting.save(draw(over_links), picture)
    return files


def draw(rows: Sequence[Row]) -> Figure:
    """Seconds of an iteration by link, a line per method; where known, also until the loss."""
    reach = any(row.reaches is not None for row in rows)
    figure = Figure(figsize=(4.8 * (1 + reach), 3.8), layout="constrained")
    axes = figure.subplots(1, 1 + reach, squeeze=False)[0]
    cases = list(dict.fromkeys(row.links for row in rows))
    for method in dict.fromkeys(row.method for row in rows):
        mine = [one for one in rows if one.method == method]
        places = [cases.index(one.links) for one in mine]
        look = plotting.style(method)
        axes[0].plot(places, [row.found.seconds for row in mine], **look)
        axes[0].plot(places, [row.planned for row in mine], "x", color=look["color"])
        if reach:
            times = [row.reaches or math.nan for row in mine]
            axes[1].plot(places, times, **look)
    for axis, label in zip(axes, ("s per iteration (×: planned)", "s to the loss"), strict=False):
        axis.set_xticks(range(len(cases)), cases)
        axis.set_yscale("log")
        axis.set_xlabel("link of each UE rank")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure
