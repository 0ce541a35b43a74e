"""Faults by name: fail rank r at an instruction, or spoil a message, of iteration k.

Hooks `csipipe.pipeline.schedule.execute` and gloo's send from the outside, in the rank that is to
fail.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from csipipe.comm.channel import SLOTS
from csipipe.comm.ledger import Kind
from csipipe.pipeline import schedule
from csipipe.pipeline.schedule import Instruction, Op


@dataclass(frozen=True)
class Fault:
    """What rank `rank` does at an instruction, or with a message, of one iteration (from 1).

    Attributes:
        what: at an instruction: raise, kill, freeze, hang, full (from here on no file of this rank
            grows beyond 10 kB, as on a full disk). With a message: drop, corrupt, shorten,
            lengthen; kill and freeze happen before it is sent.
        at: the instruction's `Op`, or the message's `Kind`; None: while its parts are built;
            "connect": when all are about to connect.
        micro_batch: of a message; of an instruction it is the first with that `Op`.
    """

    rank: int
    what: str
    at: Op | Kind | Literal["connect"] | None
    iteration: int = 3
    micro_batch: int = 0

    def __str__(self) -> str:
        place = "connecting" if self.at else "building"
        if isinstance(self.at, Op | Kind):
            place = f"{self.at.name.lower()}, iteration {self.iteration}"
        return f"{self.what} rank {self.rank} at {place}"


def install(fault: Fault, note: Path) -> None:
    """Arm this process; `note` is the file that says when it happened."""

    def happens() -> None:
        note.write_text(str(time.monotonic()))

    if fault.at is None:
        _at_building(fault, happens)
    elif fault.at == "connect":
        _at_connecting(fault, happens)
    elif isinstance(fault.at, Op):
        _at_instruction(fault, fault.at, happens)
    else:
        _at_message(fault, fault.at, note, happens)


def _act(what: str) -> None:
    if what == "raise":
        raise RuntimeError("injected")
    if what == "hang":
        threading.Event().wait()
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[what])


def _at_building(fault: Fault, happens: Callable[[], None]) -> None:
    from csipipe.run import training

    count = training.set_threads  # type: ignore[attr-defined]  # imported there, as we need it

    def spoiled(wanted: int | None, ranks_on_node: int) -> int:
        happens()
        _act(fault.what)
        return count(wanted, ranks_on_node)

    training.set_threads = spoiled  # type: ignore[attr-defined]


def _at_connecting(fault: Fault, happens: Callable[[], None]) -> None:
    from csipipe.comm.world import World

    connect = World.connect

    def spoiled(world: World, timeout: float) -> None:
        happens()
        _act(fault.what)
        connect(world, timeout)

    World.connect = spoiled  # type: ignore[assignment,method-assign]


def _at_instruction(fault: Fault, op: Op, happens: Callable[[], None]) -> None:
    from csipipe.methods.rank import Rank
    from csipipe.pipeline import engine

    run = schedule.execute
    now = 0  # the iteration that is being trained

    def counted(train: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        def train_iteration(half: Any, iteration: int) -> Any:
            nonlocal now
            now = iteration + 1
            figures = train(half, iteration)
            now = 0
            return figures

        return train_iteration

    def execute(plan: Any, *rest: Any) -> None:
        nonlocal now
        steps: list[Instruction] = list(plan)
        at = next((i for i, step in enumerate(steps) if step.op is op), None)
        if now != fault.iteration or at is None:
            run(steps, *rest)
            return
        now = 0
        run(steps[:at], *rest)
        happens()
        _act(fault.what)
        run(steps[at:], *rest)

    Rank.train_iteration = counted(Rank.train_iteration)  # type: ignore[assignment,method-assign]
    schedule.execute = execute  # type: ignore[assignment]
    engine.execute = execute  # type: ignore[attr-defined,assignment]


def _at_message(fault: Fault, kind: Kind, note: Path, happens: Callable[[], None]) -> None:
    isend = dist.isend
    tag = kind.value * SLOTS + fault.micro_batch
    sent: Counter[int] = Counter()  # by receiver

    def faulty(tensor: torch.Tensor, to: int, group: Any = None, its_tag: int = 0) -> Any:
        sent[to] += its_tag == tag
        if its_tag != tag or sent[to] != fault.iteration or note.exists():
            return isend(tensor, to, group, its_tag)
        happens()
        if fault.what == "drop":
            return _Sent()
        if fault.what in _SPOIL:
            tensor = _SPOIL[fault.what](tensor)
        else:
            _act(fault.what)
        return isend(tensor, to, group, its_tag)

    dist.isend = faulty  # type: ignore[assignment]


def _corrupt(tensor: torch.Tensor) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[1] = math.nan
    return spoiled


_SPOIL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "corrupt": _corrupt,
    "shorten": lambda tensor: tensor.flatten()[:-1].clone(),
    "lengthen": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()]),
}


class _Sent:
    """The send of a message that is not sent."""

    def wait(self) -> bool:
        return True
