"""Who takes part, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from csipipe.settings.sections.checks import at_least

Placement = Literal["apart", "together"]


@dataclass(frozen=True, kw_only=True)
class TopologySettings:
    """Who takes part, and where: BTS pipeline stages (on ranks 0 … stages-1), and UEs."""

    placement: Placement | None = None
    """apart: the ranks that aren't stages host the UEs. together: all ranks do, those of stages
    too. null: together where there is one rank, else apart. The results are the same."""
    stages: int | None = None
    """BTS pipeline stages, one rank each. null: 2 for csilocal, splitfed (together: ≤ ranks), 1
    (all they can use) for the federated methods, none for centralised."""
    ues: int = 4
    """UEs, numbered from 0 and assigned in order to the ranks that host them."""
    participants: int | None = None
    """UEs that take part in an iteration, drawn by train.seed; the others send and receive nothing
    and stay as they are. null: all."""
    partition: str | None = None
    """How the tail's layers are cut into stages: uniform, parameters, type:REGEX (DeepSpeed's), or
    measured: by the time that each layer takes on this machine. null: as the model says, for
    example type:CRBlock; of a model of your own, and with model.split, parameters."""
    profile: str | None = None
    """File for the times of partition measured: read if it exists, else written. null: none."""

    def __post_init__(self) -> None:
        at_least("topology.ues", self.ues, 1)
        if self.participants is not None and not 1 <= self.participants <= self.ues:
            raise ValueError(
                f"topology.participants is {self.participants}; it must lie between 1 and "
                f"topology.ues {self.ues}, or be null: all of them."
            )
        at_least("topology.stages", self.stages, 1)
        named = ("uniform", "parameters", "measured")
        cut = self.partition
        if cut is not None and cut not in named and not cut.startswith("type:"):
            raise ValueError(
                f"topology.partition is {self.partition!r}; expected {', '.join(named)} or "
                "type:REGEX, for example type:CRBlock."
            )
        if cut is not None and cut.startswith("type:"):
            try:
                re.compile(cut.removeprefix("type:"))
            except re.error as error:
                raise ValueError(
                    f"topology.partition is {cut!r}; after type: comes a regular expression for "
                    f"names of layers, and this is none ({error}). Expected for example "
                    "type:CRBlock."
                ) from error
        if self.profile is not None and self.partition != "measured":
            raise ValueError(
                f"topology.profile is {self.profile!r}, but topology.partition {cut or 'null'} "
                "measures nothing; use measured, or leave the profile out."
            )
