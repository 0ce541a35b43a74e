"""What federated methods share: UE half and BTS half, whatever a UE sends.

The whole model lives on every UE. In one iteration each UE trains on its own rows and sends one
vector up, the BTS sends the mean over UEs back, and each UE applies it. BatchNorm's running
statistics are averaged too, by their change. Parts and draws start as in CSILocal.

Shapes: N UEs, P scalars of the shared parts, A angles, D delays.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models
from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods.base import Builder, EvalRows
from csipipe.methods.half import Half, Seat, UeSide
from csipipe.methods.replica import Agreed, Replica
from csipipe.methods.rows import load
from csipipe.methods.state import Unit, ue_name
from csipipe.methods.ue import UserEquipment
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
        replica: what the method does at a UE.
    """
    if settings.stages != 1:
        raise ValueError(
            f"method {settings.method} aggregates on one BTS rank, but topology.stages is "
            f"{settings.topology.stages}; leave topology.stages out, or set it to 1."
        )
    topology = Topology(world_size, settings.stages, settings.topology.ues)
    if topology.is_bts(rank):
        return lambda world: BtsHalf(Seat(settings, topology, world, device))
    ues, test = load(settings, topology.ues_of(rank), device)
    return lambda world: UeHalf(Seat(settings, topology, world, device), ues, test, replica)


def sizes(settings: Settings) -> dict[Kind, int]:
    """Scalars of each vector that crosses."""
    update, statistics = (
        sum(count(settings.model)[part] for part in settings.spec.shared)
        for count in (models.count_parts, models.count_statistics)
    )
    return {
        Kind.UPDATE: update,
        Kind.MEAN_UPDATE: update,
        Kind.STATISTICS: statistics,
        Kind.MEAN_STATISTICS: statistics,
    }


