"""What the roles of one rank share: its clock, its place in the run, who takes part."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping

import torch
from tqdm import tqdm

from csipipe.comm import trust
from csipipe.comm.loopback import Loopback
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.measure.clock import Clock
from csipipe.measure.probe import Probe
from csipipe.methods.base import EvalRows
from csipipe.methods.roster import Roster
from csipipe.settings.config import Settings


class Seat:
    """One rank, to its roles.

    Attributes:
        loop: how its roles reach each other.
        notes: what rank 0 tells the user before training, a line each.
        tolerant: bad UEs are dropped; else they end the run.
        dropped: training iterations that each UE was left out of; rank 0's count.
        batches: an evaluation's, the same on every rank.
        roster: which UEs take part in an iteration.
    """

    def __init__(
        self, settings: Settings, topology: Topology, world: World, device: torch.device
    ) -> None:
        self.settings = settings
        self.topology = topology
        self.world = world
        self.device = device
        world.role = topology.role
        world.doing = topology.role(world.rank)
        self.clock = Clock()
        self.loop = Loopback()
        self.notes: list[str] = []
        self.tolerant = settings.train.on_bad_ue == "drop"
        self.dropped = [0] * topology.ues
        self.batches: dict[EvalRows, int] = {}
        self.roster = Roster(settings)
        self.probe = Probe(self.roster.evaluated[0])
        self._named: set[int] = set()

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
        present = len(self.roster.present)
        if faults and len({*faults, *out}) == present:
            raise trust.BadMessage(
                f"no sound UE is left to train with: all {present} are bad, the last one "
                f"because {list(faults.values())[-1]}."
            )

    def count(self, out: Iterable[int]) -> None:
        """Count UEs that were left out of a training iteration."""
        for ue in out:
            self.dropped[ue] += 1
