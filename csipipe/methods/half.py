"""What the UE half and the BTS half of a method share, and what `Rank` asks of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from csipipe.comm.wire import Wire
from csipipe.device import autocast
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods.base import EvalRows
from csipipe.methods.seat import Seat
from csipipe.methods.state import Unit
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline import schedule
from csipipe.pipeline.schedule import Instruction, Op, Plan

Evaluation = Generator[None, None, Figures | None]
"""Pauses after each batch, for the rank's other role; returns figures at the BTS's first stage."""


class Half:
    """One role of a rank in a method.

    An iteration is `begin` and `draw`, then `load`, for each section of the plan `open`, `execute`
    in one or more pieces, and `close`, then `add_up` and `fetch`, and at last `end`. From `load` to
    `add_up` nothing is decided by what was computed, unless UEs are dropped, so that
    `csipipe.methods.recorded` can record it. `Rank` may go on to the next one's `draw` and what
    follows, up to `fetch`, before the `end` of an iteration and the next one's `begin`.

    Args:
        seat: the rank that has this role.
        role: see `Topology`.

    Attributes:
        whole, each: what is done at instructions without and with a micro-batch, or a UE.
    """

    def __init__(self, seat: Seat, role: int) -> None:
        self.seat = seat
        self.role = role
        self.settings, self.topology = seat.settings, seat.topology
        self.world, self.device = seat.world, seat.device
        self.clock, self.probe, self.tolerant = seat.clock, seat.probe, seat.tolerant
        self.wire = Wire(self.topology, role, self.settings, self.device, self.clock, seat.loop)
        self.reports = self.wire.reports(WIDTH)
        self.whole: dict[Op, Callable[[], None]] = {}
        self.each: dict[Op, Callable[[int], None]] = {}

    def evaluated(self) -> dict[EvalRows, int]:
        """Rows that an evaluation needs batches for."""
        return {"holdout": 0, "test": 0}

    def begin(self, iteration: int) -> None:
        """An iteration begins: post what may arrive before the plan says so."""

    def draw(self, iteration: int) -> None:
        """Draw what it computes with, and set its rates."""

    def drawn(self) -> list[Tensor]:
        """Where on the device that lies, as far as `recorded` is to know it."""
        return []

    def load(self) -> None:
        """Put what was drawn where it is computed with."""

    def open(self, plan: list[Instruction]) -> None:
        """These instructions will follow."""

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """Execute some of them.

        Args:
            clock: counts the time; None: this rank's.
        """
        schedule.execute(plan, self.whole, self.each, self.clock if clock is None else clock)

    def close(self) -> None:
        """All of them were executed: wait until what was sent has been taken."""

    def undo(self) -> None:
        """Take back what the section changed: it is repeated without some UE."""

    def add_up(self) -> None:
        """All sections were executed: sum up the figures."""

    def fetch(self) -> None:
        """Begin to copy them to the host, before another iteration overwrites them."""

    def end(self) -> Figures | None:
        """The iteration is over; figures of the UEs' batches, at the BTS's first stage."""
        raise NotImplementedError

    def unrecordable(self) -> str | None:
        """Why an iteration can't be recorded once and then only be replayed; None: it can."""
        return f"{self.settings.method} decides what it computes while it trains"

    def evaluation(self, part: EvalRows) -> Evaluation:
        """Figures on `part`, BatchNorm by running statistics; called without gradients."""
        raise NotImplementedError

    def lend(self) -> None:
        """Before `hand_over`: UEs get what they miss, until their weights are saved."""

    def hand_over(self) -> None:
        """Send what another rank is to save: before any of them can fail to write."""

    def save_weights(self, folder: Path) -> None:
        """Write this half's parts into `folder` (OSError)."""

    def units(self) -> dict[str, Unit]:
        """What a checkpoint holds of this half, by the part's name."""
        return {}

    def autocast(self) -> AbstractContextManager[object]:
        """Arithmetic of the UE parts' forward passes."""
        return autocast(self.settings.train.precision, self.device)

    def gather(self, without: Container[int] = ()) -> Figures:
        """At the BTS's first stage: what the UEs report. UEs that are left out have no rows.

        Where bad UEs are dropped, so are figures that aren't finite.
        """
        sums = self.reports.receive(0).clone()
        left_out = frozenset(
            ue
            for ue, row in enumerate(sums)
            if ue in without or (self.tolerant and not row.isfinite().all())
        )
        sums[list(left_out)] = 0
        return Figures(sums, left_out)

    def report(self, sums: Tensor) -> None:
        """At the UEs: send (UEs, WIDTH) figures there."""
        self.reports.send(0, sums.cpu())
        self.reports.finish()


class UeSide(Half):
    """What the UE halves share: the UEs of one rank, and their weights.

    Args:
        ues: this role's UEs, ascending.
        test: (B, 2, A, D) the common test set.
    """

    def __init__(self, seat: Seat, role: int, ues: list[UserEquipment], test: Tensor) -> None:
        super().__init__(seat, role)
        self.ues = ues
        self.test = test

    def save_weights(self, folder: Path) -> None:
        """Every UE's encoder and head."""
        for ue in self.ues:
            ue.save(folder)


def in_turns(evaluations: Iterable[Evaluation]) -> Figures | None:
    """Figures of evaluations that advance a batch at a time, in turn."""
    figures = None
    going = list(evaluations)
    while going:
        for evaluation in list(going):
            try:
                next(evaluation)
            except StopIteration as end:
                figures = figures or end.value
                going.remove(evaluation)
    return figures
