"""What federated methods share: UE half and BTS half, whatever a UE sends.

The whole model lives on every UE. In one iteration each UE trains on its own rows and sends one
vector up, the BTS sends the mean over UEs back, and each UE applies it. BatchNorm's running
statistics are averaged too, by their change. Parts and draws start as in CSILocal.

Shapes: N UEs, P scalars of the shared parts, A angles, D delays.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models
from csipipe.comm.codec import Residual
from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods import rank as ranks
from csipipe.methods.base import Builder, EvalRows
from csipipe.methods.cost import exchanged_parts
from csipipe.methods.half import Evaluation, Half, UeSide
from csipipe.methods.replica import Agreed, Replica
from csipipe.methods.rows import load
from csipipe.methods.seat import Seat
from csipipe.methods.state import BTS, NoMoments, Unit, ue_name
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline import schedule
from csipipe.pipeline.schedule import Attempts, Instruction, Op
from csipipe.settings.config import Settings

FEEDBACK = "feedback"
"""What updates lost at their codec, in a checkpoint."""


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
    if settings.participants < topology.ues:
        raise ValueError(
            f"topology.participants is {settings.participants}, but in method {settings.method} "
            "all UEs take part; leave it out."
        )
    if topology.is_bts(role):
        return BtsHalf
    ues, test = load(settings, topology.ues_of(role), device)
    return partial(UeHalf, ues=ues, test=test, replica=replica)


def _plans(settings: Settings, topology: Topology) -> list[Attempts[Instruction]]:
    hosted = [topology.ues_of(role) for role in topology.ue_roles]
    return schedule.federated_training(hosted)


def sizes(settings: Settings) -> dict[Kind, int]:
    """Scalars of each vector that crosses; a model without BatchNorm has no statistics."""
    update, statistics = (
        sum(count(settings.model)[part] for part in exchanged_parts(settings))
        for count in (models.count_parts, models.count_statistics)
    )
    found = {Kind.UPDATE: update, Kind.MEAN_UPDATE: update}
    if statistics:
        found |= {Kind.STATISTICS: statistics, Kind.MEAN_STATISTICS: statistics}
    return found


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
            Op.LOCAL_STEPS: self._train,
            Op.SEND_UPDATE: self._send,
            Op.RECEIVE_MEAN: self._receive,
            Op.APPLY: self._apply,
        }
        self._sums: list[Tensor] = []
        self._iteration = 0

    def evaluated(self) -> dict[EvalRows, int]:
        rows = (len(replica.ue.holdout) for replica in self.tested.values())
        return {"holdout": max(rows, default=0), "test": -(-len(self.test) // len(self.takers))}

    def begin(self, iteration: int) -> None:
        self._iteration, self._sums = iteration, []
        for line in self.lines.values():
            for kind in (Kind.MEAN_UPDATE, Kind.MEAN_STATISTICS):
                if kind in line:
                    line[kind].post()

    def end(self) -> None:
        self.clock.begin("send", "send figures")
        self._report(self._sums)

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
        self._sums.append(figures)

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
        return None

    def hand_over(self) -> None:
        """The first host sends the tail, which all UEs share."""
        if self.role == self.topology.ue_roles[0]:
            tail = checkpoint.flatten(self.replicas[self.ues[0].number].tail)
            channel = self.wire.weights(self.role, len(tail))
            channel.send(0, tail)
            channel.finish()

    def units(self) -> dict[str, Unit]:
        """The whole model of every UE, which includes the agreed values."""
        units = {}
        for ue, replica in self.replicas.items():
            agreed = [self.statistics[ue]] if ue in self.statistics else []
            agreed += [replica.agreed] if replica.agreed else []
            residual = self.lines[ue][Kind.UPDATE].residual
            units[ue_name(ue)] = replica.unit(agreed, {FEEDBACK: residual} if residual else {})
        return units

    def _report(self, sums: list[Tensor]) -> None:
        self.report(torch.stack([figures.cpu() for figures in sums]))


class BtsHalf(Half):
    """The aggregator, on the one BTS stage: it adds up what the UEs send and has no model.

    It adds in UE order, so that sums don't depend on who is first or where a UE is hosted, and
    holds the vector of one UE at a time.
    """

    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        with self.autocast():
            seat.notes += models.kernels_notes(self.settings.model, self.device)
        ues = range(self.topology.ues)
        found = sizes(self.settings)
        up = (Kind.UPDATE, Kind.STATISTICS)
        self.up: dict[Kind, int] = {kind: found[kind] for kind in up if kind in found}
        for kind, scalars in self.up.items():  # one vector in memory at a time, later
            self.wire.expect(kind, ues, (1, scalars), 1)
        self.down = {
            kind: self.wire.vector(kind, found[kind], ues)
            for kind in (Kind.MEAN_UPDATE, Kind.MEAN_STATISTICS)
            if kind in found
        }
        if self.settings.comm.error_feedback:
            residual = Residual(found[Kind.UPDATE]).to(self.device)
            self.down[Kind.MEAN_UPDATE].residual = residual
        self.whole = {Op.SEND_MEAN: self._send_mean}
        self.each = {Op.RECEIVE_UPDATE: self._receive, Op.AGGREGATE: self._add}
        self._faults: dict[int, str] = {}
        self._totals: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def begin(self, iteration: int) -> None:
        self.reports.post()
        self._faults = {}
        self._totals = [torch.zeros(1, n, device=self.device) for n in self.up.values()]

    def end(self) -> Figures:
        """A UE that is dropped gets the mean of the others, too."""
        for channel in self.down.values():
            channel.finish()
        self.seat.count(self._faults)
        self.clock.begin("wait", "wait for figures")
        return self.gather(self._faults)

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
        """Means over the UEs that are left, in fp32 whatever crossed."""
        self.seat.leave_out(self._faults)
        sound = self.topology.ues - len(self._faults)
        for channel, total in zip(self.down.values(), self._totals, strict=True):
            channel.send(0, total / sound)

    def units(self) -> dict[str, Unit]:
        """What the means have lost so far, where that is made up for."""
        residual = self.down[Kind.MEAN_UPDATE].residual
        return {BTS: Unit({FEEDBACK: residual}, NoMoments())} if residual else {}

    def evaluation(self, part: EvalRows) -> Evaluation:
        """Gathers figures; all UEs have those of one model where it is tested once."""
        sums = torch.zeros(self.topology.ues, WIDTH, dtype=torch.float64)
        for _ in range(self.seat.batches[part]):
            self.reports.post()
            sums += self.gather().sums
            yield
        if part == "test" and is_one_model(self.settings):
            sums[self.seat.roster.evaluated] = sums.sum(dim=0)
        return Figures(sums)

    def save_weights(self, folder: Path) -> None:
        """Writes the tail that the first host of UEs sends."""
        tail = nn.Sequential(*models.build_tail(self.settings.model, 0))
        channel = self.wire.weights(self.topology.ue_roles[0], len(checkpoint.flatten(tail)))
        channel.post()
        state = checkpoint.unflatten(channel.receive(0), tail)
        checkpoint.save(checkpoint.tail_file(folder), {"tail": state})


def is_one_model(settings: Settings) -> bool:
    """Whether nothing is personal, so that after an exchange all UEs have the same model.

    A frozen part may have come from anywhere.
    """
    everything = set(settings.spec.shared) == set(models.count_parts(settings.model))
    return everything and not settings.train.frozen
