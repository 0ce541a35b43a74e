"""The BTS half of the federated methods; `csipipe.methods.federated` has the UE half.

It adds up what the UEs send and returns the mean (`csipipe.methods.exchange`), or what a method
makes of the mean. Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods.base import EvalRows
from csipipe.methods.common import is_one_model
from csipipe.methods.exchange import BtsExchange
from csipipe.methods.half import Evaluation, Half
from csipipe.methods.seat import Seat
from csipipe.methods.state import BTS, Moments, NoMoments, Unit
from csipipe.pipeline.schedule import Plan


class BtsHalf(Half):
    """The aggregator, on the one BTS stage; a method whose BTS does more than average inherits.

    Attributes:
        kept, moments: what a checkpoint holds of it besides what the exchange keeps: modules, whose
            buffers are state, by name; and Adam's state of the parts that it steps.
    """

    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        with self.autocast():
            seat.notes += models.kernels_notes(self.settings.model, self.device)
        self.exchange = BtsExchange(self)
        self.exchange.mean_step = self.step
        self.whole, self.each = self.exchange.whole, self.exchange.each
        self.kept: dict[str, nn.Module] = {}
        self.moments: Moments = NoMoments()

    def step(self, mean: Tensor) -> Tensor:
        """(P,) mean of what the UEs sent → (P,) by how much the shared parts move, of all UEs."""
        return mean

    def begin(self, iteration: int) -> None:
        self.reports.post()
        self.exchange.begin()

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """What concerns UEs that take part."""
        super().execute(self.seat.roster.of(plan), clock)

    def end(self) -> Figures:
        """Figures of the iteration."""
        self.exchange.finish()
        faults = self.exchange.faults
        self.seat.count(faults)
        self.clock.begin("wait", "wait for figures")
        return self.gather(faults)

    def evaluation(self, part: EvalRows) -> Evaluation:
        """Gathers figures; all UEs have those of one model where it is tested once."""
        self.exchange.lend(self.seat.roster.evaluated)
        yield
        sums = torch.zeros(self.topology.ues, WIDTH, dtype=torch.float64)
        left_out: frozenset[int] = frozenset()
        for _ in range(self.seat.batches[part]):
            self.reports.post()
            found = self.gather()
            sums += found.sums
            left_out |= found.left_out
            yield
        if part == "test" and is_one_model(self.settings):
            sums[self.seat.roster.evaluated] = sums.sum(dim=0)
        return Figures(sums, left_out)

    def lend(self) -> None:
        self.exchange.lend(range(self.topology.ues))

    def save_weights(self, folder: Path) -> None:
        """Writes the tail that the first host of UEs sends."""
        tail = nn.Sequential(*models.build_tail(self.settings.model, 0))
        channel = self.wire.weights(self.topology.ue_roles[0], len(checkpoint.flatten(tail)))
        channel.post()
        state = checkpoint.unflatten(channel.receive(0), tail)
        checkpoint.save(checkpoint.tail_file(folder), {"tail": state})

    def units(self) -> dict[str, Unit]:
        """What the exchange keeps, and the method."""
        parts, exchange = self.exchange.units() | self.kept, self.exchange
        unit = Unit(parts, self.moments, loaded=exchange.loaded, begun=exchange.begun)
        return {BTS: unit} if parts else {}
