"""What federated methods share: the UE half, whatever a UE sends; `aggregator` has the BTS half.

The whole model lives on every UE. In one iteration each UE trains on its own rows and sends one
vector up, the BTS sends the mean over UEs back, and each UE applies it. BatchNorm's running
statistics are averaged too, by their change. Parts and draws start as in CSILocal. Where some UEs
are absent, one that is back first receives what it missed.

Shapes: N UEs, P scalars of the shared parts, A angles, D delays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from csipipe import checkpoint
from csipipe.comm.codec import Residual
from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH
from csipipe.methods import rank as ranks
from csipipe.methods.aggregator import BtsHalf
from csipipe.methods.base import Builder, EvalRows
from csipipe.methods.common import (
    FEEDBACK,
    MEANS,
    MISSED,
    is_one_model,
    sizes,
    some_are_absent,
)
from csipipe.methods.half import Evaluation, UeSide
from csipipe.methods.replica import Agreed, Replica
from csipipe.methods.rows import load
from csipipe.methods.seat import Seat
from csipipe.methods.state import Unit, ue_name
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline import schedule
from csipipe.pipeline.schedule import Attempts, Instruction, Op, Plan
from csipipe.settings.config import Settings


def prepare(
    replica: type[Replica],
    settings: Settings,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Builder:
    """As `csipipe.methods.prepare`.

    Args:
        replica: what a method does at a UE.
    """
    return ranks.prepare(partial(_role, replica), _plans, settings, rank, world_size, device)


def _role(
    replica: type[Replica],
    settings: Settings,
    topology: Topology,
    role: int,
    device: torch.device,
) -> ranks.Role:
    if topology.stages != 1:
        raise ValueError(
            f"method {settings.method} aggregates on one BTS rank, but topology.stages is "
            f"{topology.stages}; leave topology.stages out, or set it to 1."
        )
    if topology.is_bts(role):
        return BtsHalf
    ues, test = load(settings, topology.ues_of(role), device)
    return partial(UeHalf, ues=ues, test=test, replica=replica)


def _plans(settings: Settings, topology: Topology) -> list[Attempts[Instruction]]:
    hosted = [topology.ues_of(role) for role in topology.ue_roles]
    return schedule.federated_training(hosted, some_are_absent(settings))


class UeHalf(UeSide):
    """Some of the UEs; other arguments as `UeSide`.

    Args:
        replica: what the method does at a UE.
    """

    def __init__(
        self,
        seat: Seat,
        role: int,
        ues: list[UserEquipment],
        test: Tensor,
        replica: type[Replica],
    ) -> None:
        super().__init__(seat, role, ues, test)
        settings = self.settings
        self.sizes = sizes(settings)
        self.replicas = {ue.number: replica(ue, settings, self.device) for ue in ues}
        for each in self.replicas.values():
            each.probe = self.probe
        # of models that have some
        self.statistics = {
            n: Agreed(r.statistics) for n, r in self.replicas.items() if r.statistics
        }
        self.lines = {
            ue.number: {
                kind: self.wire.vector(kind, scalars, range(ue.number, ue.number + 1))
                for kind, scalars in self.sizes.items()
            }
            for ue in ues
        }
        if settings.comm.error_feedback:
            for line in self.lines.values():
                line[Kind.UPDATE].residual = Residual(self.sizes[Kind.UPDATE]).to(self.device)
        evaluated = seat.roster.evaluated
        self.tested = {n: self.replicas[n] for n in evaluated if n in self.replicas}
        # a model common to all is tested once: the UEs take its batches in turn
        self.takers = evaluated if is_one_model(settings) else evaluated[:1]
        self.each = {
            Op.RECEIVE_MISSED: self._catch_up,
            Op.LOCAL_STEPS: self._train,
            Op.SEND_UPDATE: self._send,
            Op.RECEIVE_MEAN: self._receive,
            Op.APPLY: self._apply,
        }
        self._sums: dict[int, Tensor] = {}
        self._iteration = 0
        self._borrowed = False

    def evaluated(self) -> dict[EvalRows, int]:
        rows = (len(replica.ue.holdout) for replica in self.tested.values())
        return {"holdout": max(rows, default=0), "test": -(-len(self.test) // len(self.takers))}

    def begin(self, iteration: int) -> None:
        self._return()
        self._iteration, self._sums = iteration, {}
        roster = self.seat.roster
        for kinds, ues in ((MEANS, roster.present), (MISSED, roster.behind)):
            for line in (self.lines[ue] for ue in ues if ue in self.lines):
                for kind in kinds:
                    if kind in line:
                        line[kind].post()

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """What concerns UEs that take part."""
        super().execute(self.seat.roster.of(plan), clock)

    def end(self) -> None:
        """Figures of all UEs: a rank without any in this iteration doesn't hurry ahead."""
        self.clock.begin("send", "send figures")
        absent = torch.zeros(WIDTH, dtype=torch.float64)
        self._report([self._sums.get(ue.number, absent) for ue in self.ues])

    def _missed(self, ue: int) -> list[Tensor]:
        line = self.lines[ue]
        return [line[kind].receive(0)[0].float() for kind in MISSED if kind in line]

    def _catch_up(self, ue: int) -> None:
        for agreed, missed in zip(self._agreed(ue), self._missed(ue), strict=True):
            agreed.apply(missed)

    def _agreed(self, ue: int) -> list[Agreed]:
        """Its shared parameters and, if there are any, BatchNorm's statistics."""
        return [self.replicas[ue].agreed, *([self.statistics[ue]] if ue in self.statistics else [])]

    def _borrow(self, ues: Iterable[int]) -> None:
        """These UEs have what all have in common, whatever they missed.

        Until `_return`: should a save fail, when an iteration or a checkpoint begins.
        """
        if some_are_absent(self.settings):
            self._borrowed = True
            self.wire.ledger.phase = "evaluation"
            for ue in ues:
                for kind in MISSED:
                    if kind in self.lines[ue]:
                        self.lines[ue][kind].post()
                for agreed, missed in zip(self._agreed(ue), self._missed(ue), strict=True):
                    agreed.show(agreed.value + missed)
            self.wire.ledger.phase = "training"

    def _return(self) -> None:
        if self._borrowed:
            self._borrowed = False
            for agreed in (agreed for ue in self.replicas for agreed in self._agreed(ue)):
                agreed.show(agreed.value)

    def _train(self, ue: int) -> None:
        """A UE's update and figures; where bad UEs are dropped, one that fails sends NaN.

        It keeps its state from before the failed step, and continues with the others' mean.
        """
        replica = self.replicas[ue]
        replica.start(self._iteration)
        try:
            self._update, figures = replica.train()
        except FloatingPointError:
            if not self.tolerant:
                raise
            replica.ue.optimizer.zero_grad()
            self._update = torch.full((self.sizes[Kind.UPDATE],), math.nan, device=self.device)
            figures = torch.zeros(WIDTH, dtype=torch.float64)
        self._sums[ue] = figures

    def _send(self, ue: int) -> None:
        self.lines[ue][Kind.UPDATE].send(0, self._update[None])
        if ue in self.statistics:
            self.lines[ue][Kind.STATISTICS].send(0, self.statistics[ue].change()[None])

    def _receive(self, ue: int) -> None:
        line = self.lines[ue]
        self._mean = line[Kind.MEAN_UPDATE].receive(0)[0].float()
        if ue in self.statistics:
            self._change = line[Kind.MEAN_STATISTICS].receive(0)[0].float()

    def _apply(self, ue: int) -> None:
        self.replicas[ue].apply(self._mean)
        if ue in self.statistics:
            self.statistics[ue].apply(self._change)
        self.clock.begin("send", "finish upload of UE", ue)
        for kind in (Kind.UPDATE, Kind.STATISTICS):
            if kind in self.lines[ue]:
                self.lines[ue][kind].finish()

    def evaluation(self, part: EvalRows) -> Evaluation:
        """The UEs' models on their held-out rows or the test set, one batch of each at a time."""
        yield  # a BTS on this rank lends what UEs missed
        self._borrow(self.tested)
        size = self.settings.train.batch_size
        turns = self.takers if part == "test" else self.takers[:1]
        for k in range(self.seat.batches[part]):
            sums = {ue: torch.zeros(WIDTH, dtype=torch.float64) for ue in self.replicas}
            for ue, replica in self.tested.items():
                turn = turns.index(ue) if len(turns) > 1 else 0
                first = (k * len(turns) + turn) * size
                h_BAD = (self.test if part == "test" else replica.ue.holdout)[first : first + size]
                if len(h_BAD):
                    sums[ue] = replica.figures(h_BAD)
            self._report(list(sums.values()))
            yield
        self._return()
        return None

    def hand_over(self) -> None:
        """The first host sends the tail, which all UEs share."""
        self._borrow(self.replicas)
        if self.role == self.topology.ue_roles[0]:
            tail = checkpoint.flatten(self.replicas[self.ues[0].number].tail)
            channel = self.wire.weights(self.role, len(tail))
            channel.send(0, tail)
            channel.finish()

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        self._return()

    def units(self) -> dict[str, Unit]:
        """The whole model of every UE, which includes the agreed values."""
        self._return()
        units = {}
        for ue, replica in self.replicas.items():
            residual = self.lines[ue][Kind.UPDATE].residual
            more = {FEEDBACK: residual} if residual else {}
            units[ue_name(ue)] = replica.unit(self._agreed(ue), more)
        return units

    def _report(self, sums: list[Tensor]) -> None:
        self.report(torch.stack([figures.cpu() for figures in sums]))
