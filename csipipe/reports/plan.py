"""What a configuration will exchange, before anything is trained: arithmetic."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from csipipe import channels
from csipipe.files import write_file, write_table
from csipipe.methods.cost import bytes_exchanged, exchanged
from csipipe.models import count_parts, widths
from csipipe.plotting import name_of
from csipipe.reports import pages
from csipipe.reports import preset as presets
from csipipe.reports.preset import METHODS
from csipipe.settings import commandline, tables
from csipipe.settings.config import Settings, suited

LINKS = (10, 50, 100, 1000)
"""Rates in Mbit/s."""


@dataclass(frozen=True)
class Row:
    """One method's exchange, over all UEs and both directions."""

    method: str
    scalars_per_iteration: int
    """On average."""
    bytes_per_iteration: int
    iterations: int
    scalars: int
    bytes: int
    seconds: dict[int, float]
    """For the whole exchange over one link that the UEs share, by its rate in Mbit/s."""
    samples_per_exchange: int
    """B·E: samples of a UE between two exchanges."""
    break_even: float | None
    """B·E at and above which CSILocal is no longer cheaper."""


def add_arguments(parser: ArgumentParser) -> None:
    """`--preset` and `--out`; everything else is a setting of the runs."""
    parser.add_argument(
        "--preset", help="laptop, paper, or a file; by default the settings' defaults"
    )
    parser.add_argument("--out", default="reports/plan", help="folder of the files (reports/plan)")


def run(options: Namespace) -> int:
    """Print the plan and write it; returns the exit code."""
    wanted, refused = configuration(options.preset, options.settings)
    rows = plan(wanted)
    text = page(wanted, rows, refused)
    out = Path(options.out)
    print(text)
    write_file(out / "plan.md", text)
    write_file(out / "plan.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    header = [
        "method",
        "scalars_per_iteration",
        "bytes_per_iteration",
        "iterations",
        "scalars",
        "bytes",
        *(f"seconds_at_{rate}_mbit_per_s" for rate in LINKS),
        "break_even_samples",
    ]
    write_table(
        out / "plan.csv",
        header,
        [
            [
                r.method,
                r.scalars_per_iteration,
                r.bytes_per_iteration,
                r.iterations,
                r.scalars,
                r.bytes,
                *r.seconds.values(),
                r.break_even,
            ]
            for r in rows
        ],
    )
    for ending in ("md", "csv", "json"):
        print(out / f"plan.{ending}")
    return 0


def configuration(
    preset: str | None, arguments: list[str]
) -> tuple[dict[str, Settings], dict[str, str]]:
    """Settings to plan for, by method; and why other methods can't have them.

    No data is read, so none is needed.

    Raises:
        ValueError: settings that no method can have.
    """
    base = presets.load(preset).arguments if preset else ()
    words = [*base, *arguments, *presets.NO_DATA]
    sections = commandline.sections(words)
    wanted, refused = dict[str, Settings](), dict[str, str]()
    aggregating = [name for name, spec in tables.METHODS.items() if spec.aggregates]
    for method in (*METHODS, *aggregating):
        try:
            wanted[method] = channels.sized(Settings(**suited(method, sections)))
        except ValueError as error:
            refused[method] = str(error)
    if not wanted:
        raise ValueError(next(iter(refused.values())))
    return wanted, refused


def plan(wanted: Mapping[str, Settings]) -> list[Row]:
    """A row per method."""
    return [_row(settings) for settings in wanted.values()]


def _row(settings: Settings) -> Row:
    scalars, size = (sum(of(settings).values()) for of in (exchanged, bytes_exchanged))
    iterations = settings.train.iterations
    each = settings.participants * sum(widths(settings.model))
    return Row(
        method=settings.method,
        scalars_per_iteration=round(scalars / iterations),
        bytes_per_iteration=round(size / iterations),
        iterations=iterations,
        scalars=scalars,
        bytes=size,
        seconds={rate: size * 8 / (rate * 1e6) for rate in LINKS},
        samples_per_exchange=settings.train.batch_size * settings.train.local_steps,
        break_even=None if settings.spec.pipelined else scalars / (2 * iterations * each),
    )


def page(
    wanted: Mapping[str, Settings], rows: list[Row], refused: Mapping[str, str] | None = None
) -> str:
    """The plan as Markdown."""
    settings = next(iter(wanted.values()))
    left_out = [f"{name_of(method)} is left out: {why}" for method, why in (refused or {}).items()]
    train, ues = settings.train, str(settings.topology.ues)
    if settings.participants < settings.topology.ues:
        ues = f"{settings.participants} of {ues}"
    sizes, (up, down) = count_parts(settings.model), widths(settings.model)
    d = sum(sizes.values())
    heads = [
        "method",
        "scalars per iteration",
        "bytes per iteration",
        "scalars in all",
        "GB in all",
    ]
    heads += [f"s at {rate} Mbit/s" for rate in LINKS]
    table = pages.table(
        heads,
        [
            [
                name_of(r.method),
                f"{r.scalars_per_iteration:,}",
                f"{r.bytes_per_iteration:,}",
                f"{r.scalars:,}",
                f"{r.bytes / 1e9:.3f}",
                *(f"{s:,.1f}" for s in r.seconds.values()),
            ]
            for r in rows
        ],
    )
    return pages.page(
        "Plan: what each method exchanges",
        f"{ues} UEs, B = {train.batch_size} samples per UE and step, c1 = {up}, "
        f"c2 = {down}, {train.iterations:,} iterations, {train.precision}. The model has "
        f"d = {d:,} parameters (" + ", ".join(f"{part} {n:,}" for part, n in sizes.items()) + ").",
        table,
        *left_out,
        "Scalars and bytes are those of training, over all UEs and both directions (the paper's "
        "count, without BatchNorm's running statistics). Seconds are for the whole exchange over "
        "one link that the UEs share, one direction after the other, without protocol overhead.",
        "CSILocal is no longer the cheaper one when B·E, the samples per UE and exchange, is at "
        "least (parameters exchanged) / (c1 + c2); E is train.local_steps.",
        pages.table(
            ["against", "limit of B·E", "B·E here", "cheaper here"],
            [_break_even(r) for r in rows if r.break_even is not None],
        ),
    )


def _break_even(row: Row) -> list[str]:
    assert row.break_even is not None
    here = row.samples_per_exchange
    cheaper = "CSILocal" if here < row.break_even else name_of(row.method)
    return [name_of(row.method), f"{row.break_even:,.1f}", f"{here:,}", cheaper]
