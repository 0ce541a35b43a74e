"""What `csipipe links` does: train over links of given rates, and say how long it takes."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csipipe import channels
from csipipe.entry import refusing
from csipipe.links import forecast, network, page, ranks
from csipipe.links.network import Link
from csipipe.links.page import Row
from csipipe.links.ranks import Trouble
from csipipe.reports.preset import OURS
from csipipe.settings import commandline, tables
from csipipe.settings.config import Settings, suited

ABOUT = """Trains with every UE rank in a network of its own, behind a link of the rate that you
give, and compares seconds per iteration with the forecast. Needs Linux, root, ip and tc. All other
arguments are settings of training, for example --train.iterations 20."""
_FREE = "1gbit"
_FREELY = Link(1e11, 1e11)
"""A link that takes no time."""


@refusing(OSError, ValueError)
def main(arguments: list[str]) -> int:
    """Train over links; returns the exit code."""
    options, settings = parser().parse_known_args(arguments)
    return run(options, settings)


def parser() -> ArgumentParser:
    """The command's own options."""
    made = ArgumentParser("python -m csipipe links", description=ABOUT, allow_abbrev=False)
    made.add_argument(
        "--up",
        nargs="+",
        required=True,
        metavar="RATE",
        help="of the uplinks, a case each: 10mbit; with commas, a rate for each UE rank: "
        "10mbit,2mbit",
    )
    made.add_argument("--down", nargs="+", metavar="RATE", help="of the downlinks (as --up)")
    made.add_argument("--delay", type=float, default=0.0, help="one way, in ms (0); needs netem")
    made.add_argument("--methods", nargs="+", default=[OURS], help=f"methods to train ({OURS})")
    made.add_argument("--hosts", type=int, default=2, help="ranks that host UEs (2)")
    made.add_argument(
        "--trouble",
        metavar="UE:AT:FOR[:RATE]",
        help="the link of this UE rank breaks AT seconds after training began, FOR seconds long; "
        "with RATE it is that slow instead",
    )
    made.add_argument(
        "--curves",
        nargs="+",
        default=[],
        metavar="RUN",
        help="a finished run of each method, with the same settings, but for iterations, seed and "
        "learning rate: from its learning curve follows when --loss is reached",
    )
    made.add_argument("--loss", type=float, help="test loss to reach (the highest final one)")
    made.add_argument("--out", default="reports/links", metavar="DIR", help="(reports/links)")
    made.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return made


@dataclass(frozen=True)
class Case:
    """Links as they were asked for."""

    name: str
    links: list[Link]


def run(options: Namespace, arguments: list[str]) -> int:
    """Train every method over every case; print and write the page.

    Raises:
        ValueError, OSError: options, settings, or a machine that can't be used.
    """
    network.check_machine()
    cases = _cases(options)
    trouble = Trouble.read(options.trouble, options.hosts) if options.trouble else None
    runs = {method: _settings(method, arguments, options.hosts) for method in options.methods}
    reach = page.times_to(options.curves, runs, options.loss) if options.curves else {}
    for name in network.clean():
        print(f"removed {name}, left behind by a run that was killed", file=sys.stderr)
    for case in cases:
        with network.Network(case.links):  # before anything is trained: the kernel may refuse
            pass
    out = Path(options.out)
    rows: list[Row] = []
    for method, settings in runs.items():
        # computing, and what handing messages over costs on this machine
        free = ranks.train(settings, [_FREELY] * options.hosts, out / "runs", f"{method}-free")
        if free.error:  # nothing that the links could be compared with
            rows.append(Row(method, "none", math.nan, math.nan, free, None))
            continue
        base = free.seconds
        for case in cases:
            planned = forecast.seconds(settings, case.links, base)
            name = f"{method}-{case.name}"
            print(f"{name}: {planned:.2f} s an iteration are planned", file=sys.stderr, flush=True)
            found = ranks.train(settings, case.links, out / "runs", name, trouble)
            rows.append(Row(method, case.name, base, planned, found, reach.get(method)))
    text = page.text(runs, rows, options)
    print(text)
    for file in page.write(rows, text, out):
        print(file)
    return int(any(row.found.error for row in rows))


def _cases(options: Namespace) -> list[Case]:
    downs = options.down or options.up
    if len(downs) not in (1, len(options.up)):
        raise ValueError(
            f"--up has {len(options.up)} case(s), --down {len(downs)}; give as many, or one."
        )
    if not 0 <= options.delay < math.inf:
        raise ValueError(f"--delay is {options.delay}; it must be at least 0 ms.")
    if options.hosts < 1:
        raise ValueError(f"--hosts is {options.hosts}; it must be at least 1.")
    cases = []
    for number, up in enumerate(options.up):
        down = downs[number if len(downs) > 1 else 0]
        pairs = zip(_rates("--up", up, options), _rates("--down", down, options), strict=True)
        links = [Link(one, other, options.delay / 1e3) for one, other in pairs]
        name = up if up == down else f"{up}-up-{down}-down"
        cases.append(Case(name.replace(",", "+"), links))
    return cases


def _rates(name: str, text: str, options: Namespace) -> list[float]:
    """A rate per UE rank."""
    try:
        found = [network.rate(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if len(found) not in (1, options.hosts):
        raise ValueError(
            f"{name} {text} has {len(found)} rates; expected one, or one for each of --hosts "
            f"{options.hosts}."
        )
    return found * options.hosts if len(found) == 1 else found


def _settings(method: str, arguments: Sequence[str], hosts: int) -> Settings:
    """What a method's ranks train, without settings that it doesn't have; the sizes of the data."""
    tables.check("method", method)
    given = [*arguments, "--topology.placement", "apart"]
    sections = commandline.sections(given)
    settings = Settings(**suited(method, sections))
    if not settings.stages:
        raise ValueError(f"{method} has no links: it trains in one process; leave it out.")
    if settings.topology.participants is not None:
        raise ValueError(
            f"topology.participants is {settings.topology.participants}, but the forecast is of "
            "iterations of all UEs; leave it out."
        )
    settings = channels.sized(settings.on(settings.stages + hosts))
    if hosts > settings.topology.ues:
        raise ValueError(f"--hosts is {hosts}, but there are {settings.topology.ues} UEs.")
    # what is measured is an iteration: no pauses for checkpoints or evaluations in between
    count = settings.train.iterations
    return replace(settings, run=replace(settings.run, eval_every=count, save_every=count))
