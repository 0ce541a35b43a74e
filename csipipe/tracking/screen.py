"""What rank 0 shows while it trains: a progress bar on a terminal, lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

_EVERY = 30.0
"""Seconds between lines in a log file, if nothing else was printed in between."""


class Screen:
    """The progress of a run on stderr.

    Args:
        iterations: of the whole run.
        done: how many of them were done before a run resumed.
    """

    def __init__(self, iterations: int, done: int) -> None:
        self._iterations = iterations
        self._first = done
        self._started = time.monotonic()
        self._said = float("-inf")
        self._in_log = not sys.stderr.isatty()
        self._bar = tqdm(
            total=iterations, initial=done, unit="it", disable=self._in_log, dynamic_ncols=True
        )

    def iteration(self, done: int, figures: str) -> None:
        """Show that `done` iterations are done, and figures of the last one."""
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()
        # a log shows a sign of life early, and then from time to time
        if self._in_log and (time.monotonic() - self._said > _EVERY or done == self._first + 1):
            self.progress(done, figures, "training")

    def progress(self, done: int, figures: str, what: str = "iteration") -> None:
        """A line with the time that is left."""
        left = f", {self._left(done)} left" if done > self._first + 1 else ""
        self.say(f"{what} {done}/{self._iterations}: {figures}{left}")

    def say(self, line: str) -> None:
        """A line above the bar, or in the log, if it can be written: its disk may be full."""
        with contextlib.suppress(OSError):
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
        self._said = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _left(self, done: int) -> str:
        each = (time.monotonic() - self._started) / max(1, done - self._first)
        return str(tqdm.format_interval(each * (self._iterations - done)))
