"""What one rank alone knows: its time, its gradients, its memory, what its UE reconstructs.

Each rank writes it under `ranks/` in the run's directory, where TensorBoard shows it as a run of
its own: nothing is sent, and nobody waits.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path
from typing import Protocol

import torch

from csipipe.measure.clock import Clock
from csipipe.measure.probe import Probe
from csipipe.settings.tables import SourceSpec
from csipipe.tracking import reconstruction
from csipipe.tracking.events import Events

RANKS = "ranks"
"""Folder in a run's directory with one folder per rank."""
COST = "time/percent_spent_on_tensorboard"
_POINTS = 100
"""Points of a rank's curves: gradient norms take a pass over all gradients."""
_PICTURES = 10
"""Pictures of a run: as many as TensorBoard keeps."""
_ROWS = 1000
"""How many test samples, the first ones, the worst and the median are chosen from."""


class Watched(Protocol):
    """A worker that can be watched."""

    clock: Clock
    probe: Probe


class RankTracker:
    """Follows one rank.

    Args:
        folder: the run's directory.
        role: the rank's human-readable name.
        iterations: of the whole run.
        done: how many of them were done before a run resumed.
        draws: this rank hosts the UE whose reconstructions are shown.
        axes: what stands at an image's axes, see `SourceSpec.axes`.
    """

    def __init__(
        self,
        folder: Path,
        role: str,
        worker: Watched,
        iterations: int,
        done: int,
        draws: bool,
        axes: tuple[str, str] = SourceSpec.axes,
    ) -> None:
        self.events = Events(folder / RANKS / slug(role), first=done + 1)
        self._worker = worker
        self._iterations = iterations
        self._draws = draws
        self._axes = axes
        self._started = time.monotonic()
        self._shown = done
        self._spent = dict(worker.clock.seconds)
        self._drawn = done

    def before(self, done: int) -> None:
        """The `done`-th iteration comes next."""
        self._worker.probe.gradients_wanted = self.shows(done)

    def shows(self, done: int) -> bool:
        """Whether gradients of the `done`-th iteration are shown."""
        return due(done, self._iterations, _POINTS, self._worker.probe.apart)

    def after(self, done: int) -> None:
        """The `done`-th iteration is over."""
        if not self._worker.probe.gradients_wanted:
            return
        spent = dict(self._worker.clock.seconds)
        passed = max(1, done - self._shown)
        values = {f"time/{a}": (spent[a] - self._spent[a]) / passed for a in spent}
        norms = self._worker.probe.norms()
        values |= {f"gradient_norm/{part}": norm for part, norm in norms.items()}
        values |= memory()
        spent_here = self.events.seconds + self._worker.probe.seconds
        values[COST] = 100 * spent_here / (time.monotonic() - self._started)
        self._shown, self._spent = done, spent
        self.events.scalars(values, done)

    def before_test(self, done: int) -> None:
        """An evaluation on the test set comes next, after `done` iterations."""
        part = self._iterations / _PICTURES
        crossed = done // part > self._drawn // part
        if self._draws and (crossed or done == self._iterations):
            self._worker.probe.rows_wanted = _ROWS
            self._drawn = done

    def after_test(self, done: int) -> None:
        """The evaluation is over."""
        shown = self._worker.probe.reconstructions()
        if shown is not None:
            started = time.perf_counter()
            title = f"UE {self._worker.probe.ue} after {done:,} iterations"
            image = reconstruction.draw(*shown, title, self._axes)
            self.events.seconds += time.perf_counter() - started
            self.events.picture("reconstruction", image, done)

    def close(self) -> None:
        """The run is over."""
        self.events.close()


def due(done: int, iterations: int, points: int, apart: int = 1) -> bool:
    """Whether the `done`-th iteration is one of about `points` to record; the last one is.

    Args:
        apart: iterations from one to the next, at least.
    """
    return done % max(apart, iterations // points) == 0 or done == iterations


def slug(role: str) -> str:
    """A rank's human-readable name as the name of a folder: `ue-rank-3-ues-2-3`."""
    return re.sub(r"[^a-z0-9]+", "-", role.lower()).strip("-")


def memory() -> dict[str, float]:
    """Most memory that this process has used so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, else KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"memory/peak_mib": peak / 2**20}
    if torch.cuda.is_available():
        found["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found