class UeHalf(UeSide):
    """The UEs of one rank.

    Args:
        ues, test: as `UeSide`.
        replica: what the method does at a UE.
    """

    def __init__(
        self, seat: Seat, ues: list[UserEquipment], test: Tensor, replica: type[Replica]
    ) -> None:
        super().__init__(seat, ues, test)
        settings, topology = self.settings, self.topology
        self.replicas = [replica(ue, settings, self.device) for ue in ues]
        for each in self.replicas:
            each.probe = self.probe
        self.sizes = sizes(settings)
        self.statistics = [Agreed(each.statistics) for each in self.replicas]
        self.lines = [
            {
                kind: self.wire.vector(kind, scalars, range(ue.number, ue.number + 1))
                for kind, scalars in self.sizes.items()
            }
            for ue in ues
        ]
        # a model common to all is tested once: the UEs take its batches in turn
        self.takers = topology.ues if is_one_model(settings) else 1
        self.agree_on_batches(
            {
                "holdout": max(len(ue.holdout) for ue in ues),
                "test": -(-len(test) // self.takers),
            }
        )

    def train_iteration(self, iteration: int) -> None:
        """Train and send, UE by UE; then apply what comes back."""
        self.start(iteration)
        for line in self.lines:
            line[Kind.MEAN_UPDATE].post()
            line[Kind.MEAN_STATISTICS].post()
        sums = []
        everyone = list(zip(self.replicas, self.statistics, self.lines, strict=True))
        for replica, statistics, line in everyone:
            self.clock.begin("compute", "local step of UE", replica.ue.number)
            replica.start(iteration)
            update, figures = self._train(replica)
            sums.append(figures)
            self.clock.begin("send", "upload of UE", replica.ue.number)
            line[Kind.UPDATE].send(0, update[None])
            line[Kind.STATISTICS].send(0, statistics.change()[None])
        self.clock.begin("send", "send figures")
        self._report(sums)
        for replica, statistics, line in everyone:
            self.clock.begin("wait", "wait for the mean, UE", replica.ue.number)
            update, change = (
                line[kind].receive(0)[0].float()
                for kind in (Kind.MEAN_UPDATE, Kind.MEAN_STATISTICS)
            )
            self.clock.begin("compute", "apply the mean at UE", replica.ue.number)
            replica.apply(update)
            statistics.apply(change)
            self.clock.begin("send", "finish upload of UE", replica.ue.number)
            line[Kind.UPDATE].finish()
            line[Kind.STATISTICS].finish()
        self.clock.stop()

    def _train(self, replica: Replica) -> tuple[Tensor, Tensor]:
        """A UE's update and figures; where bad UEs are dropped, one that fails sends NaN.

        It keeps its state from before the failed step, and continues with the others' mean.
        """
        try:
            return replica.train()
        except FloatingPointError:
            if not self.tolerant:
                raise
            replica.ue.optimizer.zero_grad()
            nothing = torch.full((self.sizes[Kind.UPDATE],), math.nan, device=self.device)
            return nothing, torch.zeros(WIDTH, dtype=torch.float64)

    def evaluate(self, part: EvalRows) -> None:
        """Every UE's model on its held-out rows or on the test set, one batch of each at a time."""
        size = self.settings.train.batch_size
        turns = self.takers if part == "test" else 1
        for k in range(self.batches[part]):
            sums = []
            for replica in self.replicas:
                first = (k * turns + replica.ue.number % turns) * size
                h_BAD = (self.test if part == "test" else replica.ue.holdout)[first : first + size]
                empty = torch.zeros(WIDTH, dtype=torch.float64)
                sums.append(replica.figures(h_BAD) if len(h_BAD) else empty)
            self._report(sums)

    def save_weights(self, folder: Path) -> None:
        """Every UE's encoder and head; the first UE rank sends the tail, which all UEs share."""
        # sent first: rank 0 waits for it, whether or not this rank's disk is full
        if self.rank == self.topology.ue_ranks[0]:
            tail = checkpoint.flatten(self.replicas[0].tail)
            channel = self.wire.weights(self.rank, len(tail))
            channel.send(0, tail)
            channel.finish()
        super().save_weights(folder)

    def units(self) -> dict[str, Unit]:
        """The whole model of every UE, which includes the agreed values."""
        units = {}
        for replica, statistics in zip(self.replicas, self.statistics, strict=True):
            agreed = [statistics, *([replica.agreed] if replica.agreed else [])]
            units[ue_name(replica.ue.number)] = replica.unit(agreed)
        return units

    def _report(self, sums: list[Tensor]) -> None:
        """Send this rank's figures to rank 0."""
        self.reports.send(0, torch.stack([figures.cpu() for figures in sums]))
        self.reports.finish()


class BtsHalf(Half):
    """The aggregator, on the one BTS rank: it adds up what the UEs send and has no model.

    It adds in UE order, so that sums don't depend on who is first or where a UE is hosted, and
    holds the vector of one UE at a time.
    """

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        topology = self.topology
        self.sizes = sizes(self.settings)
        for kind in (Kind.UPDATE, Kind.STATISTICS):  # one vector in memory at a time, later
            self.wire.expect(kind, range(topology.ues), (1, self.sizes[kind]), 1)
        self.down = {
            kind: self.wire.vector(kind, self.sizes[kind], range(topology.ues))
            for kind in (Kind.MEAN_UPDATE, Kind.MEAN_STATISTICS)
        }
        self.agree_on_batches({"holdout": 0, "test": 0})

    def train_iteration(self, iteration: int) -> Figures:
        """The mean of what the UEs send, back to each of them.

        Where bad UEs are dropped, the mean is over the others, and a dropped UE gets it too.
        """
        self.start(iteration)
        self.reports.post()
        means, faults = self._means()
        self.clock.begin("send", "send the mean")
        for channel, mean in zip(self.down.values(), means, strict=True):
            channel.send(0, mean)
        for channel in self.down.values():
            channel.finish()
        self.count(faults)
        self.clock.begin("wait", "wait for figures")
        figures = self.gather(faults)
        self.clock.stop()
        return figures

    def evaluate(self, part: EvalRows) -> Figures:
        """Gathers figures; all UEs have those of one model where it is tested once."""
        sums = torch.zeros(self.topology.ues, WIDTH, dtype=torch.float64)
        for _ in range(self.batches[part]):
            self.reports.post()
            sums += self.gather().sums
        if part == "test" and is_one_model(self.settings):
            sums = sums.sum(dim=0).expand(self.topology.ues, -1)
        return Figures(sums)

    def save_weights(self, folder: Path) -> None:
        """Writes the tail that the first UE rank sends."""
        tail = nn.Sequential(*models.build_tail(self.settings.model, 0))
        channel = self.wire.weights(self.topology.ue_ranks[0], len(checkpoint.flatten(tail)))
        channel.post()
        state = checkpoint.unflatten(channel.receive(0), tail)
        checkpoint.save(checkpoint.tail_file(folder), {"tail": state})

    def units(self) -> dict[str, Unit]:
        """It keeps nothing between iterations."""
        return {}

    def _means(self) -> tuple[list[Tensor], dict[int, str]]:
        """(1, scalars) means over UEs of updates and statistics, in fp32 whatever crossed.

        Also returns the UEs that are left out, and why.
        """
        up = {kind: self.sizes[kind] for kind in (Kind.UPDATE, Kind.STATISTICS)}
        totals = [torch.zeros(1, scalars, device=self.device) for scalars in up.values()]
        faults: dict[int, str] = {}
        for ue in range(self.topology.ues):
            self.clock.begin("wait", "wait for UE", ue)
            vectors = self.wire.vectors(up, ue, self.tolerant)
            self.clock.begin("compute", "aggregate UE", ue)
            if isinstance(vectors, str):
                faults[ue] = vectors
                continue
            for total, vector in zip(totals, vectors, strict=True):
                total += vector
        self.leave_out(faults)
        sound = self.topology.ues - len(faults)
        return [total / sound for total in totals], faults


def is_one_model(settings: Settings) -> bool:
    """Whether nothing is personal, so that after an exchange all UEs have the same model."""
    return set(settings.spec.shared) == set(models.count_parts(settings.model))
