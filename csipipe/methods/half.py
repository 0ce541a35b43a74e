"""What the UE half and the BTS half of a method share."""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from csipipe.comm import handshake, trust
from csipipe.comm.collectives import largest, merged
from csipipe.comm.ledger import Kind, Ledger
from csipipe.comm.topology import Topology
from csipipe.comm.wire import Wire
from csipipe.comm.world import World
from csipipe.device import autocast, wire_dtype
from csipipe.measure.figures import WIDTH, Figures
from csipipe.measure.probe import Probe
from csipipe.methods.base import batches_of
from csipipe.methods.ue import UserEquipment
from csipipe.models import count_parts
from csipipe.settings.config import Settings


@dataclass(frozen=True)
class Seat:
    """What every half is made from: settings, topology, this rank and its device."""

    settings: Settings
    topology: Topology
    world: World
    device: torch.device


class Half:
    """What both halves share: the wire, and the channels for figures and decisions."""

    def __init__(self, seat: Seat) -> None:
        self.settings, self.topology = settings, topology = seat.settings, seat.topology
        self.world, self.device = world, device = seat.world, seat.device
        train = settings.train
        self.rank = world.rank
        world.role = topology.role
        world.doing = topology.role(world.rank)
        self.wire = Wire(
            topology,
            world.rank,
            train.batch_size // train.micro_batches,
            train.micro_batches,
            wire_dtype(train.precision),
            device,
            train.max_rms,
        )
        self.parameters = count_parts(settings.model)
        self.reports = self.wire.reports(WIDTH)
        self.decisions = self.wire.announcements(Kind.DECISION, 0, 1)
        self.clock = self.wire.clock
        self.probe = Probe()
        self.notes: list[str] = []
        self.batches: dict[str, int] = {}
        self.tolerant = train.on_bad_ue == "drop"
        self.dropped = [0] * topology.ues
        self._named: set[int] = set()

    @property
    def has_holdout(self) -> bool:
        return self.batches["holdout"] > 0

    def agree(self, decision: bool) -> bool:
        if self.rank == 0:
            self.decisions.send(0, torch.tensor([float(decision)], dtype=torch.float64))
            self.decisions.finish()
            return decision
        self.decisions.post()
        return bool(self.decisions.receive(0).item())

    def autocast(self) -> AbstractContextManager[object]:
        """Arithmetic of the UE parts' forward passes."""
        return autocast(self.settings.train.precision, self.device)

    def start(self, iteration: int) -> None:
        """Note where this rank is, in case it has to report an error."""
        self.world.doing = f"{self.topology.role(self.rank)}, iteration {iteration + 1}"

    def leave_out(self, faults: Mapping[int, str], out: Collection[int] = ()) -> None:
        """Report why UEs are left out, the first time it happens to each of them.

        Args:
            out: UEs that are left out already.

        Raises:
            trust.BadMessage: nobody is left.
        """
        for ue, fault in faults.items():
            if ue not in self._named:
                tqdm.write(f"{self.world.doing}: UE {ue} is left out: {fault}", file=sys.stderr)
                self._named.add(ue)
        if faults and len({*faults, *out}) == self.topology.ues:
            raise trust.BadMessage(
                f"no sound UE is left to train with: all {self.topology.ues} are bad, the last one "
                f"because {list(faults.values())[-1]}."
            )

    def gather(self, without: Container[int] = ()) -> Figures:
        """On rank 0: what the UEs report. UEs that are left out have no rows.

        Where bad UEs are dropped, so are figures that aren't finite.
        """
        sums = self.reports.receive(0).clone()
        for ue, row in enumerate(sums):
            if ue in without or (self.tolerant and not row.isfinite().all()):
                row.zero_()
        return Figures(sums)

    def count(self, out: Iterable[int]) -> None:
        """Count UEs that were left out of a training iteration."""
        for ue in out:
            self.dropped[ue] += 1

    def exchanged(self) -> Ledger:
        return merged(self.wire.ledger, self.topology.is_bts(self.rank))

    def restore_ledger(self, ledger: Ledger) -> None:
        """Each side gets all counts once: UE ranks those of their UEs, rank 0 those of all UEs."""
        counts = self.wire.ledger.counts
        if self.rank == 0:
            counts.copy_(ledger.counts)
        elif not self.topology.is_bts(self.rank):
            ues = self.topology.ues_of(self.rank)
            counts[:, :, ues.start : ues.stop] = ledger.counts[:, :, ues.start : ues.stop]

    def agree_on_batches(self, rows: dict[str, int]) -> None:
        """Every rank runs as many evaluation batches as the UE with the most rows needs."""
        self.world.ready("parts")  # building them may take longer than a wait inside an iteration
        handshake.compare_messages(self.world, self.wire)
        batches = [batches_of(n, self.settings.train.batch_size) for n in rows.values()]
        self.batches = dict(zip(rows, largest(batches), strict=True))


class UeSide(Half):
    """What the UE halves share: the UEs of one rank, and their weights.

    Args:
        ues: this rank's UEs, ascending.
        test: (B, 2, A, D) the common test set.
    """

    def __init__(self, seat: Seat, ues: list[UserEquipment], test: Tensor) -> None:
        super().__init__(seat)
        self.ues = ues
        self.test = test

    def save_weights(self, folder: Path) -> None:
        """Every UE's encoder and head."""
        for ue in self.ues:
            ue.save(folder)
