"""Where a rank's time goes: seconds per activity, and, while a profile is taken, every span."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

ACTIVITIES = ("compute", "send", "wait")
"""wait: for a neighbour's message. send: handing one over, and waiting until it is gone."""


class Recorder(Protocol):
    """Keeps the spans that a clock is told of (`csipipe.profiling`)."""

    def begin(self, activity: str, what: str, number: int | None) -> None:
        """A span begins; the one before ends."""

    def end(self) -> None:
        """The last span ends."""

    def within(self, name: str, action: Callable[[], object]) -> None:
        """Run `action` under a name of its own within the span."""


class Clock:
    """Seconds that this rank spent on each of `ACTIVITIES` since `reset`.

    On a GPU, work is handed over and waited for later, so part of it counts as waiting.

    Attributes:
        recorder: also gets every span; None, except in iterations that are profiled.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was counted, and what was begun."""
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity: str | None = None
        self._since = 0.0

    def begin(self, activity: str, what: str, number: int | None = None) -> None:
        """From here on, until the next `begin` or `stop`, the time belongs to `activity`.

        Args:
            what: what is done, in words.
            number: the micro-batch or UE that it is done to.
        """
        self._close(activity)
        if self.recorder is not None:
            self.recorder.begin(activity, what, number)

    def stop(self) -> None:
        """From here on the time belongs to no activity."""
        self._close(None)
        if self.recorder is not None:
            self.recorder.end()

    def _close(self, following: str | None) -> None:
        now = time.perf_counter()
        if self._activity is not None:
            self.seconds[self._activity] += now - self._since
        self._activity, self._since = following, now
