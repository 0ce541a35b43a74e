"""Which rank does what, and who its peers are: arithmetic, no processes.

Ranks 0 … S-1 are the BTS pipeline stages, the others UE ranks. UEs are assigned to them in
order and contiguously, so that the rows of a UE rank are one slice of every micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Ranks of one world of `world_size` processes with `stages` BTS stages and `ues` UEs.

    Raises:
        ValueError: a world too small for the stages and one UE rank, or with more UE ranks than
            UEs.
    """

    world_size: int
    stages: int
    ues: int

    def __post_init__(self) -> None:
        if self.stages < 1 or self.ues < 1:
            raise ValueError(
                f"topology.stages is {self.stages} and topology.ues {self.ues}; both must be "
                "at least 1."
            )
        if self.world_size < self.stages + 1:
            raise ValueError(
                f"{self.world_size} process(es) are too few for topology.stages {self.stages}: "
                f"{self.stages} BTS rank(s) and at least one UE rank are needed; start with "
                f"--nproc_per_node={self.stages + 1} or more."
            )
        if len(self.ue_ranks) > self.ues:
            raise ValueError(
                f"{len(self.ue_ranks)} UE ranks for topology.ues {self.ues}: a UE rank would "
                f"have no UE; start at most {self.stages + self.ues} processes or raise "
                "topology.ues."
            )

    @property
    def bts_ranks(self) -> range:
        """Ranks of the BTS stages, first stage first."""
        return range(self.stages)

    @property
    def ue_ranks(self) -> range:
        """Ranks that host UEs."""
        return range(self.stages, self.world_size)

    @property
    def last_stage(self) -> int:
        """Rank of the last BTS stage, which talks to the decoder heads."""
        return self.stages - 1

    def is_bts(self, rank: int) -> bool:
        """Whether `rank` is a BTS stage."""
        return rank < self.stages

    def ues_of(self, rank: int) -> range:
        """UEs that UE rank `rank` hosts, ascending; the first ranks may get one more."""
        assert not self.is_bts(rank)
        each, extra = divmod(self.ues, len(self.ue_ranks))
        place = rank - self.stages
        first = place * each + min(place, extra)
        return range(first, first + each + (place < extra))

    def host(self, ue: int) -> int:
        """UE rank that hosts `ue`."""
        return next(rank for rank in self.ue_ranks if ue in self.ues_of(rank))

    def role(self, rank: int) -> str:
        """Human-readable name of a rank, such as `BTS stage 0` or `UE rank 3 (UEs 2-3)`."""
        if self.is_bts(rank):
            return f"BTS stage {rank}"
        ues = self.ues_of(rank)
        return (
            f"UE rank {rank} (UE {ues[0]})"
            if len(ues) == 1
            else (f"UE rank {rank} (UEs {ues[0]}-{ues[-1]})")
        )
