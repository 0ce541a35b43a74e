"""Starts candidates, lets them take turns, and ends them.

The conductor computes nothing. Each candidate has its own key-value store in this process:
`go/<turn>` wakes its ranks, `result/<turn>/<rank>` is what they measured (JSON). If a candidate
fails, dies or hangs, only that candidate is ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from csipipe.bench.candidates import Candidate
from csipipe.bench.rank import END, Order, Spec

ENDING = (signal.SIGTERM, signal.SIGHUP)
_POLL = 0.02
_LAST_LINES = 12
_SPEAKING = 3.0  # seconds for a rank to show its error


class Process(Protocol):
    """A started rank, as `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


Launcher = Callable[[Path, dict[str, str], Path], Process]
"""Starts a rank of the candidate in that file, with that environment, writing to that log."""


def launch(spec: Path, environment: dict[str, str], log: Path) -> Process:
    """Start a rank as a program of its own; all ranks of a candidate append to one log."""
    with log.open("a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "csipipe.bench.rank", str(spec)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


class CandidateFailed(Exception):
    """A candidate can't continue; the message names it, says why, and has the end of its log."""


@dataclass(frozen=True)
class Turn:
    """What one candidate measured in one turn.

    Attributes:
        seconds: per iteration, from all ranks ready to all ranks done.
        losses: of each iteration, the paper's loss per UE.
        spent: for each rank, seconds per iteration of computing, sending, waiting; empty if it
            doesn't keep a clock.
        base_bytes, peak_bytes: for each rank, memory before its first iteration, and the peak
            since; None if the machine doesn't report it.
    """

    seconds: float
    losses: list[list[float]]
    spent: list[dict[str, float]]
    base_bytes: list[int | None]
    peak_bytes: list[int | None]


class Resident:
    """A candidate's processes, asleep between its turns.

    Args:
        limit: longest wait for any answer, in seconds.
    """

    def __init__(
        self,
        candidate: Candidate,
        parts: list[int] | None,
        folder: Path,
        limit: float,
        launch: Launcher,
    ) -> None:
        self.candidate = candidate
        self.limit = limit
        self.turns = 0
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._log = folder / "log"
        spec = Spec.write(candidate, parts, folder, self._store.port)
        self.processes = [
            launch(spec, self._environment(rank), self._log) for rank in range(candidate.ranks)
        ]

    def built(self) -> list[int] | None:
        """Wait until it is ready to be timed; returns where it cuts the tail, if it does."""
        about = self._answers("built")
        parts: list[int] | None = about[0]["parts"]
        return parts

    def turn(self, order: Order) -> Turn:
        """Wake it with an order, and wait until it sleeps again.

        Raises:
            CandidateFailed: an error of its own, a dead process, or no answer within `limit`.
        """
        self._store.set(f"go/{self.turns}", order.write())
        ranks = self._answers(f"result/{self.turns}")
        self.turns += 1
        return Turn(
            seconds=ranks[0]["seconds"],
            losses=ranks[0]["losses"],
            spent=[rank["spent"] for rank in ranks],
            base_bytes=[rank["base_bytes"] for rank in ranks],
            peak_bytes=[rank["peak_bytes"] for rank in ranks],
        )

    def end(self, patience: float) -> None:
        """Let it end by itself within `patience` seconds; then kill it."""
        if patience:
            self._store.set(f"go/{self.turns}", END)
        deadline = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self.processes:
            process.wait()

    def _answers(self, key: str) -> list[Any]:
        keys = [f"{key}/{rank}" for rank in range(self.candidate.ranks)]
        deadline = time.monotonic() + self.limit
        while not self._store.check(keys):
            self._look_for_failure()
            if time.monotonic() > deadline:
                silent = [i for i, k in enumerate(keys) if not self._store.check([k])]
                raise self._failed(f"no answer from rank(s) {silent} within {self.limit:.0f} s")
            time.sleep(_POLL)
        return [json.loads(self._store.get(k)) for k in keys]

    def _look_for_failure(self) -> None:
        codes = {r: c for r, p in enumerate(self.processes) if (c := p.poll()) is not None}
        if self._store.check(["failure"]):
            self._let_speak()
            raise self._failed(self._store.get("failure").decode())
        if codes:
            killed = " (killed; out of memory?)" if -signal.SIGKILL in codes.values() else ""
            ended = [f"rank {rank} exited with status {code}" for rank, code in codes.items()]
            raise self._failed("; ".join(ended) + killed)

    def _let_speak(self) -> None:
        """Wait for the failed rank to write its error to the log."""
        deadline = time.monotonic() + _SPEAKING
        while not self._store.check(["failure shown"]) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _failed(self, why: str) -> CandidateFailed:
        self.end(patience=0)
        last = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        text = "\n".join(f"    {line}" for line in last)
        return CandidateFailed(
            f"{self.candidate.label}: {why}" + (f"\n  the end of its log:\n{text}" if last else "")
        )

    def _environment(self, rank: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.candidate.ranks),
            "LOCAL_WORLD_SIZE": str(self.candidate.ranks),
            "OMP_NUM_THREADS": str(self.candidate.threads),
        }


class Conductor:
    """Holds the candidates of one session; when the context ends, none of them is left.

    Args:
        limit: longest wait for a candidate's answer, in seconds.
        launch: starts a rank.
    """

    def __init__(self, limit: float = 1800.0, launch: Launcher = launch) -> None:
        self.limit = limit
        self.launch = launch
        self._residents: list[Resident] = []

    def __enter__(self) -> Conductor:
        self._folder = Path(tempfile.mkdtemp(prefix="csipipe-"))
        self._former = {
            number: signal.signal(number, _interrupt)
            for number in ENDING
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        return self

    def start(self, candidate: Candidate, parts: list[int] | None = None) -> Resident:
        """Start a candidate's processes; `parts`: where to cut the tail, if that is given."""
        folder = self._folder / str(len(self._residents))
        folder.mkdir()
        resident = Resident(candidate, parts, folder, self.limit, self.launch)
        self._residents.append(resident)
        return resident

    def __exit__(self, *_: object) -> None:
        for resident in self._residents:
            resident.end(patience=0)
        shutil.rmtree(self._folder, ignore_errors=True)
        for number, handler in self._former.items():
            signal.signal(number, handler)


def _interrupt(_: int, __: FrameType | None) -> None:
    """Treat it as Ctrl-C: end what was started, keep what was measured."""
    raise KeyboardInterrupt
