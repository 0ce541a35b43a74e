"""How long a rank waits for a transfer, so that the one that is silent can still be named.

Gloo's `wait` blocks the host and fails after the group's timeout. NCCL's only blocks the GPU's
stream: the host continues, and after the group's timeout a watchdog ends the process without naming
anyone. So the host polls until `run.timeout`, and NCCL's groups wait longer than that.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Protocol

_LOOK = 2e-5  # seconds between two polls; a message takes a few hundred µs
_WATCHDOG = 30.0


class Work(Protocol):
    """The part of `dist.Work` that waiting needs."""

    def is_completed(self) -> bool: ...

    def wait(self) -> object: ...


def group_timeout(backend: str, timeout: float) -> timedelta:
    """Timeout of a process group: NCCL's watchdog must not act before `wait` has failed.

    Args:
        timeout: `run.timeout`, in seconds.
    """
    return timedelta(seconds=2 * timeout + _WATCHDOG if backend == "nccl" else timeout)


def wait(work: Work, limit: float | None) -> None:
    """Wait for a transfer.

    Args:
        limit: seconds for which the host polls, as NCCL needs it; None: `work` itself blocks the
            host, and fails in time.

    Raises:
        RuntimeError: it failed, or isn't over after `limit`.
    """
    if limit is not None:
        deadline = time.monotonic() + limit
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Timed out after {limit:g} s")
            time.sleep(_LOOK)
    work.wait()
