"""Before training: both ends of the wire agree on every message, so that a difference is named
before it can be misread as data.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from csipipe.comm.wire import Wire
from csipipe.comm.world import World


def compare_messages(world: World, wires: Sequence[Wire]) -> None:
    """Refuse to train (ValueError) where a UE and the BTS expect different messages.

    The stages publish their messages; the hosts of UEs compare number, kind, shape and type.

    Args:
        wires: of this rank's roles.
    """
    topology = wires[0].topology
    stages = [wire for wire in wires if topology.is_bts(wire.role)]
    world.tell("messages", "\n".join(line for wire in stages for line in sorted(wire.terms)))
    for wire in wires:
        if wire not in stages:
            _compare(world, wire)


def _compare(world: World, wire: Wire) -> None:
    topology = wire.topology
    stages = [line for rank in topology.bts_ranks for line in world.hear("messages", rank)]
    own = tuple(f"UE {ue}: " for ue in topology.ues_of(wire.role))
    theirs = sorted({line for line in stages if line.startswith(own)})
    if difference := first_difference("\n".join(sorted(wire.terms)), "\n".join(theirs)):
        here, there = difference
        raise ValueError(
            f"{topology.name(wire.role)} would exchange {here!r}, the BTS {there!r}; both must "
            "run the same release with the same settings."
        )


def first_difference(mine: str, theirs: str) -> tuple[str, str] | None:
    """The first lines that differ."""
    lines = zip_longest(mine.splitlines(), theirs.splitlines(), fillvalue="")
    return next(((a.strip(), b.strip()) for a, b in lines if a != b), None)
