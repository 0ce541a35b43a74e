"""How a run ends that is told to, or that lost a rank: soon, whatever the ranks are at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from faults import Fault
from harness import ROOT, Program, errors, run_world
from runs import CPU, small
from test_interrupted_runs import whole
from test_run import arguments

from csipipe import checkpoint, methods
from csipipe.comm.world import World
from csipipe.pipeline.schedule import Op
from csipipe.run import stopping, training
from csipipe.run.resuming import Start
from csipipe.run.stopping import GRACE
from csipipe.tracking import RankTracker, Tracker


def endless(folder: Path, **settings: str) -> list[str]:
    """A run that nobody waits out."""
    often = {"run__eval_every": "20", "run__save_every": "20"}
    return arguments(folder, train__iterations="100000", **{**often, **settings})


@pytest.mark.long
@pytest.mark.parametrize("what", ["hang", "freeze"])
def test_a_rank_without_progress_ends_soon_after_the_signal(what: str, tmp_path: Path) -> None:
    """Though it may wait for a peer for much longer."""
    fault = Fault(3, what, Op.HEAD, iteration=30)
    others = range(4) if what == "hang" else range(3)
    settings = endless(tmp_path / "run", run__timeout="300")
    with Program(4, settings, fault) as program:
        program.wait_for_fault()
        time.sleep(0.5)
        asked = time.monotonic()
        for rank in others:
            pid = program.ranks[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGTERM)
        first = program.first_end(without=3) - asked
        ended = program.join(timeout=60, without=None if what == "hang" else 3)
        seconds = time.monotonic() - asked
    print(f"{what}: first end after {first:.1f} s, all after {seconds:.1f} s")
    assert {ended[rank].code for rank in others} == {1}
    assert GRACE < first < GRACE + 5
    assert seconds < first + 5
    said = [rank.err for rank in ended if "no progress" in rank.err]
    assert said
    assert "after SIGTERM" in said[0]
    whole(tmp_path / "run")


SLOW_WORK = """
import contextlib, os, pathlib, signal, sys, time
from torch.distributed import HashStore
from csipipe.run import stopping
from csipipe.comm.world import World
number, unhurried = getattr(signal, sys.argv[3]), sys.argv[2] == "unhurried"
stopping.GRACE = 60.0  # a busy machine may take its time for the rest
with stopping.Stopping(World(HashStore(), 0, 1, 0, 1), pathlib.Path(sys.argv[1])) as listening:
    os.kill(os.getpid(), number)
    with listening.unhurried() if unhurried else contextlib.nullcontext():
        stopping.GRACE = 0.3
        time.sleep(1 if unhurried else 30)
        stopping.GRACE = 60.0
    assert listening.after(1) is False  # one more iteration, which all ranks do
    assert listening.after(2) is True
"""


@pytest.mark.parametrize(
    ("work", "number", "code"),
    [
        pytest.param("unhurried", "SIGTERM", 0, marks=pytest.mark.long),
        ("unhurried", "SIGHUP", 0),
        ("standstill", "SIGUSR1", 1),
    ],
)
def test_long_work_that_is_announced_is_no_standstill(
    work: str, number: str, code: int, tmp_path: Path
) -> None:
    line = [sys.executable, "-c", SLOW_WORK, str(tmp_path), work, number]
    ended = subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == code, ended.stderr
    assert ("no progress" in ended.stderr) == bool(code)


TWICE = """
import os, pathlib, signal, sys, time
from torch.distributed import HashStore
from csipipe.run import stopping
from csipipe.comm.world import World
pause = float(sys.argv[2])
with stopping.Stopping(World(HashStore(), 0, 1, 0, 1), pathlib.Path(sys.argv[1])) as listening:
    for name in sys.argv[3:]:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(pause)
    assert listening.after(1) is False
    assert listening.after(2) is True
