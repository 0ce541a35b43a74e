"""Records one rank: torch.profiler's trace, and the spans reported to the rank's clock."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from csipipe.profiling.spans import Span, range_name

_END = 8192
"""Bytes at the end of a trace that hold its name, which comes last."""


class Recorder:
    """Records for `csipipe.measure.clock.Clock`: every span is a named range of the trace as well.

    Args:
        device: where this rank computes.

    Attributes:
        spans: what was recorded, in order.
    """

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it announces starts and stops
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # otherwise torch warns that the next cycle forgets this one's events; there is only one
        self._profiler = profile(activities=activities, acc_events=True)
        self.spans: list[Span] = []
        self._iteration = 0
        self._step: record_function | None = None
        self._range: record_function | None = None
        self._open: tuple[str, str, int | None, int, int] | None = None

    def start(self) -> None:
        """Record from here on."""
        self._profiler.start()

    def stop(self) -> None:
        """Stop recording; ends what was begun."""
        self.iteration_ends()
        self._profiler.stop()

    def iteration_begins(self, iteration: int) -> None:
        """Iteration `iteration`, counted from 1: a step in TensorBoard's words."""
        self._iteration = iteration
        self._step = record_function(f"ProfilerStep#{iteration}")
        self._step.__enter__()  # type: ignore[no-untyped-call]

    def iteration_ends(self) -> None:
        """The iteration is over, if one was begun."""
        self.end()
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def begin(self, activity: str, what: str, number: int | None) -> None:
        """A span begins; the one before ends."""
        self.end()
        self._range = record_function(range_name(what, number))
        self._range.__enter__()  # type: ignore[no-untyped-call]
        self._open = (activity, what, number, self._iteration, time.time_ns())

    def end(self) -> None:
        """The span that was begun ends, if there is one."""
        if self._range is not None and self._open is not None:
            self.spans.append(Span(*self._open, time.time_ns()))
            self._range.__exit__(None, None, None)
            self._range = self._open = None

    def within(self, name: str, action: Callable[[], object]) -> None:
        """Run `action` under a name of its own within the span."""
        with record_function(name):
            action()

    @property
    def events(self) -> int:
        """Events of the trace, once it has stopped."""
        results = self._profiler.profiler
        assert results is not None
        assert results.kineto_results is not None
        return len(results.kineto_results.events())

    def export(self, file: Path) -> None:
        """Write the trace as Chrome's JSON, uncompressed.

        Raises:
            OSError: it can't be written.
        """
        self._profiler.export_chrome_trace(str(file))
        # torch doesn't report that it couldn't write all of it
        with open(file, "rb") as written:
            written.seek(-min(_END, file.stat().st_size), os.SEEK_END)
            if b'"traceName"' not in written.read():
                raise OSError(errno.EIO, "The trace was not written completely", str(file))
