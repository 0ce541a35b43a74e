"""Which rank does what, and who its peers are: arithmetic, no processes.

A role is a BTS pipeline stage or a host of UEs. Roles are numbered like ranks where each has a
rank to itself (apart): stages 0 … S-1, then the hosts. Together, stage s is on rank s and every
rank hosts UEs. UEs are assigned to their hosts in order and contiguously, so that the rows of a
host are one slice of every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from csipipe.settings.config import Settings


@dataclass(frozen=True)
class Topology:
    """Roles of one world of `world_size` processes with `stages` BTS stages and `ues` UEs.

    Args:
        together: all ranks host UEs, those of stages too.

    Raises:
        ValueError: a world too small for the stages and a host of UEs, or with more hosts than
            UEs.
    """

    world_size: int
    stages: int
    ues: int
    together: bool = False

    def __post_init__(self) -> None:
        if self.together and self.world_size < self.stages:
            raise ValueError(
                f"{self.world_size} process(es) are too few for topology.stages {self.stages}: "
                "with topology.placement together, every stage has a rank, which hosts UEs "
                f"too; start with --nproc_per_node={self.stages} or more, or lower "
                "topology.stages."
            )
        if not self.together and self.world_size < self.stages + 1:
            raise ValueError(
                f"{self.world_size} process(es) are too few for topology.stages {self.stages}: "
                f"{self.stages} BTS rank(s) and at least one UE rank are needed; start with "
                f"--nproc_per_node={self.stages + 1} or more, or with topology.placement together."
            )
        if len(self.ue_roles) > self.ues:
            most = self.ues + (0 if self.together else self.stages)
            raise ValueError(
                f"{len(self.ue_roles)} UE ranks for topology.ues {self.ues}: a UE rank would "
                f"have no UE; start at most {most} processes or raise topology.ues."
            )

    @classmethod
    def of(cls, settings: Settings, world_size: int) -> Topology:
        """Of a run that has stages, on `world_size` processes; raises as the class."""
        place = settings.on(world_size).topology
        assert place.stages is not None
        return cls(world_size, place.stages, place.ues, place.placement == "together")

    @classmethod
    def ranks(cls, settings: Settings, world_size: int) -> tuple[int, int]:
        """The fewest processes that a run needs, and the most that it can use.

        Args:
            world_size: processes that there would be, by which a run decides where roles are.
        """
        if not settings.stages:
            return 1, 1
        decided, ues = settings.on(world_size), settings.topology.ues
        stages = decided.stages
        if decided.topology.placement == "together":  # every rank hosts UEs
            fewest = min(stages, ues) if settings.topology.stages is None else stages
            most = max(fewest, ues)
        else:
            fewest, most = stages + 1, stages + ues
        if fewest > world_size:  # with so many, roles may be elsewhere
            return cls.ranks(settings, fewest)
        return fewest, most

    @classmethod
    def first_host(cls, settings: Settings, world_size: int) -> int:
        """The rank that hosts UE 0, where there is data in any case; raises as `of`."""
        if not settings.stages:
            return 0
        topology = cls.of(settings, world_size)
        return topology.rank(topology.host(0))

    @property
    def bts_ranks(self) -> range:
        """Ranks, and roles, of the BTS stages, first stage first."""
        return range(self.stages)

    @property
    def ue_roles(self) -> range:
        """Roles that host UEs."""
        return range(self.stages, self.world_size + (self.stages if self.together else 0))

    @property
    def last_stage(self) -> int:
        """The last BTS stage, which talks to the decoder heads."""
        return self.stages - 1

    def rank(self, role: int) -> int:
        """The process of `role`."""
        return role - self.stages if self.together and not self.is_bts(role) else role

    def roles_of(self, rank: int) -> list[int]:
        """What `rank` does: one role, or a stage and a host of UEs."""
        return [role for role in range(self.ue_roles.stop) if self.rank(role) == rank]

    def is_bts(self, role: int) -> bool:
        """Whether `role` is a BTS stage."""
        return role < self.stages

    def ues_of(self, role: int) -> range:
        """UEs that `role` hosts, ascending; the first hosts may get one more."""
        assert not self.is_bts(role)
        each, extra = divmod(self.ues, len(self.ue_roles))
        place = role - self.stages
        first = place * each + min(place, extra)
        return range(first, first + each + (place < extra))

    def host(self, ue: int) -> int:
        """The role that hosts `ue`."""
        return next(role for role in self.ue_roles if ue in self.ues_of(role))

    def working(self, ues: Iterable[int]) -> set[int]:
        """Ranks with work where these UEs take part: BTS ranks, and hosts of one of them."""
        return {*self.bts_ranks, *(self.rank(self.host(ue)) for ue in ues)}

    def name(self, role: int) -> str:
        """Human-readable name of a role, such as `BTS stage 0` or `UE rank 3 (UEs 2-3)`."""
        if self.is_bts(role):
            return f"BTS stage {role}"
        ues = self.ues_of(role)
        which = f"UE {ues[0]}" if len(ues) == 1 else f"UEs {ues[0]}-{ues[-1]}"
        return f"UE rank {self.rank(role)} ({which})"

    def role(self, rank: int) -> str:
        """Human-readable name of a rank: all its roles."""
        return " and ".join(self.name(role) for role in self.roles_of(rank))
