"""A comparison as table, CSV and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from statistics import median

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from csipipe.compare.figures import Figures
from csipipe.files import write_table
from csipipe.reports import pages

QUALITY = {"nmse_db": "NMSE (dB)", "rho": "ρ", "sgcs": "SGCS"}
COSTS = {
    "parameters": "parameters",
    "macs_at_ue": "multiply-accumulates at the UE",
    "feedback_bits": "feedback bits",
    "seconds": "training time (s)",
}
_FAIR = (0.75, 1.25)
"""Shares of the minutes between which a comparison is fair."""
_MARKS, _COLOURS = "osD^vP*X", ("black", "#0059b3", "#c0392b", "#4d9900", "0.5", "#8e44ad")


def text(
    found: Sequence[Figures], pca: Mapping[int, float], about: str, minutes: float | None = None
) -> str:
    """The Markdown page; `minutes` is how long each was to be trained."""
    head = ["model", "c1", *QUALITY.values(), *COSTS.values(), "iterations", "ceiling"]
    rows = []
    for group in by_model(found):
        f = group[0]
        rows.append(
            [
                f.model,
                str(f.c1),
                *(_spread([getattr(one, key) for one in group], key) for key in QUALITY),
                *(f"{v:,}" for v in (f.parameters, f.macs_at_ue, f.feedback_bits)),
                f"{median(one.seconds for one in group):,.0f}",
                f"{f.iterations:,}",
                "—" if f.ceiling is None else f"PCA-{f.ceiling}",
            ]
        )
    empty = ["—"] * (len(head) - 3)
    rows += [[f"PCA-{n}", str(n), f"{db:.2f}", *empty] for n, db in sorted(pca.items())]
    rows.append(["floor: a constant 0.5", "0", "0.00", *empty])
    return pages.page(
        "Models compared",
        about,
        pages.table(head, rows),
        _unfair(found, minutes),
        "NMSE is centred. Ceiling: the decoder ends with linear layers, so that its reconstruction "
        "(before its output function) lies in a space of so many dimensions, and PCA with as many "
        "components, fitted to unlimited rows, can't be beaten; —: it ends otherwise and has no "
        "bound. Feedback bits are those of the codeword as it crosses, not quantised further. PCA "
        "is fitted to the NMSE of the training rows of all UEs, at most 20,000 of them.",
    )


def _unfair(found: Sequence[Figures], minutes: float | None) -> str:
    """Which runs had much less than their minutes, or much more."""
    if minutes is None:
        return ""
    names = {f"{f.model} with c1 = {f.c1} ({f.seconds:,.0f} s)": f.seconds for f in found}
    least, most = (60 * minutes * share for share in _FAIR)
    cases = {
        "less": [name for name, seconds in names.items() if seconds < least],
        "more": [name for name, seconds in names.items() if seconds > most],
    }
    unfair = [f"much {how} {', '.join(which)}" for how, which in cases.items() if which]
    if not unfair:
        return ""
    return (
        f"**Not compared fairly**, since they didn't train {minutes:g} minutes: "
        f"{'; '.join(unfair)}. The machine was slower or faster when their speed was measured; "
        "remove these runs and their probe-… from the folder of runs, and start the command again."
    )


def by_model(found: Sequence[Figures]) -> list[list[Figures]]:
    """Runs that differ in their seed alone, together."""
    groups: dict[tuple[str, int], list[Figures]] = {}
    for f in found:
        groups.setdefault((f.model, f.c1), []).append(f)
    return list(groups.values())


def _spread(values: Sequence[float], key: str) -> str:
    """The median; of several also the lowest and the highest."""
    if any(map(math.isnan, values)):
        return "—"
    digits = 2 if key == "nmse_db" else 4
    text = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def write_csv(file: Path, found: Sequence[Figures]) -> None:
    """A line per run."""
    write_table(file, [f.name for f in fields(Figures)], [astuple(f) for f in found])


def draw(found: Sequence[Figures], pca: Mapping[int, float]) -> Figure:
    """A panel for each pair of quality and cost; a colour per model, a mark per codeword size.

    Of several seeds, marks are medians, and bars reach from the lowest to the highest.
    """
    measured = [key for key in QUALITY if not all(math.isnan(getattr(f, key)) for f in found)]
    figure = Figure(figsize=(3.4 * len(COSTS), 3.1 * len(measured)), layout="constrained")
    grid = figure.subplots(len(measured), len(COSTS), squeeze=False, sharey="row", sharex="col")
    names, sizes = list(dict.fromkeys(f.model for f in found)), sorted({f.c1 for f in found})
    for line, quality in zip(grid, measured, strict=True):
        for axes, cost in zip(line, COSTS, strict=True):
            if quality == "nmse_db":
                _bounds(axes, pca)
            for group in by_model(found):
                f = group[0]
                values = [getattr(one, quality) for one in group]
                middle = median(values)
                axes.errorbar(
                    median(getattr(one, cost) for one in group),
                    middle,
                    yerr=[[middle - min(values)], [max(values) - middle]],
                    marker=_MARKS[sizes.index(f.c1) % len(_MARKS)],
                    color=_COLOURS[names.index(f.model) % len(_COLOURS)],
                    linestyle="none",
                    capsize=3 if len(group) > 1 else 0,
                    label=f"{f.model}, c1 = {f.c1}",
                )
            _mark(axes, cost, [getattr(f, cost) for f in found])
            axes.grid(alpha=0.25)
        line[0].set_ylabel(QUALITY[quality])
    for axes, cost in zip(grid[-1], COSTS, strict=True):
        axes.set_xlabel(COSTS[cost])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8
    )
    return figure


def _bounds(axes: Axes, pca: Mapping[int, float]) -> None:
    """PCA and the floor, in dB."""
    for n, db in pca.items():
        axes.axhline(db, color="0.5", linestyle=":", linewidth=1)
        axes.annotate(
            f"PCA-{n}",
            (1, db),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="0.4",
        )
    axes.axhline(0, color="0.5", linewidth=1)


def _mark(axes: Axes, cost: str, values: Sequence[float]) -> None:
    """Scale and ticks of a cost: labels few and short, so that they don't touch."""
    low, high = min(values), max(values)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    if cost == "seconds" or high < 3 * low:  # less than half a decade: a log scale shows nothing
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    steps = (1, 2, 5) if high < 30 * low else (1,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=6))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
