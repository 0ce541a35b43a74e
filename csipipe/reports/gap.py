"""CSILocal's loss over centralised training's, against the number of UEs and of rows.

With N UEs each encoder and head sees one Nth of the rows, the tail all. Every run of a curve has
the same rows in all and takes as many samples per iteration, however many UEs share them. On the
headline's panel.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.files import write_file, write_table
from csipipe.plotting import name_of
from csipipe.reports import command, pages, runs
from csipipe.reports.command import Report, add_arguments
from csipipe.reports.curves import Curve
from csipipe.reports.headline import PANEL
from csipipe.reports.preset import OURS, PANELS, REFERENCE, panel_name
from csipipe.reports.runs import Run

__all__ = ["add_arguments", "run"]

DECIDED = ("run.eval_ues",)
"""What this report sets for each run, beside what all reports do."""
QUICK_SEEDS = 1
"""How many of the preset's seeds `--quick` takes."""
UES = (1, 2, 4, 8, 16)
ROWS = (1.0, 0.25)
"""Shares of the training rows."""
EVALUATED = 4
"""UEs at most that evaluations are over: each has the whole test set."""
Key = tuple[str, int, int, int]
"""Method, rows in all, UEs, seed."""
Curves = Mapping[Key, Curve]


def wanted(report: Report) -> dict[Key, Run]:
    """Every number of rows and UEs, and every seed; centralised training as of one UE."""
    preset, found, samples = report.preset, {}, _samples(report)
    for method, seed in product((REFERENCE, OURS), preset.seeds):
        plain = runs.make(preset, report.out, method, *PANELS[PANEL], seed)
        usual = plain.settings
        dealt = plain.dealt()
        total = sum(span.size for spans in dealt.ues for span in spans)
        for share, ues in product(ROWS, UES if method == OURS else (1,)):
            rows, batch = int(total * share), samples // ues
            settings = replace(
                usual,
                topology=replace(usual.topology, ues=ues),
                data=replace(usual.data, train_samples=rows),
                train=replace(usual.train, batch_size=batch),
                run=replace(usual.run, eval_ues=EVALUATED if ues > EVALUATED else None),
            )
            name = f"{plain.name}-ues{ues}-batch{batch}-rows{rows}"
            found[method, rows, ues, seed] = runs.placed(name, settings, report.out)
    return found


def _samples(report: Report) -> int:
    """Per iteration, over all UEs: the preset's, less what doesn't divide."""
    common = report.preset.common()
    each = common.train.micro_batches * max(UES)
    whole = common.topology.ues * common.train.batch_size // each * each
    if not whole:
        raise ValueError(
            f"topology.ues {common.topology.ues} × train.batch_size {common.train.batch_size} "
            f"samples can't be shared by {max(UES)} UEs in train.micro_batches "
            f"{common.train.micro_batches}; choose a train.batch_size that makes it {each} or more."
        )
    return whole


def run(options: Namespace) -> int:
    """Make the report; returns the exit code."""
    report = command.report(options)
    asked = wanted(report)
    found = command.obtain(report, asked.values())
    curves = {key: r.curve() for key, r in asked.items() if r.name in found.finished}
    table, picture, page = files = [report.file(f"gap.{e}") for e in ("csv", "png", "md")]
    header = ["method", "rows", "ues", "seed", "iteration", "bytes", "test_loss"]
    write_table(
        table,
        header,
        [
            [*key, n, c.bytes[i], c.loss[i]]
            for key, c in curves.items()
            for i, n in enumerate(c.iterations)
        ],
    )
    if gaps(curves):
        plotting.save(draw(curves), picture)
    write_file(page, verdict(report, curves, found.notes()))
    return command.close(found, files)


def gaps(curves: Curves) -> dict[tuple[int, int], list[float]]:
    """CSILocal's loss at the end over centralised's with the same seed, by rows and UEs."""
    found: dict[tuple[int, int], list[float]] = {}
    for (method, rows, ues, seed), curve in curves.items():
        reference = curves.get((REFERENCE, rows, 1, seed))
        if method == OURS and reference is not None:
            found.setdefault((rows, ues), []).append(curve.end / reference.end)
    return found


def draw(curves: Curves) -> Figure:
    """The gap over the number of UEs: medians, and from the lowest to the highest seed."""
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    found = gaps(curves)
    for rows, dash in zip(
        sorted({rows for rows, _ in found}, reverse=True), ("-", "--"), strict=False
    ):
        of_ues = {ues: ratios for (of, ues), ratios in sorted(found.items()) if of == rows}
        middle = {ues: statistics.median(ratios) for ues, ratios in of_ues.items()}
        below = [middle[ues] - min(ratios) for ues, ratios in of_ues.items()]
        above = [max(ratios) - middle[ues] for ues, ratios in of_ues.items()]
        look = plotting.style(OURS) | {"linestyle": dash, "label": f"{rows:,} rows in all"}
        axes.errorbar(list(middle), list(middle.values()), (below, above), capsize=3, **look)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(UES), labels=[str(ues) for ues in UES])
    axes.set_xlabel("UEs that share the rows")
    axes.set_ylabel(f"{name_of(OURS)}'s loss at the end over {name_of(REFERENCE)}'s")
    axes.grid(color="0.9")
    axes.legend(handlelength=4, frameon=False)
    return figure


def verdict(report: Report, curves: Curves, notes: str) -> str:
    """The Markdown page."""
    found = gaps(curves)
    lines = []
    for (rows, ues), ratios in found.items():
        ends = [c.end for (m, r, u, _), c in curves.items() if (m, r, u) == (OURS, rows, ues)]
        lines.append(
            [
                f"{rows:,}",
                str(ues),
                f"{rows // ues:,}",
                f"{statistics.median(ends):.3e}",
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})",
            ]
        )
    head = ["rows in all", "UEs", "rows per UE", "loss at the end", f"over {name_of(REFERENCE)}'s"]
    train = report.preset.common().train
    return pages.page(
        f"CSILocal's gap to centralised training ({panel_name(PANEL)})",
        f"{train.iterations:,} iterations of {_samples(report)} samples in all; medians over "
        f"{pages.seeds(len(report.preset.seeds))}, and from the lowest to the highest; the end is "
        f"the mean of the last three evaluations, which are over {EVALUATED} UEs at most.",
        pages.table(head, lines),
        notes,
    )
