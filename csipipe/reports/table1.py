"""Table I: seconds per iteration with and without the pipeline.

A cell holds two figures of the paper's sixteen, for an environment, a codeword dimension c1 = c2
and a batch size per UE. *With* is the tail on S BTS stages; *without* is the same program with
the whole tail on one BTS stage, the same micro-batches and UE ranks. Both are resident and take
turns, so that a noisy machine affects both; ratios are taken round by round. A finished cell stays
on disk and isn't measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from csipipe.bench import candidates, memory
from csipipe.bench.conductor import Conductor
from csipipe.bench.race import CROWDED, Race
from csipipe.bench.table import as_json, machine
from csipipe.files import DAMAGED, add_line, write_file
from csipipe.reports import table1_output
from csipipe.settings.config import (
    DataSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)

WITH, WITHOUT = "ours", "ours-unpipelined"
_LEAST_ROUNDS = 3
_LEAST_TURN = 1.0  # seconds
_PATIENCE = 600.0  # seconds that a rank waits for a peer
_MARGIN = 0.9  # of the available time: a round can't be cut short


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a Table I is measured with; cells of different plans aren't mixed."""

    ues: int = 10
    micro_batches: int = 2
    stages: int = 2
    ue_ranks: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    angles: int = 32
    delays: int = 32

    def settings(self, cell: Cell) -> Settings:
        """Settings of a cell, with the pipeline.

        Raises:
            ValueError: values that can't be used.
        """
        return Settings(
            model=ModelSettings(c1=cell.c, c2=cell.c, angles=self.angles, delays=self.delays),
            topology=TopologySettings(ues=self.ues, stages=self.stages),
            data=DataSettings(environment=cell.environment),
            train=TrainSettings(
                batch_size=cell.batch_size, micro_batches=self.micro_batches, device=self.device
            ),
            run=RunSettings(timeout=_PATIENCE),
        )

    def candidates(self, cell: Cell) -> list[candidates.Candidate]:
        """With and without the pipeline."""
        names = [WITH, WITHOUT]
        return candidates.line_up(self.settings(cell), self.ue_ranks, names, ("ours",))


@dataclass(frozen=True)
class Cell:
    """One cell of the table; `batch_size` is per UE, `c` is c1 = c2."""

    environment: Literal["indoor", "outdoor"]
    c: int
    batch_size: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.environment}-{self.c}-{self.batch_size}"


_ENVIRONMENTS: tuple[Literal["indoor", "outdoor"], ...] = ("indoor", "outdoor")
ALL = [Cell(*key) for key in itertools.product(_ENVIRONMENTS, (256, 512), (400, 800))]
"""The paper's eight columns; with and without pipeline, these are its sixteen figures."""
QUICK = [cell for cell in ALL if cell.environment == "indoor"]
"""Half of them: an iteration costs the same for all channels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `csipipe reproduce table1`."""
    plan = Plan()
    parser.add_argument(
        "--quick", action="store_true", help="indoor only: half the cells, in 10 minutes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/table1"),
        help="folder of cells and table (%(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="largest number of timed rounds of a cell"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"time for all cells, each with at least {_LEAST_ROUNDS} rounds (45; quick: 10)",
    )
    parser.add_argument(
        "--micro-batches", type=int, default=plan.micro_batches, help="the paper's is 2"
    )
    parser.add_argument("--stages", type=int, default=plan.stages, help="the paper's is 2")
    parser.add_argument(
        "--ue-ranks", type=int, default=plan.ue_ranks, help="processes that host the UEs"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=plan.device)


def run(options: argparse.Namespace) -> None:
    """Measure the cells that are missing and write the table.

    Raises:
        ValueError, OSError: options that can't be used, or a folder with another plan's cells.
        RuntimeError: a cell that couldn't be measured; the finished ones are kept.
    """
    plan = Plan(
        micro_batches=options.micro_batches,
        stages=options.stages,
        ue_ranks=options.ue_ranks,
        device=options.device,
    )
    minutes = options.minutes
    if minutes is None:
        minutes = 10 if options.quick else 45
    if not minutes > 0:
        raise ValueError(f"--minutes is {minutes}; it must be positive.")
    if options.rounds < _LEAST_ROUNDS:
        raise ValueError(f"--rounds is {options.rounds}; it must be at least {_LEAST_ROUNDS}.")
    cells = QUICK if options.quick else ALL
    reproduce(plan, cells, options.out, options.rounds, minutes * 60)


