"""What federated methods share: the UE half, whatever a UE sends; `aggregator` has the BTS half.

The whole model lives on every UE. In one iteration each UE trains on its own rows and sends one
vector up, the BTS sends the mean over UEs back, and each UE applies it. BatchNorm's running
statistics are averaged too, by their change. Parts and draws start as in CSILocal. Where some UEs
are absent, one that is back first receives what it missed.

Shapes: N UEs, P scalars of the shared parts, A angles, D delays.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from csipipe import checkpoint
from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH
from csipipe.methods import rank as ranks
from csipipe.methods.aggregator import BtsHalf
from csipipe.methods.base import Builder, EvalRows
from csipipe.methods.common import MEANS, MISSED, is_one_model, some_are_absent
from csipipe.methods.exchange import UeExchange
from csipipe.methods.half import Evaluation, UeSide
from csipipe.methods.replica import Replica
from csipipe.methods.rows import load
from csipipe.methods.seat import Seat
from csipipe.methods.state import Unit, ue_name
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline import rounds
from csipipe.pipeline.schedule import Attempts, Instruction, Op, Plan
from csipipe.settings.config import Settings


def prepare(
    replica: type[Replica],
    settings: Settings,
    rank: int,
    world_size: int,
    device: torch.device,
    bts: type[BtsHalf] = BtsHalf,
) -> Builder:
    """As `csipipe.methods.prepare`.

    Args:
        replica: what a method does at a UE.
        bts: what it does at the BTS.
    """
    return ranks.prepare(partial(_role, replica, bts), _plans, settings, rank, world_size, device)


def _role(
    replica: type[Replica],
    bts: type[BtsHalf],
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
        return bts
    ues, test = load(settings, topology.ues_of(role), device)
    return partial(UeHalf, ues=ues, test=test, replica=replica)


def _plans(settings: Settings, topology: Topology) -> list[Attempts[Instruction]]:
    hosted = [topology.ues_of(role) for role in topology.ue_roles]
    return rounds.federated_training(hosted, some_are_absent(settings))


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
        self.replicas = {ue.number: replica(ue, settings, self.device) for ue in ues}
        for each in self.replicas.values():
            each.probe = self.probe
        self.exchange = UeExchange(self, {ue: one.agreed for ue, one in self.replicas.items()})
        evaluated = seat.roster.evaluated
        self.tested = {n: self.replicas[n] for n in evaluated if n in self.replicas}
        # a model common to all is tested once: the UEs take its batches in turn
        self.takers = evaluated if is_one_model(settings) else evaluated[:1]
        self.each = {
            **self.exchange.each,
            Op.LOCAL_STEPS: self._train,
            Op.SEND_UPDATE: self._send,
        }
        self._sums: dict[int, Tensor] = {}
        self._iteration = 0

    def evaluated(self) -> dict[EvalRows, int]:
        rows = (len(replica.ue.holdout) for replica in self.tested.values())
        return {"holdout": max(rows, default=0), "test": -(-len(self.test) // len(self.takers))}

    def begin(self, iteration: int) -> None:
        self.exchange.give_back()
        self._iteration, self._sums = iteration, {}
        roster = self.seat.roster
        self.exchange.post(MEANS, roster.present)
        self.exchange.post(MISSED, roster.behind)

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """What concerns UEs that take part."""
        super().execute(self.seat.roster.of(plan), clock)

    def end(self) -> None:
        """Figures of all UEs: a rank without any in this iteration doesn't hurry ahead."""
        self.clock.begin("send", "send figures")
        absent = torch.zeros(WIDTH, dtype=torch.float64)
        self._report([self._sums.get(ue.number, absent) for ue in self.ues])

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
            scalars = self.exchange.sizes[Kind.UPDATE]
            self._update = torch.full((scalars,), math.nan, device=self.device)
            figures = torch.zeros(WIDTH, dtype=torch.float64)
        self._sums[ue] = figures

    def _send(self, ue: int) -> None:
        self.exchange.send(ue, self._update)

    def evaluation(self, part: EvalRows) -> Evaluation:
        """The UEs' models on their held-out rows or the test set, one batch of each at a time."""
        yield  # a BTS on this rank lends what UEs missed
        self.exchange.borrow(self.tested)
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
        self.exchange.give_back()
        return None

    def lend(self) -> None:
        self.exchange.borrow(self.replicas)

    def hand_over(self) -> None:
        """The first host sends the tail, which all UEs share."""
        if self.role == self.topology.ue_roles[0]:
            tail = checkpoint.flatten(self.replicas[self.ues[0].number].tail)
            channel = self.wire.weights(self.role, len(tail))
            channel.send(0, tail)
            channel.finish()

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        self.exchange.give_back()

    def units(self) -> dict[str, Unit]:
        """The whole model of every UE, which includes the agreed values."""
        self.exchange.give_back()
        feedback = self.exchange.feedback
        return {ue_name(ue): one.unit(feedback(ue)) for ue, one in self.replicas.items()}

    def _report(self, sums: list[Tensor]) -> None:
        self.report(torch.stack([figures.cpu() for figures in sums]))
