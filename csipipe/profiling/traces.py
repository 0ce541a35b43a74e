"""Trace files: one per rank for TensorBoard's PROFILE tab, and all of them in one for Perfetto."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csipipe.files import whole
from csipipe.profiling.recorder import Recorder
from csipipe.tracking.rank import slug

MERGED = "all-ranks.json.gz"
_IDS = 1 << 32
"""Range of a rank's arrow numbers (Chrome's flow events), so that ranks' arrows aren't joined."""
_PROCESSES = 100
"""Process numbers of a rank in the merged file: itself, then its GPUs."""
_PROCESS_NAMES = ("process_name", "process_labels", "process_sort_index")


@dataclass(frozen=True)
class Trace:
    """One rank's trace.

    Attributes:
        rank, role: whose it is; a role is a human-readable name, such as `BTS stage 0`.
        file: what `write` wrote.
        shift: nanoseconds to add to its times to get rank 0's.
    """

    rank: int
    role: str
    file: Path
    shift: int


def file_name(role: str) -> str:
    """For example `ue-rank-2-ues-0-1.pt.trace.json.gz`; the first part is TensorBoard's worker."""
    return f"{slug(role)}.pt.trace.json.gz"


def write(recorder: Recorder, file: Path) -> None:
    """Write what a rank recorded, whole or not at all.

    Raises:
        OSError: it can't be written; no part of it remains.
    """
    plain = file.with_name(f"{file.name}.plain")
    unfinished = file.with_name(f"{plain.name}.tmp")  # Kineto's
    try:
        recorder.export(plain)
        with (
            whole(file) as packed,
            open(plain, "rb") as source,
            gzip.open(packed, "wb", compresslevel=6) as target,
        ):
            shutil.copyfileobj(source, target)
    finally:
        for leftover in (plain, unfinished):
            leftover.unlink(missing_ok=True)


def merge(traces: Sequence[Trace], file: Path) -> None:
    """Write one trace with a process per rank, all on rank 0's clock; whole or not at all.

    Raises:
        OSError, ValueError: a trace can't be read, or the file not be written.
    """
    with (
        whole(file) as partial,
        gzip.open(partial, "wt", encoding="utf-8", compresslevel=6) as out,
    ):
        out.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        start, separator = None, ""
        for trace in traces:
            with gzip.open(trace.file, "rt", encoding="utf-8") as source:
                content = json.load(source)
            base = int(content["baseTimeNanoseconds"]) + trace.shift
            start = base if start is None else start
            for event in _translated(content["traceEvents"], trace, (base - start) / 1000):
                out.write(separator + json.dumps(event))
                separator = ",\n"
        out.write("\n]}\n")


def _translated(
    events: list[dict[str, Any]], trace: Trace, later: float
) -> Iterator[dict[str, Any]]:
    """A rank's events for the merged trace, shifted by `later` microseconds.

    Kineto's own bookkeeping, which has no process number, is left out.
    """
    processes = _processes(events)
    first = trace.rank * _PROCESSES
    for i, number in enumerate(processes):
        name = trace.role if i == 0 else f"{trace.role}, GPU {number}"
        yield _named(first + i, "process_name", {"name": name})
        yield _named(first + i, "process_sort_index", {"sort_index": first + i})
    for event in events:
        process: Any = event.get("pid")
        if process not in processes or event.get("name") in _PROCESS_NAMES:
            continue
        event = event | {"pid": first + processes.index(process), "ts": event["ts"] + later}
        if event["ph"] in "sft":
            event["id"] += trace.rank * _IDS
        yield event


def _processes(events: list[dict[str, Any]]) -> list[int]:
    """Numbers of processes with events: the rank's own first, then its GPUs'."""
    own = {event["pid"] for event in events if event.get("cat") in ("user_annotation", "cpu_op")}
    shown = {event["pid"] for event in events if event["ph"] == "X"}
    numbers = {process for process in own | shown if isinstance(process, int)}
    return sorted(numbers, key=lambda process: (process not in own, process))


def _named(process: int, what: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": 0, "ts": 0, "args": values}
