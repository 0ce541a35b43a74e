"""All ranks save a checkpoint together, and set a worker up from one.

A checkpoint begins with a copy of the state in memory. A thread of each rank writes it while
training continues. Some iterations later the ranks agree whether all succeeded, and rank 0 gives
it its name. A save that fails (a full disk) is reported once and leaves the last complete
checkpoint; training continues.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from csipipe import __version__, checkpoint
from csipipe.checkpoint import Record, Snapshot
from csipipe.comm.ledger import COUNTED, PHASES, Ledger
from csipipe.comm.world import World
from csipipe.methods import Worker
from csipipe.pipeline import settings as deepspeed
from csipipe.run.resuming import DEEPSPEED
from csipipe.settings import commandline
from csipipe.settings.config import Settings

_LAG = 10
"""A checkpoint is named after 1/_LAG of the interval: late enough for it to have been written
meanwhile, soon enough that a run that is killed hardly loses more."""
_WRITTEN = "written parts"


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written; `content` is rank 0's part of the manifest."""

    done: int
    content: dict[str, Any]
    written: Future[dict[str, Record]]


class Saver:
    """Saves the run in `folder` on this rank.

    Attributes:
        seconds: how long the latest checkpoint has kept this rank from training so far.
    """

    def __init__(self, worker: Worker, settings: Settings, folder: Path, world: World) -> None:
        self._worker = worker
        self._settings = settings
        self._checkpoints = folder / "checkpoints"
        self._world = world
        self._rank = world.rank
        self._deepspeed = deepspeed.of(settings)
        self._thread = ThreadPoolExecutor(1)
        self._pending: _Pending | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}  # kept: fresh memory costs most of a copy
        self.seconds = 0.0

    def begin(self, done: int, ledger: Ledger, progress: dict[str, Any]) -> None:
        """Begin to save everything after iteration `done`; what was begun before was settled.

        Args:
            ledger: of all ranks.
            progress: on rank 0, what else goes into the manifest, as JSON values.
        """
        assert self._pending is None
        started = time.monotonic()
        for name, unit in self._worker.units().items():
            kept = self._copies.get(name, {})
            self._copies[name] = {k: _copied(t, kept.get(k)) for k, t in unit.state().items()}
        content = {
            "csipipe": __version__,
            "iteration": done,
            "settings": commandline.plain(self._settings),
            DEEPSPEED: self._deepspeed,
            "ledger": _dump(ledger),
            "dropped": list(self._worker.dropped),
            **progress,
        }
        partial = self._partial(done)

        def write() -> dict[str, Record]:
            return {n: checkpoint.write_part(partial, n, part) for n, part in self._copies.items()}

        self._pending = _Pending(done, content, self._thread.submit(write))
        self.seconds = time.monotonic() - started

    def due(self, done: int, at_once: bool) -> bool:
        """Whether a checkpoint is to be settled after iteration `done`, the same on every rank."""
        if self._pending is None:
            return False
        return at_once or done >= self._pending.done + max(1, self._settings.save_every // _LAG)

    def settle(self) -> OSError | None:
        """Give the checkpoint that was begun its name, once all ranks have written it; collective.

        Returns:
            On one of the ranks, why there is no checkpoint; it has been reported.
        """
        assert self._pending is not None
        started = time.monotonic()
        done, content, future = self._pending.done, self._pending.content, self._pending.written
        partial = self._partial(done)
        written: dict[str, Record] = {}

        def name_it() -> None:
            checkpoint.commit(partial, content, parts)
            checkpoint.prune(self._checkpoints, self._settings.run.keep)

        error = _try(lambda: written.update(future.result()))
        failed, parts = self._agree(error, written)
        if failed is None and self._rank == 0:
            error = _try(name_it)
        if self._rank == 0 and (failed is not None or error is not None):
            checkpoint.discard(partial)
        self._pending = None
        self.seconds += time.monotonic() - started
        return self._shown(f"checkpoint of iteration {done}", error, failed)

    def best(self, done: int) -> bool:
        """Save the weights after iteration `done` as `checkpoints/best`; collective.

        Returns:
            Whether they are there, on rank 0.
        """
        partial = self._checkpoints / f"best-{done}.partial"
        error = _try(lambda: self._worker.save_weights(partial))
        failed, _ = self._agree(error, {})
        if self._rank == 0:
            if failed is None:
                error = _try(lambda: checkpoint.switch(partial, self._checkpoints / "best"))
            if failed is not None or error is not None:
                shutil.rmtree(partial, ignore_errors=True)
        self._shown(f"best weights of iteration {done}", error, failed)
        return failed is None and error is None

    def _partial(self, done: int) -> Path:
        return self._checkpoints / f"{done}.partial"

    def _agree(
        self, error: OSError | None, written: dict[str, Record]
    ) -> tuple[int | None, dict[str, Record]]:
        """The first rank that failed, if any, and what all ranks wrote; collective."""
        mine = {name: asdict(record) for name, record in written.items()}
        world, limit = self._world, self._settings.run.timeout
        world.tell(_WRITTEN, json.dumps(mine if error is None else None))
        said = [
            json.loads("".join(world.hear(_WRITTEN, rank, limit))) for rank in range(world.size)
        ]
        failed = next((rank for rank, parts in enumerate(said) if parts is None), None)
        records = [item for parts in said for item in (parts or {}).items()]
        return failed, {name: Record(**record) for name, record in records}

    def _shown(self, what: str, error: OSError | None, failed: int | None) -> OSError | None:
        """Report an error once, on the first rank that failed."""
        if error is None or failed not in (None, self._rank):
            return None
        last = checkpoint.newest(self._checkpoints)
        kept = f"the last complete one is {last}" if last else "there is none yet"
        line = (
            f"{what} can't be saved in {self._checkpoints}: {error.strerror or error}; training "
            f"continues, {kept}. Free some disk space."
        )
        with contextlib.suppress(OSError):  # the log may lie on the same disk
            tqdm.write(f"csipipe: warning: {line}", file=sys.stderr)
        return error


def restore(worker: Worker, settings: Settings, source: Snapshot) -> None:
    """Set this rank's share of the run up from a snapshot.

    Raises:
        ValueError: a part that is missing, damaged or of another model; its file is named.
    """
    for name, unit in worker.units().items():
        try:
            unit.load(source.tensors(name))
        except ValueError as error:
            if str(source.folder) in str(error):
                raise
            raise ValueError(
                f"{source.folder / name}.safetensors doesn't fit this run: {error}; resume with "
                "the settings that it was written with."
            ) from error
    worker.dropped = list(source.content["dropped"])
    worker.restore_ledger(_load(source.content["ledger"], settings.topology.ues))


def _copied(tensor: Tensor, copy: Tensor | None) -> Tensor:
    """A tensor's values on the host, in the memory of an earlier copy if there is one."""
    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor.detach())


def _try(save: Callable[[], object]) -> OSError | None:
    try:
        save()
    except OSError as error:
        return error
    return None


def _dump(ledger: Ledger) -> dict[str, dict[str, list[list[int]]]]:
    """Scalars and bytes per phase, kind and UE."""
    return {
        phase: {kind.name: ledger.counts[p, k].tolist() for k, kind in enumerate(COUNTED)}
        for p, phase in enumerate(PHASES)
    }


def _load(content: dict[str, dict[str, list[list[int]]]], ues: int) -> Ledger:
    ledger = Ledger(ues)
    for p, phase in enumerate(PHASES):
        for k, kind in enumerate(COUNTED):
            if kind.name in content[phase]:  # or it is newer than the run
                ledger.counts[p, k] = torch.tensor(content[phase][kind.name])
    return ledger
