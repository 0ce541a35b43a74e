"""Who is to blame when ranks wait: from what each rank waited for to the rank at fault.

A rank that gives up waiting publishes its `Wait`, and from then on so do the ranks that still wait.
Following the waits from rank to rank ends at a rank that is silent or gone, or in a circle. No
processes, no store.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

EVERYONE = -1
"""Peer of a rank that waits in a collective."""


class PeerLost(ConnectionError):
    """A transfer failed: the peer is gone, or silent for longer than the group's timeout.

    Attributes:
        peer: its rank, or `EVERYONE`.
        what: the message that didn't arrive, or couldn't be delivered.
        gone: whether the connection broke; otherwise the wait timed out.
    """

    def __init__(self, text: str, peer: int, what: str, reason: str) -> None:
        super().__init__(f"{text}: {reason}")
        self.peer = peer
        self.what = what
        self.gone = not any(sign in reason for sign in ("Timed out", "imeout"))


_now: dict[int, tuple[int, str]] = {}
"""What each thread of this process, which is one rank, waits for, and from whom."""


@contextlib.contextmanager
def waiting(peer: int, what: str) -> Iterator[None]:
    """This rank waits for rank `peer`, or in a collective for `EVERYONE`."""
    thread = threading.get_ident()
    _now[thread] = (peer, what)
    try:
        yield
    finally:
        del _now[thread]


def now(doing: str) -> Wait | None:
    """What this rank is waiting for, if anything; `doing`: where it is."""
    wait = _now.get(threading.main_thread().ident or 0)  # other threads work for the main one
    return Wait(*wait, gone=False, doing=doing, over=False) if wait else None


@contextlib.contextmanager
def watch(doing: str, peer: int, what: str) -> Iterator[None]:
    """Say what this rank was doing, with whom, when a transfer failed (PeerLost)."""
    try:
        with waiting(peer, what):
            yield
    except RuntimeError as error:
        raise PeerLost(doing, peer, what, str(error).splitlines()[0]) from error


@dataclass(frozen=True)
class Wait:
    """What one rank waits for: from which rank, and where it is itself.

    Attributes:
        over: it gave up; otherwise it still waits and may yet be answered.
    """

    peer: int
    what: str
    gone: bool
    doing: str
    over: bool = True

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Wait:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """What is wrong, and whether a message from another rank could still change it."""

    text: str
    gone: bool = False
    final: bool = False


def find(waits: Mapping[int, Wait], start: int, size: int, role: Callable[[int], str]) -> Verdict:
    """Follow the waits from rank `start`.

    Args:
        waits: of the ranks that gave up or still wait; `start` gave up.
        size: ranks of the run.
        role: gives a rank's human-readable name.
    """
    path = [start]
    while True:
        wait = waits[path[-1]]
        if wait.peer == EVERYONE:
            # a rank that ran out of time broke the others' connections
            late = [r for r, w in waits.items() if w.over and not w.gone and r not in path]
            if wait.gone and late:
                path.append(late[0])
                continue
            silent = [role(rank) for rank in range(size) if rank not in waits]
            who = ", ".join(silent) or "no rank"
            # not every rank notices that one is gone: the others still have to publish their waits
            known = len(silent) == 1 if wait.gone else not silent and _all_over(waits.values())
            return Verdict(_missing(wait, who), final=known)
        if wait.peer not in waits:
            return Verdict(_missing(wait, role(wait.peer)), wait.gone)
        if wait.peer in path:
            return _circle(waits, path[path.index(wait.peer) :], role)
        path.append(wait.peer)


def _all_over(waits: Iterable[Wait]) -> bool:
    return all(wait.over for wait in waits)


def _missing(wait: Wait, who: str) -> str:
    state = "is gone" if wait.gone else "is silent"
    return f"{who} {state}: {wait.doing}, waited for {wait.what}."


def _circle(waits: Mapping[int, Wait], circle: list[int], role: Callable[[int], str]) -> Verdict:
    """Ranks that wait for each other.

    A broken connection to a rank that gave up itself is only a consequence; the rank that the
    others waited for was too slow. Ranks that still wait may be about to find out.
    """
    final = _all_over(waits[rank] for rank in circle)
    slow = [rank for rank in circle if not waits[rank].gone]
    if len(slow) < len(circle):
        wait = waits[slow[0] if slow else circle[0]]
        return Verdict(_missing(wait, role(wait.peer)), final=final)
    each = "; ".join(
        f"{waits[rank].doing}, waits for {waits[rank].what} from {role(waits[rank].peer)}"
        for rank in circle
    )
    return Verdict(
        f"a message was lost, and ranks are waiting for each other: {each}.", final=final
    )
