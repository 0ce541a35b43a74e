"""Rank 0's view of a run: the whole run's figures, on the screen and on disk."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from csipipe.comm.ledger import PAPER, Ledger
from csipipe.files import in_words, write_file
from csipipe.measure.figures import Figures
from csipipe.settings.config import Settings
from csipipe.tracking import dashboard
from csipipe.tracking.events import Events
from csipipe.tracking.rank import COST, due
from csipipe.tracking.screen import Screen
from csipipe.tracking.tables import closing_table, exchanged

HISTORY = "history.jsonl"
"""The learning curve: a line per evaluation with `iteration`, `exchanged` so far (in training, over
all UEs), `bytes_of_each` (of these, by UE), `test` as in `summary.json`, and `holdout` (its means)
or null."""
BEGINNING: dict[str, Any] = {"history": [], "seconds": [], "seconds_total": 0.0}
"""`Tracker.progress` of a run that has not started."""
_KEPT = 1000
"""How many of the last iterations the median time is taken over."""
_POINTS = 1000
"""Points of a training curve: as many as TensorBoard keeps."""


class Tracker:
    """Follows one run.

    Args:
        folder: the run's directory.
        done: iterations that were done before a run resumed.
    """

    def __init__(self, folder: Path, settings: Settings, done: int) -> None:
        self.folder = folder
        self.events = Events(folder, first=done + 1)
        self.screen = Screen(settings.train.iterations, done)
        self.seconds: deque[float] = deque(maxlen=_KEPT)
        self.history: list[dict[str, Any]] = []
        self._settings = settings
        self._similarity = settings.similarity
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._training_db = math.nan
        self._shown = [0.0, 0.0, 0.0]  # iterations, seconds and samples since the last point
        columns, mine, self._end = dashboard.hparams(settings)
        for page in (dashboard.settings_text(settings), dashboard.layout(settings), columns, mine):
            self.events.add(page)

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue from what `progress` returned before, in this run's directory."""
        self.history = list(progress["history"])
        self.seconds.extend(progress["seconds"])
        self._seconds_before = float(progress["seconds_total"])
        for line in self.history:
            self._against_exchange(line)
        self._write_history()

    def progress(self) -> dict[str, Any]:
        """What `resume` needs, as JSON has it."""
        return {
            "history": list(self.history),
            "seconds": list(self.seconds),
            "seconds_total": self.seconds_total,
        }

    def iteration(self, done: int, figures: Figures, lr: float, seconds: float) -> None:
        """Note the `done`-th iteration: figures of its batches, rate, wall time in seconds."""
        self.seconds.append(seconds)
        self._training_db = figures.nmse_db
        samples = float(figures.sums[:, 0].sum())
        new = (1, seconds, samples)
        self._shown = [a + b for a, b in zip(self._shown, new, strict=True)]
        if due(done, self._settings.train.iterations, _POINTS):
            iterations, seconds, samples = self._shown
            self._shown = [0.0, 0.0, 0.0]
            speed = {
                "train/lr": lr,
                "time/seconds_per_iteration": seconds / iterations,
                "speed/samples_per_second": samples / max(seconds, 1e-9),
            }
            self.events.scalars(dashboard.band("train", figures, self._similarity) | speed, done)
        self.screen.iteration(done, f"loss {figures.loss:.2e}, {self._figure(figures)}")

    def saved(self, done: int, seconds: float) -> None:
        """Note a complete checkpoint of iteration `done`, for which rank 0 paused `seconds`."""
        self.events.scalars({"time/seconds_per_checkpoint": seconds}, done)

    def evaluation(self, done: int, test: Figures, holdout: Figures | None, ledger: Ledger) -> None:
        """Note an evaluation after `done` iterations."""
        scalars, size = ledger.total("training", PAPER)
        values = dashboard.band("test", test, self._similarity)
        if holdout is not None:
            values |= dashboard.band("holdout", holdout, self._similarity)
        shown = test.summary()["per_ue"]
        values |= {f"test_loss_per_ue/{row['ue']}": row["loss"] for row in shown}
        values |= {"exchanged/scalars": scalars, "exchanged/bytes": size}
        values[COST] = 100 * self.events.seconds / (time.monotonic() - self._started)
        self.events.scalars(values, done)
        self._note(done, test, holdout, ledger)
        self._against_exchange(self.history[-1])
        self.screen.progress(
            done,
            f"test loss {test.loss:.3e} (floor {test.floor:.3e}), {self._figure(test)}",
        )

    def _note(self, done: int, test: Figures, holdout: Figures | None, ledger: Ledger) -> None:
        """Add an evaluation to the learning curve, `history.jsonl`: one line of JSON."""
        line = {
            "iteration": done,
            "exchanged": exchanged(ledger, PAPER),
            "bytes_of_each": ledger.bytes_of_each("training", PAPER),
            "test": test.summary(self._similarity),
            "holdout": None if holdout is None else holdout.named(self._similarity),
        }
        self.history.append(line)
        try:
            self._write_history()
        except OSError as error:
            self.say(
                f"csipipe: warning: {in_words(error)} Training continues; the next evaluation "
                "tries again."
            )

    def _write_history(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_file(self.folder / HISTORY, lines)

    def _against_exchange(self, line: dict[str, Any]) -> None:
        """The same evaluation, over what had been exchanged by then.

        A resumed run writes all of them again, since the first step, from which on readers discard
        what an earlier attempt wrote, is an iteration.
        """
        groups = {dashboard.KILOBYTES: "bytes", dashboard.KILOSCALARS: "scalars"}
        for group, unit in groups.items():
            step = sum(line["exchanged"][unit].values()) // 1000
            if step:
                names = [name for name in dashboard.CURVES if name in line["test"]]
                self.events.scalars({f"{group}/test_{k}": line["test"][k] for k in names}, step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` and print the closing table.

        Raises:
            OSError: it can't be written; it is named.
        """
        if summary["status"] == "finished":
            self.events.add(self._end)
        self.events.close()
        self.screen.close()
        write_file(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(closing_table(summary, self._settings, self.folder, self._training_db), flush=True)

    def _figure(self, figures: Figures) -> str:
        """The figure that matters, in words."""
        if self._similarity:
            return f"SGCS {figures.sgcs:.4f}"
        return f"NMSE {figures.nmse_db:.2f} dB"

    def say(self, line: str) -> None:
        """A line above the progress bar, or in the log."""
        self.screen.say(line)

    @property
    def seconds_total(self) -> float:
        """Wall time of the run so far, including the time before it was resumed."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def seconds_per_iteration(self) -> float:
        """Median wall time of the last 1,000 training iterations, without evaluation."""
        return statistics.median(self.seconds) if self.seconds else float("nan")
