"""Milliseconds of work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(
    function: Callable[[], object], device: torch.device, repeats: int = 9, warm: int = 3
) -> float:
    """Median of single calls; by the device's own events where it is a GPU."""
    for _ in range(warm):
        function()
    if device.type == "cpu":
        return statistics.median(_on_host(function) for _ in range(repeats))
    events = [(_event(), _event()) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return float(statistics.median(start.elapsed_time(end) for start, end in events))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _on_host(function: Callable[[], object]) -> float:
    before = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - before)
