"""Spawned ranks for tests: real processes, real gloo, a file store, and a hard time limit."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from faults import Fault
from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

from csipipe.comm.world import World

ROOT = Path(__file__).parents[2]

# tests compute on the CPU, whatever the machine has; DeepSpeed decides when it is imported
os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

# a server process imports torch and DeepSpeed once; ranks are forked from it in a moment
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm"])


def _forked(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that will be forked from the server, which finds its module among the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return _CONTEXT.Process(target=target, args=arguments)


def run_world(
    size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 180.0
) -> list[Any]:
    """Run `function(world, *arguments)` on `size` connected ranks; results in order of rank.

    Args:
        function: importable from a test module; what it returns must pickle.
        timeout: seconds after which every rank is killed.

    Raises:
        AssertionError: a rank failed (with its traceback) or the time was over.
    """
    with tempfile.TemporaryDirectory() as folder:
        results: Any = _CONTEXT.Queue()
        ranks = [
            _forked(_rank, rank, size, str(Path(folder) / "store"), results, function, arguments)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        assert time.monotonic() < deadline, f"only ranks {sorted(found)} ended in time"
        try:
            rank, result, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0)]
            assert not set(dead) - set(found), f"ranks {dead} died"
            continue
        assert error is None, f"rank {rank} failed:\n{error}"
        found[rank] = pickle.loads(result)
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode == 0, "a rank returned but did not end"
    return [found[rank] for rank in range(len(ranks))]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code and what it wrote."""

    code: int | None
    out: str
    err: str


class Program:
    """launch/train.py on `size` ranks as torchrun would start it, each ending by itself.

    The key-value store lives in this process, as it does in torchrun's agent. Use as a context:
    what is left of the ranks is killed at the end.

    Args:
        fault: what one of the ranks does wrong.
        restarts: what torchrun tells each rank of its restarts; none unless given.
    """

    def __init__(
        self,
        size: int,
        arguments: Sequence[str],
        fault: Fault | None = None,
        restarts: Sequence[int] = (),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            _forked(
                _program,
                rank,
                size,
                self._store.port,
                self._folder.name,
                arguments,
                # the fork server's environment is that of the test that started it
                {
                    **os.environ,
                    "TORCHELASTIC_RESTART_COUNT": str(restarts[rank] if restarts else 0),
                },
                fault if fault and fault.rank == rank else None,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Program:
        for process in self.ranks:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()
        self._folder.cleanup()

    def text(self, rank: int, stream: str) -> str:
        """What a rank wrote to `out` or `err` so far."""
        file = Path(self._folder.name, f"{rank}.{stream}")
        return file.read_text() if file.exists() else ""

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until rank 0 has written `text` to its error stream."""
        deadline = time.monotonic() + timeout
        while text not in self.text(0, "err"):
            assert self.ranks[0].is_alive(), self.text(0, "err")
            assert time.monotonic() < deadline, f"no {text!r} in time"
            time.sleep(0.05)

    def wait_for_fault(self, timeout: float = 120.0) -> float:
        """Wait until the fault has happened; when that was, on the monotonic clock."""
        deadline = time.monotonic() + timeout
        while not (file := Path(self._folder.name, "fault")).exists():
            assert time.monotonic() < deadline, self.text(0, "err")
            time.sleep(0.02)
        return float(file.read_text() or time.monotonic())

    def first_end(self, without: int | None, timeout: float = 120.0) -> float:
        """Wait until a rank has ended; when that was."""
        deadline = time.monotonic() + timeout
        watched = [process for rank, process in enumerate(self.ranks) if rank != without]
        while all(process.is_alive() for process in watched):
            assert time.monotonic() < deadline, "no rank ended"
            time.sleep(0.02)
        return time.monotonic()

    def join(self, timeout: float = 60.0, without: int | None = None) -> list[Ended]:
        """Wait until every rank has ended, or all `without` one.

        Raises:
            AssertionError: a rank was still there when the time was over.
        """
        deadline = time.monotonic() + timeout
        for rank, process in enumerate(self.ranks):
            if rank != without:
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} did not end"
        return [
            Ended(process.exitcode, self.text(rank, "out"), self.text(rank, "err"))
            for rank, process in enumerate(self.ranks)
        ]


def run_program(size: int, arguments: Sequence[str]) -> list[Ended]:
    """Run launch/train.py to its end."""
    with Program(size, arguments) as program:
        return program.join()


def errors(ranks: list[Ended]) -> list[str]:
    """The messages that the program itself showed, over all ranks."""
    lines = (line for rank in ranks for line in rank.err.splitlines())
    return [line for line in lines if line.startswith("csipipe: error:")]


class ForkedRank:
    """A rank of a benchmark's candidate, forked; `csipipe.bench.conductor.Process`."""

    def __init__(self, spec: Path, environment: dict[str, str], log: Path) -> None:
        self._process = _forked(_bench_rank, str(spec), {**os.environ, **environment}, str(log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _bench_rank(spec: str, environment: dict[str, str], log: str) -> None:
    from csipipe.bench import rank

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    sys.argv = ["rank", spec]
    rank.main()


def _environment(rank: int, size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }


def _program(
    rank: int,
    size: int,
    port: int,
    folder: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    fault: Fault | None,
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{rank}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(
        environment | _environment(rank, size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    if fault is not None:
        faults.install(fault, Path(folder, "fault"))
    sys.argv = ["launch/train.py", *arguments]
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


def _rank(
    rank: int,
    size: int,
    store: str,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(_environment(rank, size))
    torch.set_num_threads(1)
    try:
        world = World(FileStore(store, -1), rank, size, rank, size)
        # pickled here: a queue would pass tensors as shared memory that dies with this rank
        results.put((rank, pickle.dumps(function(world, *arguments)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        sys.exit(1)
