"""Loss against bytes and seconds on a link, for codecs and methods.

The given loss follows the headline's rule, from the runs in fp32. A codec counts only where its
loss at the end is within 5 % of fp32's.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.command import Report, add_arguments
from csipipe.reports.curves import Curve
from csipipe.reports.headline import PANEL, common_loss, given_loss, without_loss
from csipipe.reports.pages import Claim
from csipipe.reports.plan import LINKS
from csipipe.reports.preset import OURS, PANELS, panel_name
from csipipe.reports.runs import Run
from csipipe.settings.config import CodecSettings, CommSettings
from csipipe.settings.tables import METHODS

__all__ = ["add_arguments", "run"]

DECIDED = ("comm.",)
"""What this report sets for each run, beside what all reports do."""
QUICK_SEEDS = 1
"""How many of the preset's seeds `--quick` takes."""
RIVAL = "fedavg"
CLOSE = 1.05
"""How many times fp32's loss at the end a codec's may be; medians over the seeds."""
GOALS = {"int8, scale ue": (0.26, 1 / 9), "int4, scale ue": (0.13, 1 / 15)}
"""Bytes that CSILocal should need at most: over its own in fp32, over FedAvg's in fp32."""
Curves = Mapping[tuple[str, str, int], Curve]
"""By method, coding and seed."""


def _all(
    method: str, name: str, scale: Literal["row", "ue"] = "row", feedback: bool = False
) -> CommSettings:
    """One codec for all that a method exchanges."""
    return CommSettings(
        codec=CodecSettings(**dict.fromkeys(METHODS[method].crosses, name)),
        rounding="nearest" if name == "int8" else "stochastic",
        scale=scale,
        error_feedback=feedback,
    )


CODINGS: dict[str, dict[str, CommSettings]] = {
    OURS: {
        "fp32": CommSettings(),
        "int8": _all(OURS, "int8"),
        "int8, scale ue": _all(OURS, "int8", "ue"),
        "int4, scale ue": _all(OURS, "int4", "ue"),
    },
    RIVAL: {
        "fp32": CommSettings(),
        "int4, feedback": _all(RIVAL, "int4", feedback=True),
        "int8": _all(RIVAL, "int8"),
        "int2, feedback": _all(RIVAL, "int2", feedback=True),
        "topk, feedback": _all(RIVAL, "topk", feedback=True),
    },
}
"""What is tried, by method; all but fp32 and int8 round stochastically."""


def wanted(report: Report) -> dict[tuple[str, str, int], Run]:
    """Every coding and seed on the headline's panel; the headline has those in fp32."""
    preset, found = report.preset, {}
    for seed in preset.seeds:
        for method, codings in CODINGS.items():
            plain = runs.make(preset, report.out, method, *PANELS[PANEL], seed)
            for coding, comm in codings.items():
                settings = replace(plain.settings, comm=comm)
                name = plain.name + "".join(f"-{word}" for word in _words(coding))
                found[method, coding, seed] = runs.placed(name, settings, report.out)
    return found


def _words(coding: str) -> list[str]:
    """For the name of a folder; none in fp32, whose runs other reports share."""
    return [] if coding == "fp32" else coding.replace(",", "").split()


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    report = command.report(options)
    asked = wanted(report)
    found = command.obtain(report, asked.values())
    curves = {key: r.curve() for key, r in asked.items() if r.name in found.finished}
    table, picture, page = files = [report.file(f"bytes.{e}") for e in ("csv", "png", "md")]
    tried = judge(curves)
    write_csv(table, curves)
    if curves:
        plotting.save(draw(curves), picture)
    write_file(page, verdict(curves, tried, len(report.preset.seeds), found.notes()))
    return command.close(found, files)


@dataclass(frozen=True)
class Tried:
    """A method with a coding, over the seeds that have both it and fp32.

    Attributes:
        until: bytes until the given loss, by seed; seeds that never reach it are left out.
        end: median loss at the end; `over_fp32`: by that of fp32.
    """

    method: str
    coding: str
    until: dict[int, float]
    seeds: int
    end: float
    over_fp32: float

    @property
    def counts(self) -> bool:
        """Whether every seed reaches the loss, and the end is as good as fp32's."""
        return len(self.until) == self.seeds and self.over_fp32 <= CLOSE


def loss_of(curves: Curves) -> float | None:
    """The given test loss; None if a method has no run in fp32, or learnt nothing."""
    plain = {(m, seed): curve for (m, coding, seed), curve in curves.items() if coding == "fp32"}
    common = common_loss(plain, CODINGS)
    return None if common is None else given_loss(plain, common)


def judge(curves: Curves) -> list[Tried]:
    """Every coding that has runs."""
    loss = loss_of(curves)
    if loss is None:
        return []
    found = []
    for method, codings in CODINGS.items():
        plain = statistics.median(
            c.end for (m, k, _), c in curves.items() if (m, k) == (method, "fp32")
        )
        for coding in codings:
            mine = {s: c for (m, k, s), c in curves.items() if (m, k) == (method, coding)}
            if mine:
                until = {s: c.exchange_until(loss, "bytes") for s, c in mine.items()}
                reached = {s: size for s, size in until.items() if size is not None}
                end = statistics.median(c.end for c in mine.values())
                found.append(Tried(method, coding, reached, len(mine), end, end / plain))
    return found


def ratio(one: Tried, other: Tried) -> float | None:
    """Bytes of one over another's until the given loss, median over the seeds of both."""
    both = [one.until[s] / other.until[s] for s in one.until if s in other.until]
    return statistics.median(both) if both else None