os.kill(os.getpid(), signal.SIGINT)  # torchrun's, late
"""


@pytest.mark.parametrize(
    ("pause", "second", "code"),
    [("0.1", "SIGINT", 0), ("1.5", "SIGINT", 130), ("1.5", "SIGTERM", 130)],
)
def test_ctrl_c_stops_a_run_and_again_ends_it(
    pause: str, second: str, code: int, tmp_path: Path
) -> None:
    """At once it is the same one: torchrun passes on what the terminal may have sent, too. The
    second is a SIGTERM by way of torchrun."""
    line = [sys.executable, "-c", TWICE, str(tmp_path), pause, "SIGINT", second]
    ended = subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == code, ended.stderr
    assert "csipipe: interrupted: one more iteration, and all is saved" in ended.stderr
    assert (f"--run.dir {tmp_path} resumes what is saved" in ended.stderr) == bool(code)


def test_under_nohup_a_hangup_is_ignored(tmp_path: Path) -> None:
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    never = SLOW_WORK.replace("after(2) is True", "after(2) is False")
    line = [sys.executable, "-c", ignored + never, str(tmp_path), "unhurried", "SIGHUP"]
    ended = subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def asked_while_evaluating(world: World, folder: str) -> str:
    """The status of a run that gets SIGTERM within an evaluation, longer than what is a standstill
    in training.
    """
    stopping.GRACE = 0.3
    settings = small(
        "centralised", topology={"stages": None}, run={"eval_every": 2, "timeout": 20.0}
    )
    world.connect(20.0)
    worker: Any = methods.prepare(settings, 0, 1, CPU)(world)
    evaluate = worker.evaluate

    def slowly(split: str) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        return evaluate(split)

    worker.evaluate = slowly
    start = Start(Path(folder))
    mine = RankTracker(start.folder, world.role(0), worker, 10, 0, draws=False)
    training.run(worker, settings, start, Tracker(start.folder, settings, 0), mine, world)
    world.leave()
    return str(json.loads((start.folder / "summary.json").read_text())["status"])


def test_a_stop_waits_for_an_evaluation(tmp_path: Path) -> None:
    assert run_world(1, asked_while_evaluating, str(tmp_path)) == ["stopped"]
    assert whole(tmp_path).name == "4"


def children(pid: int) -> list[int]:
    """Processes that a process started, in order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def training_ranks(agent: subprocess.Popen[bytes], folder: Path) -> list[int]:
    """The ranks of torchrun, once they have saved a checkpoint of the run in `folder`."""
    deadline = time.monotonic() + 300
    while checkpoint.newest(folder / "run" / "checkpoints") is None:
        assert time.monotonic() < deadline
        assert agent.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    return children(agent.pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_torchrun_ends_soon_after_the_ranks(what: str, place: int, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4"]
    settings = endless(tmp_path / "run", run__timeout="3")
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(
            [*line, "launch/train.py", *settings], cwd=ROOT, stdout=log, stderr=log
        )
    ranks: list[int] = []
    try:
        ranks = training_ranks(agent, tmp_path)
        assert len(ranks) == 4
        started = time.monotonic()
        os.kill(ranks[place], getattr(signal, what))
        others = [pid for pid in ranks if pid != ranks[place]]
        while any(alive(pid) for pid in others):
            assert time.monotonic() < started + 13, "run.timeout + 10 s"
            time.sleep(0.05)
        gone = time.monotonic() - started
        code = agent.wait(timeout=60)
        ended = time.monotonic() - started
    finally:
        agent.kill()
        for pid in ranks:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
    print(f"{what} of rank {place}: ranks gone after {gone:.1f} s, torchrun after {ended:.1f} s")
    assert code != 0
    assert ended < gone + 45
    assert (tmp_path / "log").read_text().count("csipipe: error:") <= 1
    whole(tmp_path / "run")


@pytest.mark.parametrize(
    ("what", "at", "waited"),
    [
        ("freeze", None, "it to be ready (data)"),
        pytest.param("kill", None, "it to be ready (data)", marks=pytest.mark.long),
        pytest.param("freeze", "connect", "its connection", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_lost_while_parts_are_built_is_named(
    what: str, at: Literal["connect"] | None, waited: str, tmp_path: Path
) -> None:
    fault = Fault(2, what, at)
    with Program(3, arguments(tmp_path / "run", run__timeout="3"), fault) as program:
        program.wait_for_fault()
        ended = program.join(timeout=60, without=2)
    assert [rank.code for rank in ended[:2]] == [1, 1]
    [message] = errors(ended)
    assert "rank 2 is silent: " in message
    assert f"waited for {waited}" in message


@pytest.mark.long
@pytest.mark.parametrize("what", ["SIGUSR1", "SIGKILL", "SIGHUP", "SIGINT"])
def test_a_signal_to_torchrun_itself(what: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3"]
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(
            [*line, "launch/train.py", *endless(tmp_path / "run")], cwd=ROOT, stdout=log, stderr=log
        )
    ranks: list[int] = []
    try:
        ranks = training_ranks(agent, tmp_path)
        before = len((tmp_path / "log").read_text().splitlines())
        agent.send_signal(getattr(signal, what))
        agent.wait(timeout=60)
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        agent.kill()
        for pid in ranks:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text().splitlines()
    print("\n".join(said[before:]))
    whole(tmp_path / "run")
    if what in ("SIGHUP", "SIGINT"):  # torchrun passes them on
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    else:
        assert sum("torchrun, which started this run, is gone" in line for line in said) == 1
        assert len(said) - before < 8


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_disk_that_fills_up_stops_no_training(rank: int, tmp_path: Path) -> None:
    fault = Fault(rank, "full", Op.STEP, iteration=25)
    settings = endless(tmp_path / "run", train__lr_schedule="constant")
    with Program(4, settings, fault) as program:
        program.wait_for("iteration 100/", timeout=180)
        lines = [line for line in program.text(rank, "err").splitlines() if "be saved" in line]
        assert lines
        assert "File too large" in lines[0]
        assert "the last complete one is" in lines[0]
    assert whole(tmp_path / "run").name == "20"
