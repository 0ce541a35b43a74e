"""10,000 iterations under torchrun: no rank's memory, threads or file handles grow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_run import ROOT, arguments

ITERATIONS = 10_000
LIMIT = 1800.0
"""Seconds for a run, on a machine with other work to do."""
LEAK = 250.0
"""Bytes per iteration: one tensor that is never freed costs more, and malloc's pools growing and
shrinking, divided by so many iterations, less."""


@dataclass(frozen=True)
class Use:
    """What a process uses at a time."""

    seconds: float
    memory: int
    """Bytes of its own that are resident, without mapped files."""
    threads: int
    handles: int


def uses(process: Path) -> Use:
    """What a process under /proc uses now."""
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Use(
        time.monotonic(),
        1024 * int(fields["RssAnon"].split()[0]),
        int(fields["Threads"]),
        len(list((process / "fd").iterdir())),
    )


def ranks_of(torchrun: int) -> dict[int, Path]:
    """Folders under /proc of the ranks that torchrun started."""
    found = {}
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        process = Path("/proc", child)
        environment = (process / "environ").read_bytes().split(b"\0")
        rank = [value for value in environment if value.startswith(b"RANK=")]
        if rank:
            found[int(rank[0][5:])] = process
    return found


def watched(ranks: int, line: list[str], log: Path) -> dict[int, list[Use]]:
    """Run launch/train.py under torchrun; what each rank used, twice a second."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    found: dict[int, list[Use]] = defaultdict(list)
    deadline = time.monotonic() + LIMIT
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*start, "launch/train.py", *line],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            while process.poll() is None:
                assert time.monotonic() < deadline, "the run took too long"
                try:
                    for rank, folder in ranks_of(process.pid).items():
                        found[rank].append(uses(folder))
                except (OSError, KeyError):  # one that is just ending
                    pass
                time.sleep(0.5)
        finally:
            process.terminate()
    assert process.returncode == 0, log.read_text()
    return found


def slope(seconds: np.ndarray, values: list[int]) -> float:
    """Growth over all of `seconds`, by the line that fits best."""
    return float(np.polyfit(seconds, values, 1)[0] * (seconds[-1] - seconds[0]))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
@pytest.mark.parametrize(("method", "ranks"), [("csilocal", 4), ("fedavg", 3)])
def test_nothing_grows(method: str, ranks: int, tmp_path: Path) -> None:
    """`-s` prints the table."""
    line = arguments(
        tmp_path / "run",
        method=method,
        train__iterations=str(ITERATIONS),
        run__eval_every="500",
        run__save_every="500",
    )
    found = watched(ranks, line, tmp_path / "log")
    assert sorted(found) == list(range(ranks))
    print(f"\n{method} | rank | memory | growth per iteration | threads | handles |")
    growth = {}
    for rank, every in sorted(found.items()):
        # start and first evaluations: buffers, caches and the allocator fill up
        steady = every[len(every) // 4 : -4]
        assert len(steady) > 60, "too short to tell"
        seconds = np.array([use.seconds for use in steady])
        whole = (seconds[-1] - seconds[0]) / (every[-1].seconds - every[0].seconds)
        grown = slope(seconds, [use.memory for use in steady]) / (whole * ITERATIONS)
        threads = [use.threads for use in steady]
        handles = [use.handles for use in steady]
        print(
            f"| {rank} | {steady[0].memory / 1e6:.1f} → {steady[-1].memory / 1e6:.1f} MB | "
            f"{grown:+.0f} B | {min(threads)} … {max(threads)} | "
            f"{min(handles)} … {max(handles)} |",
            flush=True,
        )
        growth[rank] = (grown, slope(seconds, threads), slope(seconds, handles))
    for rank, (memory, threads_more, handles_more) in growth.items():
        assert memory < LEAK, rank
        assert abs(threads_more) < 0.5, rank
        assert abs(handles_more) < 0.5, rank
