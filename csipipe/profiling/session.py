"""The profile of a run, on one rank: when to record, what to write, what to tell the user.

Two iterations before the first recorded one, an iteration is traced for its size, and rank 0
decides whether the disk has room; then the ranks compare clocks. The iteration in between lets them
resynchronise. A profile that fails is reported and costs nothing else: training continues.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from csipipe.comm.world import World
from csipipe.measure.figures import Figures
from csipipe.methods import Worker
from csipipe.pipeline.schedule import bubble
from csipipe.profiling import alignment, traces
from csipipe.profiling.recorder import Recorder
from csipipe.profiling.spans import Row, from_json, to_json, typical
from csipipe.profiling.traces import MERGED, Trace
from csipipe.settings.config import Settings
from csipipe.tracking import Tracker

FOLDER, PICTURE = "profile", "timeline"
_EVENT = 650
"""Most bytes on disk of one event of a trace while it is written: as JSON, compressed, and
compressed once more in the merged trace. 550 were measured on CPUs."""
LEAST = 60.0
"""Least number of seconds that ranks wait for each other's part of the profile."""
_PACE = 5_000
"""Least number of events per second that the slowest disk is expected to write. 100,000 were merged
on a CPU."""


class Profile:
    """Stands between the training loop and this rank's worker.

    Args:
        folder: the run's directory.
        done: iterations that were done before this process.
        tracker: rank 0's.
        unhurried: context for work that may take longer than an iteration.
    """

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        folder: Path,
        done: int,
        world: World,
        tracker: Tracker | None,
        unhurried: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._world = world
        self._tracker = tracker
        self._unhurried = unhurried
        self._run = folder
        self._folder = folder / FOLDER
        self._first = settings.run.profile_after
        self._last = self._first + settings.run.profile_iterations - 1
        self._recorder: Recorder | None = None
        self._offset = alignment.Offset(0, 0)
        self._limit = max(LEAST, settings.run.timeout)
        self._pending = done <= self._first - 2
        if not self._pending:
            self._say(
                f"{self} would begin before iteration {done + 1}, at which this run resumes: "
                f"nothing is profiled; use --run.profile_after {done + 2} or more"
            )

    def __str__(self) -> str:
        return f"the profile of iterations {self._first + 1} to {self._last + 1}"

    def train_iteration(self, iteration: int) -> Figures | None:
        """As the worker's; recorded if the iteration is to be profiled."""
        if not self._pending:
            return self._worker.train_iteration(iteration)
        if iteration == self._first - 2:
            return self._rehearse(iteration)
        if iteration < self._first:
            return self._worker.train_iteration(iteration)
        if iteration == self._first:
            self._recorder = self._start()
        assert self._recorder is not None
        figures = self._record(self._recorder, iteration)
        if iteration == self._last:
            self._recorder.stop()
            with self._unhurried():
                self._finish(self._recorder)
            self._recorder, self._pending = None, False
        return figures

    def close(self) -> None:
        """At the end of the run: report a profile that was not begun or not finished."""
        if self._pending:
            if self._recorder is not None:
                self._recorder.stop()
            self._say(f"{self} was not finished when the run stopped: nothing was written")
            self._pending = False

    def _start(self) -> Recorder:
        recorder = Recorder(self._worker.device)
        recorder.start()
        return recorder

    def _record(self, recorder: Recorder, iteration: int) -> Figures | None:
        recorder.iteration_begins(iteration + 1)
        self._worker.clock.recorder = recorder
        figures = self._worker.train_iteration(iteration)
        self._worker.clock.recorder = None  # an evaluation may follow
        recorder.iteration_ends()
        return figures

    def _rehearse(self, iteration: int) -> Figures | None:
        """Trace an iteration only for its size; continue only if there is room; collective."""
        recorder = self._start()
        figures = self._record(recorder, iteration)
        recorder.stop()
        world = self._world
        world.tell("events", str(recorder.events))
        mine = ""
        if world.rank == 0:
            told = [world.hear("events", rank, self._limit)[0] for rank in range(world.size)]
            events = sum(map(int, told)) * self._settings.run.profile_iterations
            mine = str(events) if self._has_room(events) else ""
        total = world.shared("profile", mine, self._limit)
        self._pending = total != ""
        if self._pending:
            self._limit = max(self._limit, int(total) / _PACE)
            self._offset = alignment.offset(world, self._limit)
        return figures

    def _has_room(self, events: int) -> bool:
        """Whether the disk has room for that many events; reports it."""
        needed = events * _EVENT
        free = shutil.disk_usage(self._run).free
        if needed <= free:
            self._say(f"{self} takes up to {needed:,} bytes in {self._folder}")
            return True
        self._say(
            f"{self} would take {needed:,} bytes, but {free:,} are free in {self._run}: nothing is "
            "profiled, training continues; free some disk space, or lower run.profile_iterations"
        )
        return False

    def _finish(self, recorder: Recorder) -> None:
        """Write this rank's trace; rank 0 puts everything together; collective."""
        started = time.monotonic()
        world = self._world
        error = ""
        try:
            self._folder.mkdir(exist_ok=True)
            traces.write(recorder, self._file(world.rank))
        except OSError as problem:
            error = str(problem)
        world.tell("spans", to_json(recorder.spans))
        world.tell("written", json.dumps([self._offset.ns, self._offset.within, error]))
        if world.rank == 0:
            self._gather(started)
        # otherwise the others would wait for rank 0 inside the next iteration
        world.ready("profile", self._limit)

    def _file(self, rank: int) -> Path:
        return self._folder / traces.file_name(self._world.role(rank))

    def _gather(self, started: float) -> None:
        """On rank 0: the merged trace and the picture, from what all ranks recorded."""
        world = self._world
        found, rows, errors = [], [], []
        for rank in range(world.size):
            spans = from_json(world.hear("spans", rank, self._limit)[0])
            ns, within, error = json.loads(world.hear("written", rank, self._limit)[0])
            role = world.role(rank)
            rows.append(Row(role, [span.shifted(ns) for span in spans]))
            found.append(Trace(rank, role, self._file(rank), ns))
            if error:
                errors.append(f"{role}: {error}")
            if ns:
                self._say(
                    f"profile: the clock of {role} is {-ns / 1e6:+.3f} ms from rank 0's "
                    f"(± {within / 1e6:.3f} ms); its times were shifted"
                )
        try:
            if not errors:
                traces.merge(found, self._folder / MERGED)
            self._draw(rows)
        except (ImportError, OSError, ValueError) as problem:  # matplotlib may be missing
            errors.append(str(problem))
        self._report(errors, time.monotonic() - started)

    def _report(self, errors: list[str], seconds: float) -> None:
        if errors:
            self._say(f"{self} can't be written: {errors[0]}; training continues")
            return
        ours = {self._file(rank).name for rank in range(self._world.size)} | {MERGED}
        foreign = sorted({file.name for file in self._folder.iterdir()} - ours)
        if foreign:
            self._say(
                f"{self._folder} holds {', '.join(foreign)}, which this profile didn't write; "
                "TensorBoard shows every trace there"
            )
        size = sum((self._folder / name).stat().st_size for name in ours)
        self._say(
            f"{self} is in {self._folder} ({size:,} bytes, {seconds:.1f} s): TensorBoard's PROFILE "
            f"tab, {MERGED} for ui.perfetto.dev; picture: {self._run / PICTURE}.png"
        )

    def _draw(self, rows: list[Row]) -> None:
        """The picture of a typical iteration, in the run's directory and in TensorBoard."""
        from csipipe.profiling import timeline  # matplotlib: on rank 0 of a profiled run alone

        assert self._tracker is not None
        settings = self._settings
        iteration = typical(rows)
        pipelined = settings.spec.pipelined
        figure = timeline.draw(
            timeline.Timeline.of(
                rows,
                iteration,
                title=_title(settings, iteration, len(rows)),
                numbers="micro-batch" if pipelined or not settings.stages else "UE",
            )
        )
        for ending in ("png", "svg"):
            timeline.save(figure, self._run / f"{PICTURE}.{ending}")
        self._tracker.events.picture(PICTURE, Image.fromarray(timeline.pixels(figure)), iteration)

    def _say(self, line: str) -> None:
        if self._tracker is not None:
            self._tracker.say(line)


def _title(settings: Settings, iteration: int, ranks: int) -> str:
    """What the picture shows, and GPipe's bubble."""
    train, count = settings.train, settings.run.profile_iterations
    where = f"iteration {iteration}, of median length among {count} profiled"
    if not settings.spec.pipelined:
        return f"{settings.method} on {ranks} rank(s): {where}"
    bound = bubble(settings.stages, train.micro_batches)
    apart = f"and {ranks - settings.stages} UE rank(s)"
    together = f"and the UEs on the same {ranks} rank(s)"
    return (
        f"{settings.method}, {train.schedule}, {settings.stages} BTS stage(s) "
        f"{together if settings.topology.placement == 'together' else apart}: {where}\n"
        f"bubble of GPipe on {settings.stages} equal stages, {train.micro_batches} micro-batches: "
        f"(S−1)/(M+S−1) = {bound:.0%}"
    )
