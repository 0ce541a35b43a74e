"""Fig. 6: test loss against exchange, seven methods and the centralised model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.command import Report, add_arguments
from csipipe.reports.curves import Curve, Unit
from csipipe.reports.fig6_claims import Panels, claims
from csipipe.reports.preset import METHODS, PANELS, REFERENCE, panel_name
from csipipe.reports.runs import Run

__all__ = ["add_arguments", "run"]


def wanted(report: Report) -> dict[tuple[str, str], Run]:
    """A run per panel and method."""
    preset = report.preset
    return {
        (panel, method): runs.make(preset, report.out, method, *PANELS[panel], preset.seeds[0])
        for panel in preset.panels
        for method in (*METHODS, REFERENCE)
    }


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    report = command.report(options)
    asked = wanted(report)
    found = command.obtain(report, asked.values())
    curves = {key: r.curve() for key, r in asked.items() if r.name in found.finished}
    names = ("fig6.csv", "fig6.png", "fig6_bytes.png", "fig6.md")
    table, by_scalars, by_bytes, page = files = [report.file(name) for name in names]
    write_csv(table, curves)
    if curves:
        plotting.save(draw(curves, "scalars"), by_scalars)
        plotting.save(draw(curves, "bytes"), by_bytes)
    write_file(page, verdict(curves, report.preset.panels, found.notes()))
    return command.close(found, files)


def write_csv(file: Path, curves: Panels) -> None:
    header = [
        "panel",
        "environment",
        "compression_ratio",
        "method",
        "iteration",
        "scalars",
        "bytes",
        "test_loss",
        "lowest_ue_loss",
        "highest_ue_loss",
        "nmse_db",
    ]
    rows = [
        [
            panel,
            PANELS[panel][0],
            1 / PANELS[panel][1],
            method,
            iteration,
            curve.scalars[i],
            curve.bytes[i],
            curve.loss[i],
            min(curve.per_ue[i]),
            max(curve.per_ue[i]),
            curve.nmse_db[i],
        ]
        for (panel, method), curve in curves.items()
        for i, iteration in enumerate(curve.iterations)
    ]
    write_table(file, header, rows)


def draw(curves: Panels, unit: Unit) -> Figure:
    """The panels, with one legend under all of them."""
    panels = sorted({panel for panel, _ in curves})
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(
        figsize=(5.2 * columns, 3.5 * lines + 0.9), layout=ConstrainedLayoutEngine(h_pad=0.08)
    )
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, panel, {m: c for (p, m), c in curves.items() if p == panel}, unit)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_axis_off()
    entries: dict[Any, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=3 if columns == 1 else 5,
        frameon=False,
        handlelength=3.5,
    )
    return figure


def _panel(axes: Axes, panel: str, curves: Mapping[str, Curve], unit: Unit) -> None:
    """Loss over exchange; the band spans the UEs."""
    word = "parameters" if unit == "scalars" else "bytes"
    longest = max(max(getattr(c, unit)) for c in curves.values())
    divisor, label = plotting.scale(longest, word)
    for method in METHODS:
        if method in curves:
            curve, look = curves[method], plotting.style(method)
            x = [value / divisor for value in getattr(curve, unit)]
            axes.plot(x, curve.loss, markevery=max(1, len(x) // 6), **look)
            low, high = ([pick(ues) for ues in curve.per_ue] for pick in (min, max))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0)
    if REFERENCE in curves:
        axes.axhline(curves[REFERENCE].end, **plotting.style(REFERENCE))
    axes.set_title(f"({panel}) {panel_name(panel)}", fontsize="medium")
    axes.set_xlabel(f"exchanged ({label})")
    axes.set_ylabel(plotting.LOSS)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    axes.set_xlim(left=0)
    axes.grid(color="0.9")


def verdict(curves: Panels, panels: tuple[str, ...], notes: str) -> str:
    """The Markdown page."""
    rows = []
    for method in (*METHODS, REFERENCE):
        cells = []
        for panel in panels:
            curve = curves.get((panel, method))
            cells.append("" if curve is None else f"{curve.end:.3e} / {curve.scalars[-1]:.3g}")
        rows.append([name_of(method), *cells])
    heads = [f"({p}) {name_of(PANELS[p][0])} 1/{PANELS[p][1]}" for p in panels]
    return pages.page(
        "Fig. 6: test loss against exchanged parameters",
        pages.claims_table(claims(curves)),
        "Test loss at the end (mean of the last three evaluations) / parameters exchanged:",
        pages.table(["method", *heads], rows),
        notes,
    )
