"""The headline: how much each method exchanges until it reaches a given test loss.

The paper gives one loss, 1.3e-3 in Fig. 6f; a smaller problem has another scale, so the loss comes
from a rule that was fixed before any run (`given_loss`), and the ratios are shown over a range of
losses as well.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.command import Report, add_arguments
from csipipe.reports.curves import Curve
from csipipe.reports.pages import Claim
from csipipe.reports.preset import OURS, PANELS, panel_name
from csipipe.reports.runs import Run

__all__ = ["add_arguments", "run"]

PANEL = "f"
COMPARED = ("csilocal", "fedavg", "fedprox")
PAPER_TOTALS = {"csilocal": 19.6608e9, "fedavg": 47.0664e9, "fedprox": 38.2414e9}
"""Scalars that the paper's methods exchanged until a test loss of 1.3e-3 (Fig. 6f)."""
GIVEN = 0.9
"""Share of the way from the floor to the loss that all compared methods reach in all seeds."""
RANGE = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares at which the ratios are also shown."""
Curves = Mapping[tuple[str, int], Curve]
"""Curves by method and seed."""


def paper_ratio(method: str) -> float:
    """The paper's exchange of a method over CSILocal's."""
    return PAPER_TOTALS[method] / PAPER_TOTALS[OURS]


def wanted(report: Report) -> dict[tuple[str, int], Run]:
    """Every method and seed on the panel; Fig. 6 has those of the first seed."""
    preset = report.preset
    return {
        (method, seed): runs.make(preset, report.out, method, *PANELS[PANEL], seed)
        for seed in preset.seeds
        for method in preset.headline
    }


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    report = command.report(options)
    asked = wanted(report)
    found = command.obtain(report, asked.values())
    curves = {key: r.curve() for key, r in asked.items() if r.name in found.finished}
    table, picture, page = files = [report.file(f"headline.{e}") for e in ("csv", "png", "md")]
    common, seeds = common_loss(curves), len(report.preset.seeds)
    write_csv(table, curves, common)
    if common is not None:
        loss = report.preset.loss or given_loss(curves, common)
        plotting.save(draw(curves, common, loss), picture)
    write_file(page, verdict(curves, common, seeds, report.preset.loss, found.notes()))
    return command.close(found, files)


def common_loss(curves: Curves, of: Collection[str] = COMPARED) -> float | None:
    """The lowest loss that all methods of `of` reach, in every seed.

    None if one of them has no run, or one learnt nothing: `without_loss` says so.
    """
    compared = {key: curve for key, curve in curves.items() if key[0] in of}
    if {method for method, _ in compared} != set(of):
        return None
    worst = max(curve.lowest for curve in compared.values())
    return worst if worst < floor(curves.values()) else None


def without_loss(curves: Iterable[Curve], of: Iterable[str]) -> str:
    """A paragraph for pages without a given loss; `of` names the methods as they are shown."""
    seen = list(curves)
    below = f" ({floor(seen):.3e}, a constant 0.5)" if seen else ""
    return (
        f"There is no given loss, so nothing is compared by it: {' and '.join(of)} must have run "
        f"and fallen below the floor{below} in every seed."
    )


def given_loss(curves: Curves, common: float, share: float = GIVEN) -> float:
    """The loss `share` of the way from the floor to `common`.

    Not all the way: near its end a curve is flat, and noise decides when the loss is reached.
    """
    start = floor(curves.values())
    return start - share * (start - common)


def floor(curves: Iterable[Curve]) -> float:
    """The lowest of their floors."""
    return min(curve.floor for curve in curves)


def ratios(curves: Curves, method: str, loss: float) -> list[float]:
    """A method's exchange until `loss` over CSILocal's, for every seed in which both reach it."""
    found = []
    for (name, seed), curve in curves.items():
        mine = curves.get((OURS, seed))
        if name == method and mine is not None:
            theirs, own = curve.exchange_until(loss), mine.exchange_until(loss)
            if theirs is not None and own is not None:
                found.append(theirs / own)
    return found


def methods_of(curves: Curves) -> list[str]:
    """Methods with a run, in order."""
    return list(dict.fromkeys(method for method, _ in curves))


def rivals_of(curves: Curves) -> list[str]:
    """Methods with a run that CSILocal is compared with, in order."""
    return [method for method in methods_of(curves) if method != OURS]


def write_csv(file: Path, curves: Curves, common: float | None) -> None:
    header = ["method", "seed", "share", "loss", "scalars_until", "bytes_until", "lowest_loss"]
    losses = {} if common is None else {share: given_loss(curves, common, share) for share in RANGE}
    rows = [
        [
            *(*key, share, loss),
            *(curve.exchange_until(loss), curve.exchange_until(loss, "bytes"), curve.lowest),
        ]
        for share, loss in losses.items()
        for key, curve in curves.items()
    ]
    write_table(file, header, rows)


def draw(curves: Curves, common: float, given: float) -> Figure:
    """Ratios to CSILocal over the given loss: medians, bands from lowest to highest seed."""
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    axes = figure.subplots()
    for method in rivals_of(curves):
        losses = [given_loss(curves, common, share) for share in RANGE]
        found = [(loss, r) for loss in losses if (r := ratios(curves, method, loss))]
        if found:
            x = [loss for loss, _ in found]
            look = plotting.style(method)
            axes.plot(x, [statistics.median(r) for _, r in found], **look)
            low, high = ([pick(r) for _, r in found] for pick in (min, max))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0)
    for method, dash in (("fedavg", "--"), ("fedprox", ":")):
        axes.axhline(
            paper_ratio(method),
            color="0.4",
            linestyle=dash,
            linewidth=1.2,
            label=f"paper: {name_of(method)} {paper_ratio(method):.2f}",
        )
    axes.axhline(1, color="black", linewidth=1, label="as much as CSILocal")
    axes.axvline(
        given,
        color="0.6",
        linewidth=4,
        alpha=0.5,
        zorder=0,
        label="the given loss",
    )
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"given {plotting.LOSS} (lower to the right)")
    axes.set_ylabel("exchanged until then, over CSILocal's")
    axes.ticklabel_format(axis="x", scilimits=(-2, 2), useMathText=True)
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
    return figure


def claims(curves: Curves, given: float | None, seeds: int) -> list[Claim]:
    """Whether CSILocal exchanges less than FedAvg and FedProx, and by the paper's factor.

    Args:
        given: the test loss.
        seeds: how many should reach it; with fewer, nothing is judged.
    """
    judged = []
    for method in COMPARED[1:]:
        paper, name = paper_ratio(method), name_of(method)
        found = [] if given is None else ratios(curves, method, given)
        median = statistics.median(found) if found else None
        complete = len(found) == seeds
        ours = (
            "a method has no run, or learnt nothing"
            if median is None
            else f"{median:.2f} times (median of {len(found)} of {pages.seeds(seeds)}: "
            f"{_listed(found)})"
        )
        judged += [
            Claim(
                f"{name} exchanges more than CSILocal until the given loss (judged: in every seed)",
                f"{PAPER_TOTALS[method] / 1e9:.2f} against 19.66 billion",
                ours,
                min(found) > 1 if complete else None,
            ),
            Claim(
                f"… at least {paper:.2f} times as much (judged: the median)",
                f"{paper:.2f} times",
                ours,
                median >= paper if complete and median is not None else None,
            ),
        ]
    return judged


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in sorted(values))


def verdict(
    curves: Curves, common: float | None, seeds: int, fixed: float | None, notes: str
) -> str:
    """The Markdown page; `fixed` is the preset's given loss, None for the rule's."""
    loss = None if common is None else fixed or given_loss(curves, common)
    parts = [pages.claims_table(claims(curves, loss, seeds))]
    if common is not None and loss is not None:
        way = (
            f"the way from the floor ({floor(curves.values()):.3e}) to the lowest loss that "
            f"CSILocal, FedAvg and FedProx all reach in every seed ({common:.3e})"
        )
        rule = f"The rule, fixed before any run: {GIVEN:.0%} of {way}."
        parts += [
            f"The given loss is **{loss:.3e}**. {rule if fixed is None else 'It is the preset’s.'} "
            "Exchange is interpolated linearly between evaluations.",
            pages.table(
                [
                    "method",
                    "10⁶ parameters until then (median; seeds)",
                    "over CSILocal's (median; seeds)",
                    "seeds that reach it",
                ],
                [_row(curves, method, loss) for method in methods_of(curves)],
            ),
            f"Does the given loss matter? Median ratios over a range of losses, by share of {way}:",
            _range_table(curves, common),
        ]
    return pages.page(
        f"Headline: exchanged until a given test loss, Fig. 6{PANEL} ({panel_name(PANEL)})",
        *parts,
        notes,
    )


def _row(curves: Curves, method: str, loss: float) -> list[str]:
    mine = [curve.exchange_until(loss) for (name, _), curve in curves.items() if name == method]
    there = [value / 1e6 for value in mine if value is not None]
    over = ratios(curves, method, loss)
    return [
        name_of(method),
        f"{statistics.median(there):.2f}; {_listed(there)}" if there else "never",
        f"{statistics.median(over):.2f}; {_listed(over)}" if over else "",
        f"{len(there)} of {len(mine)}",
    ]


def _range_table(curves: Curves, common: float) -> str:
    rivals = rivals_of(curves)
    rows = []
    for share in RANGE:
        loss = given_loss(curves, common, share)
        found = [ratios(curves, method, loss) for method in rivals]
        cells = [f"{statistics.median(r):.2f} ({len(r)})" if r else "never" for r in found]
        rows.append(
            [f"{share:.0%}" + (" (the rule)" if share == GIVEN else ""), f"{loss:.3e}", *cells]
        )
    heads = [f"{name_of(method)} (seeds)" for method in rivals]
    return pages.table(["share", "loss", *heads], rows)
