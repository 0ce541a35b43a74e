"""Loss against bytes of CSILocal with encoders and heads averaged every E iterations.

Between CSILocal, which never averages, and FedAvg, which averages everything: on the headline's
panel. The given loss follows the headline's rule, from the runs of these two.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.bytes import RIVAL
from csipipe.reports.command import Report, add_arguments
from csipipe.reports.curves import Curve
from csipipe.reports.headline import PANEL, common_loss, given_loss, without_loss
from csipipe.reports.preset import OURS, PANELS, REFERENCE, panel_name
from csipipe.reports.runs import Run
from csipipe.settings.tables import METHODS

__all__ = ["add_arguments", "run"]

DECIDED = ("train.aggregate_every", "train.personal_iterations")
"""What this report sets for each run, beside what all reports do."""
QUICK_SEEDS = 1
"""How many of the preset's seeds `--quick` takes."""
METHOD = next(name for name, spec in METHODS.items() if spec.aggregates)
PERIODS = (1, 10, 100)
OWN = 0.1
"""Share of the iterations in which UEs are on their own at the end, where they are."""
Curves = Mapping[tuple[str, int], Curve]
"""By case and seed."""


def cases(iterations: int) -> dict[str, tuple[str, int | None, int]]:
    """Method, E, and iterations at the end without averaging, by the name of a case."""
    found: dict[str, tuple[str, int | None, int]] = {
        f"{name_of(METHOD)}, E = {every}": (METHOD, every, 0) for every in PERIODS
    }
    own, every = round(OWN * iterations), PERIODS[1]
    found[f"{name_of(METHOD)}, E = {every}, then {own} on their own"] = (METHOD, every, own)
    found |= {f"{name_of(OURS)} (never)": (OURS, None, 0), name_of(RIVAL): (RIVAL, None, 0)}
    return found | {name_of(REFERENCE): (REFERENCE, None, 0)}


def wanted(report: Report) -> dict[tuple[str, int], Run]:
    """Every case, seed by seed; other reports have those of methods without an E."""
    preset, found = report.preset, {}
    iterations = preset.common().train.iterations
    for seed in preset.seeds:
        for case, (method, every, own) in cases(iterations).items():
            plain = runs.make(preset, report.out, method, *PANELS[PANEL], seed)
            train = replace(plain.settings.train, aggregate_every=every, personal_iterations=own)
            words = [f"every{every}"] * bool(every) + [f"own{own}"] * bool(own)
            name = "-".join([plain.name, *words])
            found[case, seed] = runs.placed(name, replace(plain.settings, train=train), report.out)
    return found


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    report = command.report(options)
    asked = wanted(report)
    found = command.obtain(report, asked.values())
    curves = {key: r.curve() for key, r in asked.items() if r.name in found.finished}
    table, picture, page = files = [report.file(f"averaging.{e}") for e in ("csv", "png", "md")]
    header = ["case", "seed", "iteration", "scalars", "bytes", "test_loss"]
    write_table(
        table,
        header,
        [
            [*key, n, c.scalars[i], c.bytes[i], c.loss[i]]
            for key, c in curves.items()
            for i, n in enumerate(c.iterations)
        ],
    )
    if curves:
        plotting.save(draw(curves, report.preset.common().train.iterations), picture)
    write_file(page, verdict(report, curves, found.notes()))
    return command.close(found, files)


def loss_of(curves: Curves, iterations: int) -> float | None:
    """The given test loss; None until CSILocal and FedAvg have runs, which learnt something."""
    both = [name for name, (method, _, _) in cases(iterations).items() if method in (OURS, RIVAL)]
    plain = {key: curve for key, curve in curves.items() if key[0] in both}
    common = common_loss(plain, both)
    return None if common is None else given_loss(plain, common)


def draw(curves: Curves, iterations: int) -> Figure:
    """Loss over bytes of the first seed."""
    figure = Figure(figsize=(6.8, 5.2), layout="constrained")
    axes = figure.subplots()
    first = min(seed for _, seed in curves)
    dashes = iter(["-", "--", "-.", ":"])
    for case, (method, every, _) in cases(iterations).items():
        look = plotting.style(method) | {"label": case}
        look |= {"linestyle": next(dashes)} if every else {}
        if (curve := curves.get((case, first))) is not None and curve.bytes[-1]:
            x = [size / 1e6 for size in curve.bytes]
            axes.plot(x, curve.loss, markevery=max(1, len(x) // 4), **look)
    axes.set_xscale("log")
    axes.set_xlabel("exchanged (MB, both directions, all UEs)")
    axes.set_ylabel(plotting.LOSS)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.5)
    return figure


def verdict(report: Report, curves: Curves, notes: str) -> str:
    """The Markdown page."""
    train = report.preset.common().train
    loss = loss_of(curves, train.iterations)
    unsplit = _ends(curves, name_of(REFERENCE))
    rows = []
    for case in dict.fromkeys(name for name, _ in curves):
        every = {seed: curve for (name, seed), curve in curves.items() if name == case}
        until = [c.exchange_until(loss, "bytes") for c in every.values() if loss is not None]
        reached = [size for size in until if size is not None]
        ends = _ends(curves, case)
        gaps = [end / unsplit[seed] for seed, end in ends.items() if seed in unsplit]
        rows.append(
            [
                case,
                f"{statistics.median(c.bytes[-1] for c in every.values()) / 1e6:.1f}",
                f"{statistics.median(reached) / 1e6:.1f} ({len(reached)} of {len(every)})"
                if reached
                else ("never" if loss is not None else "—"),
                f"{statistics.median(ends.values()):.3e}",
                f"{statistics.median(gaps):.3f}" if gaps else "",
            ]
        )
    head = ["method", "MB in all", "MB until the given loss (seeds)", "loss at the end"]
    given = without_loss(curves.values(), map(name_of, (OURS, RIVAL)))
    if loss is not None:
        given = f"The given loss is **{loss:.3e}**."
    return pages.page(
        f"Averaging every E iterations ({panel_name(PANEL)})",
        f"{given} {train.iterations:,} iterations, {report.preset.common().topology.ues} UEs; "
        "medians over the seeds; the end is the mean of the last three evaluations.",
        pages.table([*head, f"over {name_of(REFERENCE)}'s"], rows),
        notes,
    )


def _ends(curves: Curves, case: str) -> dict[int, float]:
    return {seed: curve.end for (name, seed), curve in curves.items() if name == case}