def best(tried: list[Tried], method: str) -> Tried | None:
    """The coding that counts with the fewest bytes until the given loss."""
    there = [one for one in tried if one.method == method and one.counts]
    return min(there, key=lambda one: statistics.median(one.until.values()), default=None)


def claims(tried: list[Tried]) -> list[Claim]:
    """Whether the goals are reached."""
    of = {(one.method, one.coding): one for one in tried}
    judged = []
    rival = best(tried, RIVAL)
    for coding, goals in GOALS.items():
        mine = of.get((OURS, coding))
        against = {
            "CSILocal's in fp32": (of.get((OURS, "fp32")), goals[0]),
            "FedAvg's in fp32": (of.get((RIVAL, "fp32")), goals[1]),
            f"FedAvg's with its best codec{f' ({rival.coding})' if rival else ''}": (rival, 1.0),
        }
        for name, (other, goal) in against.items():
            found = None if mine is None or other is None else ratio(mine, other)
            counts = mine is not None and mine.counts
            ours = "not compared" if mine is None or other is None else "no run reaches it"
            if found is not None:
                ours = f"{found:.3f} times"
            if mine is not None:
                ours += f"; loss at the end {mine.over_fp32:.3f} times fp32's"
            holds = None if mine is None else counts and found is not None and found <= goal
            text = f"CSILocal with {coding}: bytes until the given loss, over {name}"
            judged.append(Claim(text, f"≤ {goal:.3f}", ours, holds))
    return judged


def write_csv(file: Path, curves: Curves) -> None:
    links = [f"seconds_at_{rate}_mbit_per_s" for rate in LINKS]
    header = ["method", "coding", "seed", "iteration", "scalars", "bytes", *links, "test_loss"]
    rows = [
        [*key, n, c.scalars[i], c.bytes[i], *(seconds(c.bytes[i], x) for x in LINKS), c.loss[i]]
        for key, c in curves.items()
        for i, n in enumerate(c.iterations)
    ]
    write_table(file, header, rows)


def seconds(size: float, rate: int) -> float:
    """Of `size` bytes on a link of `rate` Mbit/s."""
    return size * 8 / (rate * 1e6)


def draw(curves: Curves) -> Figure:
    """Loss over bytes; a second axis has the seconds on the slowest link. One seed."""
    figure = Figure(figsize=(6.8, 5.2), layout="constrained")
    axes = figure.subplots()
    first = min(seed for _, _, seed in curves)
    shown = {(m, k): c for (m, k, seed), c in curves.items() if seed == first}
    for method, codings in CODINGS.items():
        for at, coding in enumerate(codings):
            if (curve := shown.get((method, coding))) is not None:
                look = plotting.style(method) | {"label": f"{name_of(method)}, {coding}"}
                dash = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))][at]
                look |= {"linestyle": dash, "alpha": 1 - 0.12 * at}
                x = [size / 1e6 for size in curve.bytes]
                axes.plot(x, curve.loss, markevery=max(1, len(x) // 4), **look)
    axes.set_xscale("log")
    top = axes.secondary_xaxis("top", functions=(_seconds, _megabytes))
    top.set_xlabel(f"seconds on a link of {LINKS[0]} Mbit/s")
    axes.set_xlabel("exchanged (MB, both directions, all UEs)")
    axes.set_ylabel(plotting.LOSS)
    axes.ticklabel_format(axis="y", style="plain")  # a power of ten would stand on the seconds
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.5)
    return figure


def _seconds(megabytes: Any) -> Any:
    return megabytes * 8 / LINKS[0]


def _megabytes(seconds: Any) -> Any:
    return seconds * LINKS[0] / 8


def verdict(curves: Curves, tried: list[Tried], seeds: int, notes: str) -> str:
    """The Markdown page."""
    loss = loss_of(curves)
    parts = [pages.claims_table(claims(tried), "what is wanted", "goal")]
    if loss is None:
        parts.append(without_loss(curves.values(), map(name_of, CODINGS)))
    else:
        parts += [
            f"The given loss is **{loss:.3e}**, by the headline's rule from the runs in fp32 of "
            f"{' and '.join(map(name_of, CODINGS))}; {pages.seeds(seeds)}. A codec counts if every "
            f"seed reaches it and its loss at the end is at most {CLOSE} times fp32's (medians; "
            "the end is the mean of the last three evaluations). Seconds are of the bytes alone, "
            "on one link that the UEs share, without computing and protocols.",
            pages.table(
                [
                    "method",
                    "codec",
                    "MB until the given loss",
                    "over fp32's",
                    "loss at the end",
                    "over fp32's",
                    *(f"s at {rate} Mbit/s" for rate in LINKS),
                    "counts",
                ],
                [_row(one, tried) for one in tried],
            ),
        ]
    return pages.page(
        f"Bytes until a given test loss ({panel_name(PANEL)})",
        *parts,
        notes,
    )


def _row(one: Tried, tried: list[Tried]) -> list[str]:
    plain = next(o for o in tried if (o.method, o.coding) == (one.method, "fp32"))
    over = ratio(one, plain)
    size = statistics.median(one.until.values()) if one.until else None
    return [
        name_of(one.method),
        one.coding,
        "never"
        if size is None
        else f"{size / 1e6:.2f} ({len(one.until)} of {pages.seeds(one.seeds)})",
        "" if over is None else f"{over:.3f}",
        f"{one.end:.3e}",
        f"{one.over_fp32:.3f}",
        *("" if size is None else f"{seconds(size, rate):.2f}" for rate in LINKS),
        "yes" if one.counts else "no",
    ]
