"""What the ranks of a run tell each other: texts in the key-value store that all of them reach.

Strings only; nothing is unpickled. The wait for a text ends when its writer gives no sign of life,
or another rank has failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.distributed.distributed_c10d import Store

from csipipe.comm import blame

SETUP_TIMEOUT = 1800.0
"""Longest wait for a rank that is still reading or generating its data, in seconds."""
POLL = 0.02
"""Seconds between two looks for a message from another rank."""
LOOK = 1.0
"""Seconds between two signs of life of a rank."""
_LOOKS = 20  # a short wait for a text gets longer by at most 1/_LOOKS,
_FIRST = 1e-3  # or by so many seconds: looks cost ranks that work on the same cores


class PeerFailed(Exception):
    """Another rank failed and reported it; there is nothing to add."""


def peek(store: Store, key: str) -> str:
    """The text under a key; empty where there is none yet."""
    return store.get(key).decode() if store.check([key]) else ""


class _Alive:
    """Watches the signs of life that a rank gives, if it gives any."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._key = store, f"alive/{rank}"
        self._looked = self._since = time.monotonic()
        self._beat = ""

    def silent(self) -> float:
        """Seconds since the last one."""
        now = time.monotonic()
        if now - self._looked > LOOK:
            self._looked = now
            beat = peek(self._store, self._key)
            if beat != self._beat:
                self._beat, self._since = beat, now
        return now - self._since if self._beat else 0.0


@dataclass
class Texts:
    """One rank's view of the store.

    Attributes:
        store: shared by all ranks.
        rank, size: this process and how many there are.
        lasting: a store that outlives a restart by torchrun; `store` starts empty.
        role: gives a rank's human-readable name.
        silence: how long a rank that is waited for may give no sign of life, in seconds.
    """

    store: Store
    rank: int
    size: int
    lasting: Store | None = field(default=None, kw_only=True)
    role: Callable[[int], str] = field(default="rank {}".format, kw_only=True)
    silence: float = field(default=60.0, kw_only=True)
    _told: Counter[str] = field(default_factory=Counter, init=False)

    def ready(self, step: str, limit: float = SETUP_TIMEOUT) -> None:
        """Wait until every rank has reached `step` of the set-up.

        Args:
            limit: longest wait for a rank, in seconds.

        Raises:
            PeerFailed: a rank published a failure instead.
            PeerLost: a rank did not arrive within `limit`.
        """
        self.store.set(f"ready/{step}/{self.rank}", "")
        for rank in range(self.size):
            self.read(f"ready/{step}/{rank}", rank, f"it to be ready ({step})", limit)

    def shared(self, name: str, mine: str, limit: float = SETUP_TIMEOUT, origin: int = 0) -> str:
        """The text of rank `origin` under that name, on every rank; raises as `ready`."""
        if self.rank == origin:
            self.store.set(name, mine)
        return self.read(name, origin, f"its text ({name})", limit)

    def remembered(self, name: str, mine: str) -> str:
        """The text under that name from the run's first attempt, which may be this one."""
        if self.lasting is None:
            return mine
        return str(self.lasting.compare_set(name, "", mine).decode())

    def tell(self, name: str, text: str) -> None:
        """Publish a text of this rank; all ranks must publish equally often."""
        self._told[name] += 1
        self.store.set(f"{name}/{self._told[name]}/{self.rank}", text)

    def hear(self, name: str, rank: int, limit: float = SETUP_TIMEOUT) -> list[str]:
        """The lines that `rank` published when this rank last did; raises as `ready`."""
        key = f"{name}/{self._told[name]}/{rank}"
        return self.read(key, rank, f"its text ({name})", limit).splitlines()

    def read(
        self, key: str, rank: int, what: str, limit: float = SETUP_TIMEOUT, poll: float = POLL
    ) -> str:
        """A text that `rank` writes into the store; raises as `ready`.

        Args:
            what: the text, for messages.
            poll: longest pause between two looks, in seconds; at first they follow faster.
        """
        started = time.monotonic()
        alive = _Alive(self.store, rank)
        with blame.waiting(rank, what):
            while not self.store.check([key]):
                if self.store.check(["failure"]):
                    raise PeerFailed
                waited = time.monotonic() - started
                reason = f"Timed out after {limit:g} s" if waited > limit else ""
                if alive.silent() > self.silence:
                    reason = f"Timed out: no sign of life for {self.silence:g} s"
                if reason:
                    doing = f"waiting for {what} from {self.role(rank)}"
                    raise blame.PeerLost(doing, rank, what, reason)
                time.sleep(min(poll, max(_FIRST, waited / _LOOKS)))
        return str(self.store.get(key).decode())

    def lifeless(self) -> list[int]:
        """Ranks that give no sign of life while several are due."""

        def beats() -> list[str]:
            return [peek(self.store, f"alive/{rank}") for rank in range(self.size)]

        before = beats()
        time.sleep(4 * LOOK)
        after = beats()
        return [rank for rank in range(self.size) if before[rank] == after[rank]]
