"""Before there is a world: the ranks find the first node, and agree which attempt of a run this is.

torchrun's own count of restarts isn't one number: on every node, its agent counts those that it
began itself. And its store still holds what earlier attempts wrote. So each rank says hello under a
name that was never used before, and rank 0 answers with the number of the attempt.
"""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid

from torch.distributed.distributed_c10d import Store

from csipipe.comm import blame
from csipipe.comm.texts import peek

LOOKUP = 10.0
"""Longest wait for the address of a name, in seconds."""
_POLL = 0.02
_LOCAL_HOST = re.compile(r"remote=\[(127\.[\d.]+)\]")


def resolve(name: str, limit: float = LOOKUP) -> None:
    """Look the first node's name up: torch would try for minutes, and not say what to do.

    Raises:
        ValueError: it has no address, or no answer came in time.
    """
    found: list[str] = []

    def look() -> None:
        try:
            socket.getaddrinfo(name, None)
            found.append("")
        except (OSError, UnicodeError) as error:
            found.append(str(error))

    # a resolver that doesn't answer can't be interrupted
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(limit)
    reason = found[0] if found else f"no answer after {limit:g} s"
    if reason:
        raise ValueError(
            f"the ranks are to meet on node {name!r}, whose name doesn't resolve on "
            f"{socket.gethostname()} ({reason}). Add --local-addr=ADDRESS to torchrun, with an "
            "address of this node that the others reach (127.0.0.1 if there is one node), or the "
            "name to /etc/hosts."
        )


def local_address(error: RuntimeError) -> str:
    """Why ranks of several nodes can't connect, if it is for an address that gloo's error names."""
    found = _LOCAL_HOST.search(str(error))
    return (
        f"the ranks can't connect: one gave {found[1]} as its address, which is every node's own. "
        "That is what its node's /etc/hosts says of the node's name. Name the network interface "
        "that the other nodes reach instead, on every node: GLOO_SOCKET_IFNAME=eth0 torchrun … "
        "(ip -brief address lists them)."
        if found
        else ""
    )


def attempt(store: Store, rank: int, size: int, limit: float) -> int:
    """How often the run was started before, the same number on every rank.

    Args:
        store: outlives an attempt.
        limit: longest wait for a rank, in seconds.

    Raises:
        PeerLost: a rank did not say hello, or rank 0 did not answer.
    """
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    deadline = time.monotonic() + limit
    if rank:
        with blame.waiting(0, "which attempt this is"):
            while not store.check([me]):
                _pause(deadline, 0, "which attempt this is", limit)
        number = int(store.get(me))
        store.set(f"heard/{number}/{rank}", "")
        return number
    number = store.add("attempts", 1) - 1
    answered = {""}
    for other in range(1, size):
        with blame.waiting(other, "its hello"):
            # a hello may be that of a rank which is gone: only who heard the answer is here
            while not store.check([f"heard/{number}/{other}"]):
                for each in range(other, size):
                    hello = peek(store, f"hello/{each}")
                    if hello not in answered:
                        answered.add(hello)
                        store.set(hello, str(number))
                _pause(deadline, other, "its hello", limit)
    return number


def _pause(deadline: float, peer: int, what: str, limit: float) -> None:
    if time.monotonic() > deadline:
        doing = f"waiting for {what} from rank {peer}"
        raise blame.PeerLost(doing, peer, what, f"Timed out after {limit:g} s")
    time.sleep(_POLL)