def reproduce(
    plan: Plan,
    cells: Sequence[Cell],
    folder: Path,
    rounds: int,
    seconds: float,
    conductor: Callable[[], Conductor] = Conductor,
) -> None:
    """As `run`; the table shows every finished cell in `folder`."""
    if plan.stages < 2:
        raise ValueError(f"--stages is {plan.stages}; a pipeline needs at least 2.")
    for cell in cells:
        plan.candidates(cell)  # so that mistakes show before anything is measured
    claim(plan, folder)
    missing = [cell for cell in cells if not _file(folder, cell).exists()]
    shares = _shares(cells, seconds * _MARGIN)
    print(describe(plan, cells, missing, folder, rounds, shares), flush=True)
    try:
        for number, cell in enumerate(missing, 1):
            print(f"cell {number}/{len(missing)}: {cell.name}", flush=True)
            found = measure(plan, cell, folder, rounds, shares[cell], conductor())
            _write(_file(folder, cell), found)
            table1_output.write(folder, read(folder), plan.stages, plan.micro_batches)
    except KeyboardInterrupt:
        kept = len(read(folder))
        print(f"\ninterrupted; {kept} finished cell(s) are in {folder}; start again to continue.")
        raise SystemExit(130) from None
    print("\n" + table1_output.write(folder, read(folder), plan.stages, plan.micro_batches))
    for ending in ("csv", "png", "md"):
        print(folder / f"table1.{ending}")


def measure(
    plan: Plan, cell: Cell, folder: Path, rounds: int, share: float, conductor: Conductor
) -> dict[str, Any]:
    """Time one cell; each round is written to disk when it ends.

    Raises:
        RuntimeError: one of the two couldn't be measured.
    """
    started = time.monotonic()
    race = Race(plan.candidates(cell))
    record = folder / "cells" / f"{cell.name}.rounds"
    record.write_text("")
    room = memory.available()
    with conductor:
        race.start(conductor)
        _warm_up(race, room)
        for number in range(rounds):
            before = time.monotonic()
            turns = race.round()
            if race.failures:
                raise RuntimeError(f"cell {cell.name}: " + "\n".join(race.failures.values()))
            line = {label: turn.seconds for label, turn in turns.items()}
            add_line(record, json.dumps(line))
            shown = ", ".join(f"{label} {value:.3f} s" for label, value in line.items())
            print(f"  round {number + 1}/{rounds}: {shown}", flush=True)
            now = time.monotonic()
            if number + 1 >= _LEAST_ROUNDS and now - started + now - before > share:
                break
    record.unlink()
    return {"cell": asdict(cell), "with": WITH, "without": WITHOUT, **as_json(race)}


def _warm_up(race: Race, room: int | None) -> None:
    """Warm up; then let a turn last at least a second, if an iteration is short."""
    turns = race.warm_up(room)
    if race.crowded:
        print(f"  {CROWDED}", flush=True)
    while turns:
        slowest = max(turn.seconds for turn in turns.values())
        wanted = math.ceil(_LEAST_TURN / slowest)
        if wanted <= 2 * race.iterations:
            return
        race.iterations = wanted
        turns = race.practise()


def describe(
    plan: Plan,
    cells: Sequence[Cell],
    missing: Sequence[Cell],
    folder: Path,
    rounds: int,
    shares: dict[Cell, float],
) -> str:
    """Describe what will be done."""
    best = table1_output.bound(plan.stages, plan.micro_batches)
    longest = sum(shares[cell] for cell in missing) / _MARGIN / 60
    return (
        f"Table I: {len(cells)} cells, each with and without pipeline, {plan.ues} UEs on "
        f"{plan.ue_ranks} UE rank(s), {plan.micro_batches} micro-batches\n"
        f"with: {plan.stages} BTS stages; without: 1 BTS stage, the same micro-batches\n"
        f"{len(cells) - len(missing)} cell(s) are in {folder} already; {len(missing)} to measure, "
        f"{_LEAST_ROUNDS} to {rounds} timed rounds each, about {longest:.0f} minutes at most\n"
        f"bound: {best:.1%} of the tail's time saved"
    )


def _shares(cells: Sequence[Cell], seconds: float) -> dict[Cell, float]:
    """Seconds for each cell: an iteration takes as long as it has rows."""
    total = sum(cell.batch_size for cell in cells)
    return {cell: seconds * cell.batch_size / total for cell in cells}


def claim(plan: Plan, folder: Path) -> None:
    """Claim the folder for this plan.

    Raises:
        ValueError: it holds cells of another plan or machine.
    """
    mine = {"plan": asdict(plan), "machine": machine()}
    file = folder / "plan.json"
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _write(file, mine)
        return
    try:
        theirs = json.loads(file.read_text())
        different = [
            f"{key} {theirs[part].get(key)!r}, not {value!r}"
            for part, keys in mine.items()
            for key, value in keys.items()
            if theirs[part].get(key) != value
        ]
    except DAMAGED as error:
        raise ValueError(f"{file} isn't a plan of Table I; choose another --out.") from error
    if different:
        raise ValueError(
            f"{folder} holds cells that were measured with {'; '.join(different)}. Choose another "
            "--out, or use the same settings to continue."
        )


def read(folder: Path) -> list[table1_output.Row]:
    """The finished cells of a folder, in the paper's order.

    Raises:
        ValueError: a file that isn't a cell.
    """
    found = []
    for file in sorted((folder / "cells").glob("*.json")):
        try:
            found.append(table1_output.Row.of(json.loads(file.read_text())))
        except DAMAGED as error:
            raise ValueError(
                f"{file} isn't a finished cell ({error}); delete it to have it measured again."
            ) from error
    return sorted(found, key=lambda row: (row.environment, row.c, row.batch_size))


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    write_file(file, json.dumps(content, indent=1) + "\n")
