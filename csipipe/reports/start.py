"""Starts a report's missing runs, each a torchrun of `csipipe train`, and watches them.

A run's output goes to `<out>/logs/<name>.log`. A run that fails is named and the others continue.
After an interruption, the next start resumes the runs from their checkpoints. A run ends with the
process that started it, even if that is killed.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from csipipe import files
from csipipe.comm import orphans
from csipipe.comm.topology import Topology
from csipipe.reports.runs import Run
from csipipe.settings import commandline

_POLL = 0.2
_ENDING = 40.0
"""Seconds for torchrun to end its ranks (it takes 30 for a frozen one)."""


@dataclass
class _Started:
    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    since: float


def start(runs: Sequence[Run], out: Path, processes: int, jobs: int = 1) -> dict[str, str]:
    """Train `runs`, `jobs` at a time.

    Args:
        processes: ranks of a run, at most, unless its stages need more.

    Returns:
        What went wrong, by name of the run that failed.

    Raises:
        ValueError: another report is starting runs in `out`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; every run in progress has ended.
    """
    failed: dict[str, str] = {}
    waiting, going, done = list(runs), list[_Started](), 0
    began = time.monotonic()
    with _alone(out), ended_by_signals():
        try:
            while waiting or going:
                while waiting and len(going) < jobs:
                    going.append(_launch(waiting.pop(0), out, processes))
                time.sleep(_POLL)
                for ended in [s for s in going if s.process.poll() is not None]:
                    going.remove(ended)
                    done += 1
                    if ended.process.returncode:
                        failed[ended.run.name] = _reason(ended.log)
                    _say(ended, done, len(runs), began, failed.get(ended.run.name))
        finally:
            _end(going)
    return failed


def command(run: Run, config: Path, processes: int) -> list[str]:
    """The torchrun line of a run, as arguments."""
    least, most = Topology.ranks(run.settings, processes)
    ranks = max(least, min(processes, most))
    # a port of its own, and no look-up of this machine's name, which may have no address
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *alone]
    train = ["-m", "csipipe", "train", "--config", str(config)]
    return [*launcher, f"--nproc_per_node={ranks}", *train]


def _launch(run: Run, out: Path, processes: int) -> _Started:
    config, log = out / "configs" / f"{run.name}.yaml", out / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(config, commandline.to_yaml(run.settings))
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(run, config, processes),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on
            preexec_fn=orphans.ending_with_parent(),
        )
    return _Started(run, process, log, time.monotonic())


def _say(ended: _Started, done: int, of: int, began: float, reason: str | None) -> None:
    now = time.monotonic()
    left = tqdm.format_interval((now - began) / done * (of - done))
    outcome = f"{now - ended.since:.0f} s" if reason is None else f"FAILED: {reason}"
    print(
        f"run {done} of {of}: {ended.run.name}: {outcome}; {left} left", file=sys.stderr, flush=True
    )


def _reason(log: Path) -> str:
    """The run's own message, and where the rest is."""
    lines = log.read_text(errors="replace").splitlines()
    messages = [line for line in lines if line.startswith("csipipe: error:")]
    text = messages[0].removeprefix("csipipe: error:").strip() if messages else "no message"
    return f"{text} (see {log})"


def _end(going: list[_Started]) -> None:
    """End the runs that are in progress."""
    for started in going:
        started.process.terminate()
    for started in going:
        try:
            started.process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            started.process.kill()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold `<out>/lock`, so that no run in progress is taken for an interrupted one."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        if not files.lock(lock.fileno()):
            raise ValueError(
                f"another report is starting runs in {out}; wait for it, choose another --out, or "
                "draw the finished runs with --collect."
            )
        yield


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Treat SIGTERM, and SIGHUP of a closed terminal, as Ctrl-C: what was started ends, too."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
