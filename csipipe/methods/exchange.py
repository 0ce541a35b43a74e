"""The mean over UEs of the parts that they share, at both ends; whoever trains those parts.

Every UE sends by how much its shared parts have changed since the last exchange (or their
gradient), and BatchNorm's running statistics likewise; the BTS adds up in UE order and returns the
mean. Where some UEs are absent, one that is back first receives what it missed.

Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from csipipe.comm.channel import Channel
from csipipe.comm.codec import Residual
from csipipe.comm.ledger import Kind
from csipipe.methods.base import shared_tensors
from csipipe.methods.common import (
    FEEDBACK,
    MEANS,
    MISSED,
    UP,
    Common,
    shared_modules,
    sizes,
    some_are_absent,
)
from csipipe.methods.half import Half
from csipipe.methods.replica import Agreed
from csipipe.pipeline.schedule import Op

MeanStep = Callable[[Tensor], Tensor]
"""(P,) mean of what the UEs sent → (P,) by how much the shared parts move."""


class UeExchange:
    """At the UEs of a role.

    Args:
        half: that role's.
        agreed: of each UE, its shared parameters and, in a model with BatchNorm, the running
            statistics: what was agreed on, and the tensors that have changed since.

    Attributes:
        each: what is done at instructions on one UE.
    """

    def __init__(self, half: Half, agreed: Mapping[int, list[Agreed]]) -> None:
        self.half = half
        self.agreed = agreed
        self.sizes = sizes(half.settings)
        self.lines = {
            ue: {
                kind: half.wire.vector(kind, scalars, range(ue, ue + 1))
                for kind, scalars in self.sizes.items()
            }
            for ue in agreed
        }
        if half.settings.comm.error_feedback:
            for line in self.lines.values():
                line[Kind.UPDATE].residual = Residual(self.sizes[Kind.UPDATE]).to(half.device)
        self.each: dict[Op, Callable[[int], None]] = {
            Op.RECEIVE_MISSED: self.catch_up,
            Op.RECEIVE_MEAN: self.receive,
            Op.APPLY: self.apply,
        }
        self._means: list[Tensor] = []
        self._lent: list[tuple[Agreed, Tensor]] = []

    def post(self, kinds: Iterable[Kind], ues: Iterable[int]) -> None:
        """These will arrive for these UEs, as far as they are of this role."""
        for line in (self.lines[ue] for ue in ues if ue in self.lines):
            for kind in kinds:
                if kind in line:
                    line[kind].post()

    def catch_up(self, ue: int) -> None:
        """A UE that was absent receives what it missed."""
        for agreed, missed in zip(self.agreed[ue], self._receive(MISSED, ue), strict=True):
            agreed.apply(missed)

    def send(self, ue: int, update_P: Tensor) -> None:
        """Send a UE's update, and how its statistics have changed."""
        _, *statistics = self.agreed[ue]
        vectors = [update_P, *(one.change() for one in statistics)]
        for kind, vector in zip(UP, vectors, strict=False):  # maybe without statistics
            self.lines[ue][kind].send(0, vector[None])

    def receive(self, ue: int) -> None:
        """Receive the mean for a UE."""
        self._means = self._receive(MEANS, ue)

    def apply(self, ue: int) -> None:
        """Move the UE's parts by it."""
        for agreed, mean in zip(self.agreed[ue], self._means, strict=True):
            agreed.apply(mean)
        self.half.clock.begin("send", "finish upload of UE", ue)
        for kind in UP:
            if kind in self.lines[ue]:
                self.lines[ue][kind].finish()

    def borrow(self, ues: Iterable[int]) -> None:
        """These UEs have what they missed too, until `give_back`.

        Should a save fail, that is when an iteration or a checkpoint begins.
        """
        if some_are_absent(self.half.settings):
            self.half.wire.ledger.phase = "evaluation"
            for ue in ues:
                self.post(MISSED, [ue])
                for agreed, missed in zip(self.agreed[ue], self._receive(MISSED, ue), strict=True):
                    self._lent.append((agreed, agreed.lend(missed)))
            self.half.wire.ledger.phase = "training"

    def give_back(self) -> None:
        """Everything is again as it was before `borrow`."""
        for agreed, own in self._lent:
            agreed.show(own)
        self._lent.clear()

    def feedback(self, ue: int) -> dict[str, nn.Module]:
        """What a UE's updates have lost at their codec, where that is made up for."""
        residual = self.lines[ue][Kind.UPDATE].residual
        return {FEEDBACK: residual} if residual else {}

    def _receive(self, kinds: Iterable[Kind], ue: int) -> list[Tensor]:
        line = self.lines[ue]
        return [line[kind].receive(0)[0].float() for kind in kinds if kind in line]


