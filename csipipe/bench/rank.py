"""One process of a candidate: python -m csipipe.bench.rank SPEC, started by the conductor.

It sets itself up, then sleeps in a read from the conductor's key-value store, which takes no CPU
time, until its turn comes. A turn is timed from when all its ranks are ready to when the last one
is done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from csipipe import methods
from csipipe.bench import memory
from csipipe.bench.candidates import COMPILED, Candidate
from csipipe.bench.peerstage import Choice, PeerStage, tail_of
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.device import keep_memory, pick_device, set_arithmetic, synchronize
from csipipe.measure.figures import Figures
from csipipe.methods.base import adam
from csipipe.methods.centralised import Centralised
from csipipe.methods.csilocal import import_engine
from csipipe.methods.rank import Rank
from csipipe.pipeline import schedule
from csipipe.settings import commandline
from csipipe.settings.config import Settings

_ASLEEP = timedelta(days=30)


class Trainer(Protocol):
    """What every candidate offers: rank 0's iteration returns the UEs' figures."""

    def train_iteration(self, iteration: int) -> Figures | None: ...


@dataclass(frozen=True)
class Spec:
    """What the conductor tells the ranks of a candidate.

    Attributes:
        name, choice: the candidate's, see `Candidate` and `Choice`.
        config: YAML file of its settings.
        ranks, threads: processes, and threads of each.
        port: of the key-value store on this machine.
    """

    name: str
    choice: Choice
    config: str
    ranks: int
    threads: int
    port: int

    @classmethod
    def write(cls, candidate: Candidate, parts: list[int] | None, folder: Path, port: int) -> Path:
        """Write the files of one candidate into `folder`; returns the one to start ranks with."""
        config = folder / "settings.yaml"
        config.write_text(commandline.to_yaml(candidate.settings))
        spec = cls(
            candidate.name,
            Choice(candidate.layers, parts),
            str(config),
            candidate.ranks,
            candidate.threads,
            port,
        )
        file = folder / "spec.json"
        file.write_text(json.dumps(asdict(spec)))
        return file

    @classmethod
    def read(cls, file: Path) -> Spec:
        keys = json.loads(file.read_text())
        return cls(**(keys | {"choice": Choice(**keys["choice"])}))

    def settings(self) -> Settings:
        """The candidate's settings."""
        return commandline.read(["--config", self.config])


