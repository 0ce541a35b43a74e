"""The BTS half of the federated methods; `csipipe.methods.federated` has the UE half.

It adds up what the UEs send and returns the mean, or, where they send gradients, Adam's step with
their mean. Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models
from csipipe.comm import trust
from csipipe.comm.channel import Channel
from csipipe.comm.codec import Residual
from csipipe.comm.ledger import Kind
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods.base import EvalRows, adam, set_rate
from csipipe.methods.common import (
    FEEDBACK,
    MEANS,
    MISSED,
    UP,
    Common,
    is_one_model,
    shared_modules,
    sizes,
    some_are_absent,
)
from csipipe.methods.half import Evaluation, Half
from csipipe.methods.replica import split
from csipipe.methods.seat import Seat
from csipipe.methods.state import BTS, AdamMoments, NoMoments, Unit
from csipipe.pipeline.schedule import Op, Plan


class BtsHalf(Half):
    """The aggregator, on the one BTS stage.

    It adds in UE order, so that sums don't depend on who is first or where a UE is hosted, and
    holds the vector of one UE at a time.
    """

    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        with self.autocast():
            seat.notes += models.kernels_notes(self.settings.model, self.device)
        ues = range(self.topology.ues)
        self.sizes = sizes(self.settings)
        self.up = {kind: self.sizes[kind] for kind in UP if kind in self.sizes}
        for kind, scalars in self.sizes.items():  # one vector in memory at a time, later
            if kind not in MEANS:
                self.wire.expect(kind, ues, (1, scalars), 1)
        down = [kind for kind in MEANS if kind in self.sizes]
        self.down = {kind: self.wire.vector(kind, self.sizes[kind], ues) for kind in down}
        if self.settings.comm.error_feedback:
            residual = Residual(self.sizes[Kind.UPDATE]).to(self.device)
            self.down[Kind.MEAN_UPDATE].residual = residual
        self._peers = [channel.peers for channel in self.down.values()]
        self.parts: dict[str, nn.Module] = {}
        self.commons: list[Common] = []
        self.optimizer: torch.optim.Optimizer | None = None
        if some_are_absent(self.settings) or self.settings.spec.bts_steps:
            self._keep_model()
        self.whole = {Op.SEND_MEAN: self._send_mean}
        self.each = {
            Op.SEND_MISSED: self._send_missed,
            Op.RECEIVE_UPDATE: self._receive,
            Op.AGGREGATE: self._add,
        }
        self._faults: dict[int, str] = {}
        self._totals: list[Tensor] = []
        self._vectors: list[Tensor] = []
        self._sent: list[Channel] = []

    def _keep_model(self) -> None:
        self.parts = shared_modules(self.settings, self.device)
        parts = self.parts.values()
        parameters: list[Tensor] = [p for part in parts for p in part.parameters()]
        statistics = [b for part in parts for b in part.buffers() if b.is_floating_point()]
        kept = [tensors for tensors in (parameters, statistics) if tensors]
        self.commons = [Common(tensors, self.settings) for tensors in kept]
        if self.settings.spec.bts_steps:
            self.optimizer = adam(
                {name: part.parameters() for name, part in self.parts.items()}, self.settings.train
            )

    def begin(self, iteration: int) -> None:
        self.reports.post()
        self._faults = {}
        self._totals = [torch.zeros(1, n, device=self.device) for n in self.up.values()]
        if some_are_absent(self.settings):
            present = self.seat.roster.present
            for channel, peers in zip(self.down.values(), self._peers, strict=True):
                channel.lay([peers[ue] for ue in present])
        if self.optimizer is not None:
            set_rate(self.optimizer, self.settings.train.lr_at(iteration))

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """What concerns UEs that take part."""
        super().execute(self.seat.roster.of(plan), clock)

    def end(self) -> Figures:
        """A UE that is dropped gets the mean of the others, too."""
        for channel in (*self.down.values(), *self._sent):
            channel.finish()
        self._sent = []
        self.seat.count(self._faults)
        self.clock.begin("wait", "wait for figures")
        return self.gather(self._faults)

    def _send_missed(self, ue: int) -> None:
        for common, (channel, missed) in zip(self.commons, self._tell(ue), strict=True):
            common.told(ue, missed)
            self._sent.append(channel)

    def _tell(self, ue: int) -> list[tuple[Channel, Tensor]]:
        """Send a UE what it misses; returns, of each channel, what it receives."""
        told = []
        for kind, common in zip(MISSED, self.commons, strict=False):  # maybe without statistics
            channel = self.wire.vector(kind, self.sizes[kind], range(ue, ue + 1))
            told.append((channel, _send(channel, common.missed(ue))))
        return told

    def _receive(self, ue: int) -> None:
        vectors = self.wire.vectors(self.up, ue, self.tolerant)
        if isinstance(vectors, str):
            self._faults[ue] = vectors
            self._vectors = []
        else:
            self._vectors = vectors

    def _add(self, ue: int) -> None:
        if ue not in self._faults:
            for total, vector in zip(self._totals, self._vectors, strict=True):
                total += vector

    def _send_mean(self) -> None:
        """Means over the UEs that are left, or the step with them; in fp32 whatever crossed."""
        self.seat.leave_out(self._faults)
        present = self.seat.roster.present
        means = [total / (len(present) - len(self._faults)) for total in self._totals]
        if self.optimizer is not None:
            means[0] = self._step(means[0][0])[None]
        pairs = zip(self.down.values(), means, strict=True)
        heard = [_send(channel, mean[0]) for channel, mean in pairs]
        for common, change in zip(self.commons, heard, strict=False):  # it may keep no model
            common.move(change, present)

    def _step(self, mean: Tensor) -> Tensor:
        """(P,): Adam's step with a mean gradient."""
        assert self.optimizer is not None
        named = [
            (f"{part}.{name}", parameter)
            for part, module in self.parts.items()
            for name, parameter in module.named_parameters()
        ]
        parameters = [parameter for _, parameter in named]
        for parameter, gradient in zip(parameters, split(mean, list(parameters)), strict=True):
            parameter.grad = gradient
        trust.check_gradients("the mean over UEs of", named)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.commons[0].agreed.change()

    def _lend(self, ues: Iterable[int]) -> None:
        """Lend UEs what they miss, to be evaluated, or saved, with what all have in common."""
        if some_are_absent(self.settings):
            self.wire.ledger.phase = "evaluation"
            for ue in ues:
                for channel, _ in self._tell(ue):
                    channel.finish()
            self.wire.ledger.phase = "training"

    def evaluation(self, part: EvalRows) -> Evaluation:
        """Gathers figures; all UEs have those of one model where it is tested once."""
        self._lend(self.seat.roster.evaluated)
        yield
        sums = torch.zeros(self.topology.ues, WIDTH, dtype=torch.float64)
        for _ in range(self.seat.batches[part]):
            self.reports.post()
            sums += self.gather().sums
            yield
        if part == "test" and is_one_model(self.settings):
            sums[self.seat.roster.evaluated] = sums.sum(dim=0)
        return Figures(sums)

    def hand_over(self) -> None:
        """Lend every UE what its weights that are saved lack."""
        self._lend(range(self.topology.ues))

    def save_weights(self, folder: Path) -> None:
        """Writes the tail that the first host of UEs sends."""
        tail = nn.Sequential(*models.build_tail(self.settings.model, 0))
        channel = self.wire.weights(self.topology.ue_roles[0], len(checkpoint.flatten(tail)))
        channel.post()
        state = checkpoint.unflatten(channel.receive(0), tail)
        checkpoint.save(checkpoint.tail_file(folder), {"tail": state})

    def units(self) -> dict[str, Unit]:
        """What the UEs have in common, what each of them knows of it, Adam's moments; and what the
        means have lost so far, where that is made up for.
        """
        parts = self.parts | dict(zip(("values", "statistics"), self.commons, strict=False))
        residual = self.down[Kind.MEAN_UPDATE].residual
        parts |= {FEEDBACK: residual} if residual else {}
        moments = NoMoments() if self.optimizer is None else AdamMoments(self.optimizer)

        def loaded() -> None:
            for common in self.commons:
                common.agreed.refresh()

        def begun() -> None:
            for common in self.commons:
                common.restart()

        return {BTS: Unit(parts, moments, loaded=loaded, begun=begun)} if parts else {}


def _send(channel: Channel, vector: Tensor) -> Tensor:
    """Send (P,); returns what is read at the other end."""
    return channel.codec.decode(channel.send(0, vector[None]))[0].float()
