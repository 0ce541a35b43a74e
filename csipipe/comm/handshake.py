"""Before training: both ends of the wire agree on every message, so that a difference is named
before it can be misread as data.
"""

from __future__ import annotations

from itertools import zip_longest

from csipipe.comm.wire import Wire
from csipipe.comm.world import World


def compare_messages(world: World, wire: Wire) -> None:
    """Refuse to train (ValueError) where a UE and the BTS expect different messages.

    Each rank publishes its UEs' messages; the UE ranks compare number, kind, shape and type.
    """
    world.tell("messages", "\n".join(sorted(wire.terms)))
    topology = wire.topology
    if topology.is_bts(world.rank):
        return
    stages = [line for rank in topology.bts_ranks for line in world.hear("messages", rank)]
    own = tuple(f"UE {ue}: " for ue in topology.ues_of(world.rank))
    theirs = sorted({line for line in stages if line.startswith(own)})
    if difference := first_difference("\n".join(sorted(wire.terms)), "\n".join(theirs)):
        here, there = difference
        raise ValueError(
            f"{topology.role(world.rank)} would exchange {here!r}, the BTS {there!r}; both must "
            "run the same release with the same settings."
        )


def first_difference(mine: str, theirs: str) -> tuple[str, str] | None:
    """The first lines that differ."""
    lines = zip_longest(mine.splitlines(), theirs.splitlines(), fillvalue="")
    return next(((a.strip(), b.strip()) for a, b in lines if a != b), None)