@dataclass(frozen=True)
class Order:
    """What a candidate does in a turn.

    Attributes:
        iterations: how many are timed.
        untimed: how many it runs before, to have its memory faulted in.
        release: give freed memory back to the system afterwards.
    """

    iterations: int
    untimed: int = 0
    release: bool = False

    def write(self) -> str:
        """As text; `END` is the order to end."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Order | None:
        """What `write` wrote; None for `END`."""
        return None if text == END else cls(**json.loads(text))


END = "end"


def serve(world: World, spec: Spec) -> None:
    """Set up, then take turns until told to end."""
    settings = spec.settings()
    device = pick_device(settings.train.device, world.local_rank)
    set_arithmetic(settings.train.tf32)
    torch.set_num_threads(spec.threads)
    build = _prepare(spec, settings, world, device)
    if spec.choice.layers == "ours":  # a plain program doesn't
        keep_memory()
    world.ready("data")
    world.connect(settings.run.timeout)
    trainer = build(world)
    world.ready("built")
    memory.forget_peak()
    base = memory.resident()
    halves = getattr(trainer, "halves", [])
    parts = getattr(halves[0], "parts", None) if halves else None
    about = {"parts": parts and [int(part) for part in parts]}  # DeepSpeed's may be numpy's
    world.store.set(f"built/{world.rank}", json.dumps(about))
    turn = done = 0
    while order := _next_order(world, turn):
        result = _take_turn(trainer, done, order, device)
        if order.release:
            memory.release()
        result |= {"base_bytes": base, "peak_bytes": memory.peak()}
        world.store.set(f"result/{turn}/{world.rank}", json.dumps(result))
        turn, done = turn + 1, done + order.untimed + order.iterations
    world.leave()


def _next_order(world: World, turn: int) -> Order | None:
    """Sleep until the conductor says what to do; None: no more."""
    key = f"go/{turn}"
    world.store.wait([key], _ASLEEP)
    return Order.read(world.store.get(key).decode())


def _take_turn(trainer: Trainer, first: int, order: Order, device: torch.device) -> dict[str, Any]:
    """Seconds per iteration, the UEs' losses (rank 0), and what this rank spent its time on."""
    clock, probe = (getattr(trainer, name, None) for name in ("clock", "probe"))
    losses = []

    def iterate(iterations: range) -> None:
        for iteration in iterations:
            if probe is not None:
                probe.unseen = iteration + 1 in iterations
            figures = trainer.train_iteration(iteration)
            if figures is not None:
                losses.append(figures.loss_per_ue)
        synchronize(device)

    start = first + order.untimed
    iterate(range(first, start))
    dist.barrier()
    if clock is not None:
        clock.reset()
    before = time.perf_counter()
    iterate(range(start, start + order.iterations))
    # a peer's stage doesn't use the clock that it inherits
    spent = {} if clock is None or not any(clock.seconds.values()) else dict(clock.seconds)
    dist.barrier()
    seconds = (time.perf_counter() - before) / order.iterations
    per_iteration = {activity: value / order.iterations for activity, value in spent.items()}
    return {"seconds": seconds, "losses": losses, "spent": per_iteration}


def _prepare(
    spec: Spec, settings: Settings, world: World, device: torch.device
) -> Callable[[World], Trainer]:
    """Do what a rank can do alone; returns a function that builds its trainer."""
    if spec.name.startswith("one-"):
        return _prepare_unsplit(spec, settings, device)
    topology = Topology.of(settings, world.size)
    if spec.name.startswith("ours") or not topology.is_bts(world.rank):
        return methods.prepare(settings, world.rank, world.size, device)
    engine = import_engine(device)
    stage = _peer(spec.name)
    plans = [schedule.one_attempt([])] * world.size  # the peer has one of its own

    def build(world: World) -> Rank:
        found = Rank(settings, topology, world, device)
        found.take([stage(found, world.rank, engine, spec.choice)], plans)
        return found

    return build


def _peer(name: str) -> type[PeerStage]:
    """A peer's BTS stage; only its own libraries are imported."""
    if name == "deepspeed":
        from csipipe.bench.stock import StockStage

        return StockStage
    from csipipe.bench.torchpipe import GPipeStage, OneForwardOneBackwardStage

    return GPipeStage if name == "torch-gpipe" else OneForwardOneBackwardStage


def _prepare_unsplit(
    spec: Spec, settings: Settings, device: torch.device
) -> Callable[[World], Trainer]:
    ues, test = methods.load(settings, range(settings.topology.ues), device)

    def build(_: World) -> Trainer:
        trainer = Centralised(settings, ues, test, device, shared=False)
        if spec.choice.layers == "plain":
            trainer.tail = nn.Sequential(*tail_of(settings, "plain")).to(device)
            trainer.optimizer = adam({"tail": trainer.tail.parameters()}, settings.train)
        if spec.name == COMPILED:
            trainer.tail.compile(dynamic=False)
        return trainer

    return build


def main() -> None:
    """Run one rank; the conductor's environment says which."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the conductor speaks for all
    spec = Spec.read(Path(sys.argv[1]))
    rank = int(os.environ["RANK"])
    store = TCPStore("127.0.0.1", spec.port, is_master=False)
    world = World(store, rank, spec.ranks, rank, spec.ranks)
    try:
        serve(world, spec)
    except Exception as error:
        world.fail(error, debug=True)


if __name__ == "__main__":
    main()
