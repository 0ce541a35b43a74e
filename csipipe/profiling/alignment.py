"""How far each rank's clock is from rank 0's."""

from __future__ import annotations

import time
from dataclasses import dataclass

from csipipe.comm.texts import POLL
from csipipe.comm.world import World

_ROUNDS = 16


@dataclass(frozen=True)
class Offset:
    """What to add to this rank's `time.time_ns()` to get rank 0's, and its uncertainty, in ns.

    0 where the clocks can't be told apart, as on one machine.
    """

    ns: int
    within: int


def best(rounds: list[tuple[int, int, int]]) -> Offset:
    """From (asked, rank 0's answer, heard): the round that took the least time (Cristian, 1989).

    The answer was given between the other two times, so the middle is wrong by at most half the
    interval.
    """
    asked, answer, heard = min(rounds, key=lambda times: times[2] - times[0])
    within = (heard - asked + 1) // 2
    ns = answer - (asked + heard) // 2
    return Offset(0 if abs(ns) <= within else ns, within)


def offset(world: World, limit: float) -> Offset:
    """Measure this rank's offset; collective. Rank 0 answers one rank after the other.

    Raises:
        PeerFailed: a rank published a failure instead.
        PeerLost: a rank was silent for longer than `limit` seconds.
    """
    rounds = []
    for rank in range(1, world.size) if world.rank == 0 else [world.rank]:
        for k in range(_ROUNDS):
            ask, answer = (f"time/{rank}/{k}/{what}" for what in ("ask", "answer"))
            # the first round waits for the rank's turn; in the others every poll counts
            poll = POLL if k == 0 else 0.0
            if world.rank == 0:
                world.read(ask, rank, "its clock", limit, poll)
                world.store.set(answer, str(time.time_ns()))
            else:
                asked = time.time_ns()
                world.store.set(ask, "")
                told = int(world.read(answer, 0, "its clock", limit, poll))
                rounds.append((asked, told, time.time_ns()))
    return best(rounds) if rounds else Offset(0, 0)
