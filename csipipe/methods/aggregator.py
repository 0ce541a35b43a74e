"""The BTS half of the federated methods; `csipipe.methods.federated` has the UE half.

It adds up what the UEs send and returns the mean (`csipipe.methods.exchange`), or, where they send
gradients, Adam's step with their mean. Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models
from csipipe.comm import trust
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods.base import EvalRows, adam, set_rate
from csipipe.methods.common import is_one_model
from csipipe.methods.exchange import BtsExchange
from csipipe.methods.half import Evaluation, Half
from csipipe.methods.replica import split
from csipipe.methods.seat import Seat
from csipipe.methods.state import BTS, AdamMoments, NoMoments, Unit
from csipipe.pipeline.schedule import Plan


class BtsHalf(Half):
    """The aggregator, on the one BTS stage."""

    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        with self.autocast():
            seat.notes += models.kernels_notes(self.settings.model, self.device)
        steps = self.settings.spec.bts_steps
        self.exchange = BtsExchange(self, keeps=steps)
        self.whole, self.each = self.exchange.whole, self.exchange.each
        self.optimizer: torch.optim.Optimizer | None = None
        if steps:
            parts = self.exchange.parts
            self.optimizer = adam(
                {name: part.parameters() for name, part in parts.items()}, self.settings.train
            )
            self.exchange.mean_step = self._step

    def begin(self, iteration: int) -> None:
        self.reports.post()
        self.exchange.begin()
        if self.optimizer is not None:
            set_rate(self.optimizer, self.settings.train.lr_at(iteration))

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

    def _step(self, mean: Tensor) -> Tensor:
        """(P,): Adam's step with a mean gradient."""
        assert self.optimizer is not None
        named = [
            (f"{part}.{name}", parameter)
            for part, module in self.exchange.parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        parameters = [parameter for _, parameter in named]
        for parameter, gradient in zip(parameters, split(mean, list(parameters)), strict=True):
            parameter.grad = gradient
        trust.check_gradients("the mean over UEs of", named)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.exchange.commons[0].agreed.change()

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
        """What the exchange keeps, and Adam's moments."""
        parts, exchange = self.exchange.units(), self.exchange
        moments = NoMoments() if self.optimizer is None else AdamMoments(self.optimizer)
        unit = Unit(parts, moments, loaded=exchange.loaded, begun=exchange.begun)
        return {BTS: unit} if parts else {}
