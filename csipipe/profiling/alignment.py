"""How far each rank's clock is from rank 0's."""

from __future__ import annotations

import time
from dataclasses import dataclass

from csipipe.world import World

_ROUNDS = 16


@dataclass(frozen=True)
class Offset:
    """What to add to this rank's `time.time_ns()` for rank 0's, and how wrong that may be, in ns.

    0 where the clocks can't be told apart, as on one machine.
    """

    ns: int
    within: int


def best(rounds: list[tuple[int, int, int]]) -> Offset:
    """From (asked, rank 0's answer, heard): the round that took least time (Cristian, 1989).

    The answer was given between the other two times, so half of what lies between is the most
    that the middle can be wrong by.
    """
    asked, answer, heard = min(rounds, key=lambda times: times[2] - times[0])
    within = (heard - asked + 1) // 2
    ns = answer - (asked + heard) // 2
    return Offset(0 if abs(ns) <= within else ns, within)


def offset(world: World) -> Offset:
    """Measure this rank's offset; collective. Rank 0 answers one rank after the other."""
    store = world.store
    if world.rank == 0:
        for rank in range(1, world.size):
            for k in range(_ROUNDS):
                store.get(f"time/{rank}/{k}/ask")  # waits until it is there
                store.set(f"time/{rank}/{k}/answer", str(time.time_ns()))
        return Offset(0, 0)
    rounds = []
    for k in range(_ROUNDS):
        asked = time.time_ns()
        store.set(f"time/{world.rank}/{k}/ask", "")
        answer = int(store.get(f"time/{world.rank}/{k}/answer"))
        rounds.append((asked, answer, time.time_ns()))
    return best(rounds)
