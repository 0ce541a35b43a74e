"""Where a rank's time goes: seconds per activity, read at the end of every instruction."""

from __future__ import annotations

import time

ACTIVITIES = ("compute", "send", "wait")
"""wait: for a neighbour's message. send: handing one over, and waiting until it is gone."""


class Clock:
    """Seconds that this rank spent on each of `ACTIVITIES` since `reset`.

    On a GPU, computing is handed over and waited for later, so a part of it counts as waiting.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._last = 0.0

    def start(self) -> None:
        """From here on; what lay before belongs to no activity."""
        self._last = time.perf_counter()

    def note(self, activity: str) -> None:
        """The time since the last call belongs to `activity`."""
        now = time.perf_counter()
        self.seconds[activity] += now - self._last
        self._last = now
