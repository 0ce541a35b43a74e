"""What `csipipe benchmark` does: our speed beside that of our peers, taking turns.

It starts the processes of every candidate itself, without torchrun.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from csipipe import channels
from csipipe.bench import candidates, growth, race, roofline, table
from csipipe.entry import refusing
from csipipe.files import write_file
from csipipe.settings import commandline
from csipipe.settings.config import Settings

ABOUT = """Times an iteration of csipipe and of its peers, taking turns in one session, and checks
that all of them do the same arithmetic. Start it with python, not torchrun."""


def parser() -> ArgumentParser:
    """A parser of the settings and of the options of a benchmark."""
    parser = commandline.parser(ABOUT, "python -m csipipe benchmark")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--per-turn", type=int, default=1, help="iterations of a turn")
    parser.add_argument("--ue-ranks", type=int, default=2, help="processes that host the UEs")
    parser.add_argument(
        "--only",
        type=str | None,
        default=None,
        help=f"some of {','.join(candidates.ABOUT)}; null: {','.join(candidates.USUAL)}",
    )
    parser.add_argument(
        "--layers",
        choices=("both", "ours", "plain"),
        default="both",
        help="layers of the peers' tail: ours compares schedules, plain compares everything; both: "
        "ours alone where the model has no tail of plain layers",
    )
    parser.add_argument(
        "--growth", action="store_true", help="time ours with 2 to 64 UEs instead: cost and memory"
    )
    parser.add_argument(
        "--json", type=str | None, default=None, help="file to write all measurements to"
    )
    return parser


@refusing(ArgumentError, OSError, ValueError)
def main(arguments: list[str]) -> int:
    """Run the benchmark; returns its exit code."""
    settings, options = commandline.settings(parser(), arguments)
    for name in ("rounds", "per-turn"):
        if (value := options[name.replace("-", "_")]) < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1.")
    return measure(settings, options)


def measure(settings: Settings, options: Namespace) -> int:
    """Let the candidates take turns; 1 if one of them failed, 130 if interrupted."""
    settings = channels.sized(settings)
    if options.growth:
        found = growth.candidates(settings, options.ue_ranks)
    else:
        both = candidates.LAYERS if candidates.has_plain(settings) else ("ours",)
        layers = both if options.layers == "both" else (options.layers,)
        names = candidates.choose(options.only)
        found = candidates.line_up(settings, options.ue_ranks, names, layers)
    contest = race.Race(found, iterations=options.per_turn, same=not options.growth)
    target = None if options.json is None else Path(options.json)
    if target is not None and not target.parent.is_dir():
        raise FileNotFoundError(f"--json: the folder {target.parent} doesn't exist.")
    record = None if target is None else target.with_name(target.name + ".rounds")
    code = 0
    try:
        race.run(contest, options.rounds, record, lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        code = 130
        print(f"\ninterrupted after {len(contest.rounds)} timed round(s)", file=sys.stderr)
    report(contest, options.growth, target)
    return code or int(bool(contest.failures))


def report(contest: race.Race, growing: bool, target: Path | None) -> None:
    """Print the tables of what was measured, and write `target`, whole or not at all."""
    reached = {} if growing else roofline.measure(contest)
    if contest.rounds:
        parts = [growth.table(contest)] if growing else _tables(contest, reached)
        print("\n" + "\n\n".join(part for part in parts if part), flush=True)
    for why in contest.failures.values():
        print(f"\ncsipipe: error: {why}", file=sys.stderr)
    if target is not None and contest.rounds:
        found = table.as_json(contest) | {"roofline": reached}
        write_file(target, json.dumps(found, indent=1) + "\n")
        print(f"\nwritten: {target}")


def _tables(contest: race.Race, reached: dict[str, dict[str, Any]]) -> list[str]:
    """What was measured, as text; empty where there is nothing to say."""
    first = contest.candidates[0]
    return [
        table.title(first.settings, first.ranks),
        table.seconds_table(contest),
        table.ratio_table(contest),
        *(table.share_table(contest, candidate) for candidate in contest.candidates),
        roofline.table(reached),
    ]
