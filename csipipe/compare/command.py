"""What `csipipe compare` does: train what is missing, measure all on one test set, show it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from csipipe import channels, plotting
from csipipe.compare import figures, page, plan
from csipipe.entry import refusing
from csipipe.evaluation import testset
from csipipe.files import write_file
from csipipe.reports import budget
from csipipe.reports.runs import Run, State, sort
from csipipe.run import ceiling
from csipipe.settings import commandline
from csipipe.settings.config import Settings
from csipipe.settings.tables import MODELS

ABOUT = """Trains several models with several codeword sizes on the same data, seed and budget, one
after the other, and shows NMSE, ρ and SGCS beside what each costs: table.md, table.csv and
picture.png in --out. Started again, it continues. All other arguments are settings of training, for
example --data.source csinet --data.path DIR."""


@refusing(OSError, ValueError)
def main(arguments: list[str]) -> int:
    """Compare; returns the exit code."""
    options, rest = parser().parse_known_args(arguments)
    try:
        run(options, rest)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's own options; settings are what is left."""
    parser = argparse.ArgumentParser("python -m csipipe compare", None, ABOUT, allow_abbrev=False)
    names = ",".join(MODELS)
    parser.add_argument(
        "--models", default=names, help=f"comma-separated, or your own as model.name; {names}"
    )
    parser.add_argument(
        "--c", default="512,256", help="codeword sizes c1, comma-separated: 512,256"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--minutes", type=float, help="train each model as long: its speed is measured first"
    )
    amount.add_argument(
        "--samples", type=int, help="train each model on as many samples, over all UEs"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each, from train.seed on: medians, spread (1)"
    )
    parser.add_argument("--processes", type=int, default=4, help="ranks of a run, at most (4)")
    parser.add_argument(
        "--out", default="comparison", help="folder of runs and results (comparison)"
    )
    parser.add_argument(
        "--collect", action="store_true", help="start nothing; show the runs that are finished"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Train, measure, write.

    Raises:
        ValueError, OSError: options, settings, models or data that can't be used; runs that failed.
    """
    settings = commandline.read(rest)
    sizes = _numbers(options.c)
    _check(options, settings)
    out = Path(options.out)
    if options.samples is not None:
        each = settings.topology.ues * settings.train.batch_size
        train = replace(settings.train, iterations=max(1, options.samples // each))
        settings = replace(settings, train=train)
    settings = channels.sized(settings)
    names = [name.strip() for name in options.models.split(",")]
    wanted = plan.runs(settings, names, sizes, out, options.seeds)
    rows = testset.load(settings)
    ready = _collected(wanted, options, out) if options.collect else _trained(wanted, options, out)
    found = [figures.measure(one, rows) for one in ready]
    counts = sorted({n for f in found for n in (f.c1, f.ceiling) if n})
    lines = ceiling.pca(settings, rows.h_BAD.numpy(), counts)
    missing = [one.name for one in wanted if one.name not in {other.name for other in ready}]
    about = _about(settings, options, rows.name, [f.seed for f in found], missing)
    text = page.text(found, lines, about, options.minutes)
    print(text)
    write_file(out / "table.md", text)
    page.write_csv(out / "table.csv", found)
    plotting.save(page.draw(found, lines), out / "picture.png")
    print(f"written:      {out}/table.md, table.csv, picture.png")


def _trained(wanted: list[Run], options: argparse.Namespace, out: Path) -> list[Run]:
    """All runs, after what is missing was trained."""
    complete = partial(budget.complete, out=out, processes=options.processes)
    if options.minutes is not None:
        wanted = budget.within(wanted, options.minutes, out, complete)
    complete(wanted)
    return wanted


def _collected(wanted: list[Run], options: argparse.Namespace, out: Path) -> list[Run]:
    """Those that are finished; ValueError: none is, or one was made with other settings.

    By minutes, a run's iterations follow from its probe, as when it was started.
    """
    try:
        if options.minutes is not None:
            wanted = budget.within(wanted, options.minutes, out, lambda probes: None)
        ready = sort(wanted)[State.FINISHED]
    except ValueError as error:
        raise ValueError(
            f"{error}\n  --collect shows what the same command made without it; give the same "
            "--minutes or --samples, too."
        ) from error
    if not ready:
        raise ValueError(f"{out} has no finished run of this comparison; leave --collect out.")
    return ready


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) for word in words):
        raise ValueError(
            f"--c is {text!r}; expected positive numbers with commas, such as 512,256."
        )
    return [int(word) for word in words]


def _check(options: argparse.Namespace, settings: Settings) -> None:
    for name in ("minutes", "samples"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name} is {value}; it must be a positive number.")
    for name in ("processes", "seeds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    if settings.run.dir is not None:
        raise ValueError(
            f"run.dir is {settings.run.dir!r}, but there are several runs; use --out for all."
        )


def _about(
    settings: Settings,
    options: argparse.Namespace,
    rows: str,
    seeds: Collection[int],
    missing: Sequence[str],
) -> str:
    """What was trained, in a paragraph."""
    train = settings.train
    amount = f"{train.iterations:,} iterations each"
    if options.minutes is not None:
        amount = f"{options.minutes:g} minutes each, in iterations by each model's own speed"
    elif options.samples is not None:
        amount = f"{options.samples:,} samples each"
    first, last = min(seeds), max(seeds)
    which = f"seed {first}"
    if first != last:
        which = f"seeds {first} … {last}: medians, and in brackets the lowest and the highest"
    absent = f" Not finished, and not in here: {', '.join(missing)}." if missing else ""
    ues = settings.topology.ues
    return (
        f"Method {settings.method}, {ues} UE{'s' * (ues > 1)} × {train.batch_size} samples, "
        f"{which}, {amount}. Test set: {rows}.{absent}"
    )
