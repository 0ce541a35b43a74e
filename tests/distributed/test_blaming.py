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
from typing import Any

import pytest
import torch.distributed as dist
from harness import run_world

from csipipe.world import World


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

    world.grace = 1.5
    return shown(world, act, timeout=1.0)


@pytest.mark.parametrize(("what", "soon"), [("silent", 2.9), ("gone", 1.0)])
def test_a_rank_lost_before_the_end_is_named(what: str, soon: float) -> None:
    results = run_world(3, part, what)
    (message,) = [text for text, _ in results if text]
    found = r"csipipe: error: rank 2 is (\w+): rank [01] at work, waited for the others to end\."
    match = re.fullmatch(found, message)
    assert match, message
    assert match[1] == what
    assert all(seconds < soon for _, seconds in results[:2])
