"""Fig. 5: CSILocal's test loss against the compression ratio, for three distributions."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.command import Report, add_arguments
from csipipe.reports.curves import Curve
from csipipe.reports.pages import Claim, every
from csipipe.reports.preset import OURS
from csipipe.reports.runs import Run
from csipipe.settings.config import Environment

__all__ = ["add_arguments", "run"]

ENVIRONMENTS: tuple[Environment, ...] = ("indoor", "outdoor", "noniid")
Points = Mapping[tuple[str, int], Curve]
"""Curves by distribution and compression ratio (reals of a sample per real of its codeword)."""


def wanted(report: Report) -> dict[tuple[str, int], Run]:
    """A run of CSILocal per distribution and ratio."""
    preset = report.preset
    return {
        (environment, ratio): runs.make(
            preset, report.out, OURS, environment, ratio, preset.seeds[0]
        )
        for environment in ENVIRONMENTS
        for ratio in preset.compression
    }


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    report = command.report(options)
    asked = wanted(report)
    found = command.obtain(report, asked.values())
    points = {key: r.curve() for key, r in asked.items() if r.name in found.finished}
    files = [report.file(f"fig5.{ending}") for ending in ("csv", "png", "md")]
    write_csv(files[0], asked, points)
    if points:
        plotting.save(draw(points), files[1])
    write_file(files[2], verdict(points, report.preset.compression, found.notes()))
    return command.close(found, files)


def write_csv(file: Path, asked: Mapping[tuple[str, int], Run], points: Points) -> None:
    header = [
        "environment",
        "c",
        "compression_ratio",
        "test_loss",
        "nmse_db",
        "floor_loss",
        "lowest_ue_loss",
        "highest_ue_loss",
    ]
    rows = [
        [
            environment,
            asked[environment, ratio].settings.model.c1,
            1 / ratio,
            curve.end,
            curve.nmse_db[-1],
            curve.floor,
            min(curve.per_ue[-1]),
            max(curve.per_ue[-1]),
        ]
        for (environment, ratio), curve in points.items()
    ]
    write_table(file, header, rows)


def draw(points: Points) -> Figure:
    """Loss over ratio, a line per distribution."""
    figure = Figure(figsize=(5.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for environment in ENVIRONMENTS:
        mine = sorted((1 / ratio, c.end) for (e, ratio), c in points.items() if e == environment)
        if mine:
            axes.plot(*zip(*mine, strict=True), **plotting.style(environment))
    ratios = sorted({ratio for _, ratio in points}, reverse=True)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([1 / ratio for ratio in ratios]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"1/{ratio}" for ratio in ratios])
    axes.set_xlabel("compression ratio (reals of the codeword per real of the sample)")
    axes.set_ylabel(plotting.LOSS)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    return figure


def claims(points: Points, compression: tuple[int, ...]) -> list[Claim]:
    """What section IV-C says about Fig. 5, judged."""
    lines = {e: [points.get((e, ratio)) for ratio in compression] for e in ENVIRONMENTS}
    curves = [curve for line in lines.values() for curve in line]
    found = [curve for curve in curves if curve is not None]
    learnt = sum(curve.end < curve.floor for curve in found)
    steps = {e: _steps(line) for e, line in lines.items()}
    falls = {
        e: None if s is None else s[-1] < s[0] and _falling(s) * 4 >= 3 * (len(s) - 1)
        for e, s in steps.items()
    }
    highest = [
        _is_highest(*(lines[e][i] for e in ("noniid", "indoor", "outdoor")))
        for i in range(len(compression))
    ]
    loss = {e: None if s is None else s[0] - s[-1] for e, s in steps.items()}
    return [
        Claim(
            "CSILocal effectively reduces the test loss",
            "in words",
            f"below the floor at {learnt} of {len(curves)} points",
            every(None if c is None else c.end < c.floor for c in curves),
        ),
        Claim(
            "Non-IID consistently has the highest test loss",
            "at every ratio",
            f"at {highest.count(True)} of {len(highest)} ratios",
            every(highest),
        ),
        Claim(
            "More codeword reals generally improve the reconstruction "
            "(judged: the largest beats the smallest, and at least 3 of 4 steps go down)",
            "in words",
            "; ".join(
                f"{name_of(e)}: "
                + (
                    "missing"
                    if s is None
                    else f"{s[0]:.2e} to {s[-1]:.2e}, {_falling(s)} of {len(s) - 1} steps down"
                )
                for e, s in steps.items()
            ),
            every(falls.values()),
        ),
        Claim(
            "The degradation with fewer reals is most pronounced under Non-IID",
            "in words",
            "; ".join(
                f"{name_of(e)}: " + ("missing" if v is None else f"+{v:.2e}")
                for e, v in loss.items()
            ),
            None
            if None in loss.values()
            else loss["noniid"] == max(v for v in loss.values() if v is not None),
        ),
    ]


def _steps(line: list[Curve | None]) -> list[float] | None:
    """Losses of a distribution, fewest reals first; None if one is missing."""
    found = [curve.end for curve in line if curve is not None]
    return found if len(found) == len(line) else None


def _falling(losses: list[float]) -> int:
    return sum(b < a for a, b in pairwise(losses))


def _is_highest(mine: Curve | None, *others: Curve | None) -> bool | None:
    rivals = [curve.end for curve in others if curve is not None]
    return mine.end > max(rivals) if mine is not None and len(rivals) == len(others) else None


def verdict(points: Points, compression: tuple[int, ...], notes: str) -> str:
    """The Markdown page."""
    rows = []
    for ratio in compression:
        cells = [points.get((e, ratio)) for e in ENVIRONMENTS]
        rows.append(
            [
                f"1/{ratio}",
                *("" if c is None else f"{c.end:.3e} ({c.nmse_db[-1]:.1f} dB)" for c in cells),
            ]
        )
    floors = [
        next((c.floor for (e, _), c in points.items() if e == name), None) for name in ENVIRONMENTS
    ]
    rows.append(["floor", *("" if f is None else f"{f:.3e}" for f in floors)])
    return pages.page(
        "Fig. 5: test loss against compression ratio",
        pages.claims_table(claims(points, compression)),
        "Test loss at the end (mean of the last three evaluations; centred NMSE of the last):",
        pages.table(["ratio", *(name_of(e) for e in ENVIRONMENTS)], rows),
        notes,
    )