class BtsExchange:
    """At the BTS, which adds in UE order, so that sums don't depend on who is first or where a UE
    is hosted, and holds the vector of one UE at a time.

    Args:
        half: the first stage's, which the UEs reach.

    Attributes:
        parts: the shared parts that it keeps, by name.
        commons: their parameters that learn, and statistics.
        faults: UEs of this exchange whose updates were bad, and why.
        whole, each: what is done at instructions without and with a UE.
    """

    def __init__(self, half: Half) -> None:
        self.half, settings = half, half.settings
        ues = range(half.topology.ues)
        self.sizes = sizes(settings)
        self.up = {kind: self.sizes[kind] for kind in UP if kind in self.sizes}
        for kind, scalars in self.sizes.items():  # one vector in memory at a time, later
            if kind not in MEANS:
                half.wire.expect(kind, ues, (1, scalars), 1)
        down = [kind for kind in MEANS if kind in self.sizes]
        self.down = {kind: half.wire.vector(kind, self.sizes[kind], ues) for kind in down}
        if settings.comm.error_feedback:
            residual = Residual(self.sizes[Kind.UPDATE]).to(half.device)
            self.down[Kind.MEAN_UPDATE].residual = residual
        self._peers = [channel.peers for channel in self.down.values()]
        self.parts: dict[str, nn.Module] = {}
        self.commons: list[Common] = []
        if some_are_absent(settings) or settings.spec.bts_steps:
            self.parts = shared_modules(settings, half.device)
            shared = shared_tensors(self.parts.values())
            self.commons = [Common(tensors, settings) for tensors in shared]
        self.mean_step: MeanStep | None = None
        self.whole: dict[Op, Callable[[], None]] = {Op.SEND_MEAN: self._send_mean}
        self.each: dict[Op, Callable[[int], None]] = {
            Op.SEND_MISSED: self._send_missed,
            Op.RECEIVE_UPDATE: self._receive,
            Op.AGGREGATE: self._add,
        }
        self.faults: dict[int, str] = {}
        self._totals: list[Tensor] = []
        self._vectors: list[Tensor] = []
        self._sent: list[Channel] = []

    def begin(self) -> None:
        """An iteration begins; its UEs are known."""
        self.faults = {}
        self._totals = [torch.zeros(1, n, device=self.half.device) for n in self.up.values()]
        if some_are_absent(self.half.settings):
            present = self.half.seat.roster.present
            for channel, peers in zip(self.down.values(), self._peers, strict=True):
                channel.lay([peers[ue] for ue in present])

    def finish(self) -> None:
        """Wait until what was sent has been taken."""
        for channel in (*self.down.values(), *self._sent):
            channel.finish()
        self._sent = []

    def _send_missed(self, ue: int) -> None:
        for common, (channel, missed) in zip(self.commons, self._tell(ue), strict=True):
            common.told(ue, missed)
            self._sent.append(channel)

    def _tell(self, ue: int) -> list[tuple[Channel, Tensor]]:
        """Send a UE what it misses; returns, of each channel, what it receives."""
        told = []
        for kind, common in zip(MISSED, self.commons, strict=False):  # maybe without statistics
            channel = self.half.wire.vector(kind, self.sizes[kind], range(ue, ue + 1))
            told.append((channel, _send(channel, common.missed(ue))))
        return told

    def _receive(self, ue: int) -> None:
        wire = self.half.wire
        channels = [wire.vector(kind, n, range(ue, ue + 1)) for kind, n in self.up.items()]
        for channel in channels:
            channel.tolerant = self.half.tolerant
            channel.post()
        self._vectors = [channel.receive(0) for channel in channels]
        for fault in (fault for channel in channels for fault in channel.bad.values()):
            self.faults.setdefault(ue, fault)

    def _add(self, ue: int) -> None:
        if ue not in self.faults:
            for total, vector in zip(self._totals, self._vectors, strict=True):
                total += vector

    def _send_mean(self) -> None:
        """Means over the UEs that are left, or the step with them; in fp32 whatever crossed.

        A UE that is left out gets the mean of the others, too.
        """
        self.half.seat.leave_out(self.faults)
        present = self.half.seat.roster.present
        means = [total / (len(present) - len(self.faults)) for total in self._totals]
        if self.mean_step is not None:
            means[0] = self.mean_step(means[0][0])[None]
        pairs = zip(self.down.values(), means, strict=True)
        heard = [_send(channel, mean[0]) for channel, mean in pairs]
        for common, change in zip(self.commons, heard, strict=False):  # it may keep nothing
            common.move(change, present)

    def lend(self, ues: Iterable[int]) -> None:
        """Lend UEs what they miss, to be evaluated, or saved, with what all have in common."""
        if some_are_absent(self.half.settings):
            self.half.wire.ledger.phase = "evaluation"
            for ue in ues:
                for channel, _ in self._tell(ue):
                    channel.finish()
            self.half.wire.ledger.phase = "training"

    def units(self) -> dict[str, nn.Module]:
        """What a checkpoint holds of it: what the UEs have in common, what each of them knows of
        it; and what the means have lost so far, where that is made up for."""
        parts = self.parts | dict(zip(("values", "statistics"), self.commons, strict=False))
        residual = self.down[Kind.MEAN_UPDATE].residual
        return parts | ({FEEDBACK: residual} if residual else {})

    def loaded(self) -> None:
        """`units` were loaded."""
        for common in self.commons:
            common.agreed.refresh()

    def begun(self) -> None:
        """The parts were set: all UEs start with them."""
        for common in self.commons:
            common.restart()


def _send(channel: Channel, vector: Tensor) -> Tensor:
    """Send (P,); returns what is read at the other end."""
    return channel.codec.decode(channel.send(0, vector[None]))[0].float()
