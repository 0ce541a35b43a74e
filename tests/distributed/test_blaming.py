"""Who is named when a rank is lost where no message of an iteration is waited for, or late."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Program, errors, run_world
from test_run import arguments

from csipipe.comm import blame
from csipipe.comm import world as worlds
from csipipe.comm.world import World


class _Exit(BaseException):
    """Instead of the end of the process, which has yet to say what it showed."""


def shown(world: World, act: Callable[[World], Any], timeout: float) -> tuple[str, float]:
    """What this rank shows when `act` fails, and seconds until it exits."""

    def leave() -> None:
        raise _Exit

    World._exit = staticmethod(leave)  # type: ignore[assignment,method-assign]
    world.connect(timeout)
    world.doing = f"rank {world.rank} at work"
    world.ready("all")
    started = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(_Exit):
        try:
            act(world)
        except Exception as error:
            world.fail(error, debug=False)
    return said.getvalue().strip(), time.monotonic() - started


def mistaken(world: World, trains: bool) -> str:
    """A rank that fails before it trains, or in an iteration."""

    def act(world: World) -> None:
        world.doing = world.role(world.rank) + ", iteration 3" * trains
        raise ValueError("too many values to unpack (expected 2)")

    return shown(world, act, timeout=5.0)[0]


@pytest.mark.parametrize(
    ("trains", "where"), [(False, ""), (True, "rank 0, iteration 3: ValueError: ")]
)
def test_a_value_error_in_an_iteration_has_its_place(trains: bool, where: str) -> None:
    [said] = run_world(1, mistaken, trains)
    assert said == f"csipipe: error: {where}too many values to unpack (expected 2)"


def freeze(seconds: float) -> None:
    """Stop this process, as a debugger or a dying machine would, and go on in time to report."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def part(world: World, what: str) -> tuple[str, float]:
    """Ranks that end together, but for the last, which is lost just before."""

    def act(world: World) -> None:
        if world.rank < 2:
            world.leave()
        elif what == "gone":
            dist.destroy_process_group()  # as the kernel does for a killed process
        else:
            freeze(3.0)
            world.leave()

    world.grace = 1.5 if what == "silent" else 4.0  # who sees that one is gone needs less
    return shown(world, act, timeout=1.0)


@pytest.mark.long
@pytest.mark.parametrize(("what", "soon"), [("silent", 2.9), ("gone", 2.5)])
def test_a_rank_lost_before_the_end_is_named(what: str, soon: float) -> None:
    results = run_world(3, part, what)
    (message,) = [text for text, _ in results if text]
    found = r"csipipe: error: rank 2 is (\w+): rank [01] at work, waited for the others to end\."
    match = re.fullmatch(found, message)
    assert match, message
    assert match[1] == what
    assert all(seconds < soon for _, seconds in results[:2])


def average(world: World) -> tuple[str, float]:
    """Rank 0 waits for the others one by one, who wait for its answer; the third is lost."""

    def receive(source: int, what: str) -> None:
        with blame.watch("receiving", source, what):
            dist.recv(torch.zeros(1), source)

    def act(world: World) -> None:
        if world.rank == 0:
            for rank in (1, 2, 3):
                receive(rank, "update")
            return
        if world.rank == 2:
            time.sleep(1.6)  # slow, as it may be
        if world.rank == 3:
            freeze(3.8)
        dist.send(torch.zeros(1), 0)
        receive(0, "mean")

    worlds.LOOK = 0.2  # type: ignore[attr-defined]
    world.grace = 1.2
    return shown(world, act, timeout=2.0)


@pytest.mark.long
def test_a_rank_that_waits_for_less_long_is_not_the_silent_one() -> None:
    results = run_world(4, average)
    (message,) = [text for text, _ in results if text]
    assert message == "csipipe: error: rank 3 is silent: rank 0 at work, waited for update."


@pytest.mark.long
def test_a_run_names_the_frozen_rank_beside_a_slow_one(tmp_path: Path) -> None:
    chosen = arguments(
        tmp_path / "run",
        method="fedavg",
        topology__ues="6",
        train__iterations="100000",
        run__eval_every="50000",
        run__timeout="8",
    )
    with Program(4, chosen) as program:
        program.wait_for("training 1/", timeout=180)
        started = time.monotonic()
        pids = [process.pid or 0 for process in program.ranks]
        for rank in (2, 3):
            os.kill(pids[rank], signal.SIGSTOP)
        time.sleep(7)
        os.kill(pids[2], signal.SIGCONT)
        ended = program.join(timeout=60, without=3)
        seconds = time.monotonic() - started
    (message,) = errors(ended)
    assert message.startswith("csipipe: error: UE rank 3 (UEs 4-5) is silent: "), message
    assert seconds < 18
