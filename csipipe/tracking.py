"""What a run shows and writes: progress bar, TensorBoard, learning curve, closing table, summary.

Rank 0 has a `Tracker`; it is the only one that writes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from csipipe.figures import Figures
from csipipe.ledger import BUFFERS, PAPER, UP, Kind, Ledger

HISTORY = "history.jsonl"
"""The learning curve: a line per evaluation with `iteration`, `exchanged` so far (in training, over
all UEs), `test` as in `summary.json`, and `holdout` (loss, nmse_db) or null."""
BEGINNING: dict[str, Any] = {"history": [], "seconds": [], "seconds_total": 0.0}
"""`Tracker.progress` of a run that has not begun."""
_KEPT = 1000
"""Iterations whose seconds a resumed run still knows for its median."""


class Tracker:
    """Follows one run.

    Args:
        folder: the run's directory.
        iterations: iterations of the whole run.
    """

    def __init__(self, folder: Path, iterations: int) -> None:
        self.folder = folder
        self.writer = SummaryWriter(str(folder))
        self.seconds: list[float] = []
        # a log file gets the lines of `say`, not a bar that is drawn again and again
        lines = not sys.stderr.isatty()
        self._bar = tqdm(total=iterations, unit="it", disable=lines, dynamic_ncols=True)
        self._started = time.monotonic()
        self._first = 0
        self.history: list[dict[str, Any]] = []
        self._seconds_before = 0.0

    def resume(self, done: int, progress: dict[str, Any]) -> None:
        """Go on after iteration `done` with what `progress` said then, in this run's directory."""
        self.writer.close()
        # readers forget the steps from here on that the run had written before
        self.writer = SummaryWriter(str(self.folder), purge_step=done + 1)
        self.history = list(progress["history"])
        self.seconds = list(progress["seconds"])
        self._seconds_before = float(progress["seconds_total"])
        self._bar.update(done)
        self._first = done
        partial = self.folder / f"{HISTORY}.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        os.replace(partial, self.folder / HISTORY)

    def progress(self) -> dict[str, Any]:
        """What `resume` needs, as JSON has it."""
        return {
            "history": self.history,
            "seconds": self.seconds[-_KEPT:],
            "seconds_total": self.seconds_total,
        }

    def iteration(self, done: int, figures: Figures, lr: float, seconds: float) -> None:
        """Note the `done`-th iteration: figures of its batches, rate, wall time in seconds."""
        self.seconds.append(seconds)
        self.writer.add_scalar("train/loss", figures.loss, done)
        self.writer.add_scalar("train/nmse_db", figures.nmse_db, done)
        self.writer.add_scalar("train/lr", lr, done)
        self.writer.add_scalar("time/seconds_per_iteration", seconds, done)
        self._bar.set_postfix_str(
            f"loss {figures.loss:.2e}, NMSE {figures.nmse_db:.2f} dB", refresh=False
        )
        self._bar.update()

    def saved(self, done: int, seconds: float) -> None:
        """Note a checkpoint after `done` iterations that took `seconds`."""
        self.writer.add_scalar("time/seconds_per_checkpoint", seconds, done)

    def evaluation(self, done: int, test: Figures, holdout: Figures | None, ledger: Ledger) -> None:
        """Note an evaluation after `done` iterations."""
        scalars, size = ledger.total("training", PAPER)
        for name, figures in (("test", test), ("holdout", holdout)):
            if figures is not None:
                self.writer.add_scalar(f"{name}/loss", figures.loss, done)
                self.writer.add_scalar(f"{name}/nmse_db", figures.nmse_db, done)
        for ue, loss in enumerate(test.loss_per_ue):
            self.writer.add_scalar(f"test_loss_per_ue/{ue}", loss, done)
        self.writer.add_scalar("exchanged/scalars", scalars, done)
        self.writer.add_scalar("exchanged/bytes", size, done)
        self._note(done, test, holdout, ledger)
        self.say(
            f"iteration {done}/{self._bar.total}: test loss {test.loss:.3e} "
            f"(floor {test.floor:.3e}), NMSE {test.nmse_db:.2f} dB, {self._left(done)} left"
        )

    def _note(self, done: int, test: Figures, holdout: Figures | None, ledger: Ledger) -> None:
        """Add an evaluation to the learning curve, `history.jsonl`: one line of JSON."""
        line = {
            "iteration": done,
            "exchanged": _exchanged(ledger, PAPER),
            "test": test.summary(),
            "holdout": None
            if holdout is None
            else {"loss": holdout.loss, "nmse_db": holdout.nmse_db},
        }
        self.history.append(line)
        with open(self.folder / HISTORY, "a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, whole or not at all, and print the closing table."""
        self._bar.close()
        self.writer.close()
        partial = self.folder / "summary.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(partial, self.folder / "summary.json")
        print(closing_table(summary, self.folder), flush=True)

    def say(self, line: str) -> None:
        """A line above the progress bar, or in the log."""
        tqdm.write(line, file=sys.stderr)

    def _left(self, done: int) -> str:
        rate = (time.monotonic() - self._started) / max(1, done - self._first)
        return str(tqdm.format_interval(rate * (self._bar.total - done)))

    @property
    def seconds_total(self) -> float:
        """Wall time of the run so far, what it took before it was resumed included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def seconds_per_iteration(self) -> float:
        """Median wall time of a training iteration, evaluation apart."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def _exchanged(
    ledger: Ledger, kinds: tuple[Kind, ...], phase: str = "training"
) -> dict[str, dict[str, int]]:
    """`scalars` and `bytes`, each `up` and `down`, over all UEs."""
    up = ledger.total(phase, [kind for kind in kinds if kind in UP])
    down = ledger.total(phase, [kind for kind in kinds if kind not in UP])
    return {
        "scalars": {"up": up[0], "down": down[0]},
        "bytes": {"up": up[1], "down": down[1]},
    }


def exchanged_summary(ledger: Ledger) -> dict[str, dict[str, dict[str, int]]]:
    """Entries of `summary.json`: the paper's count, BatchNorm's statistics, evaluation."""
    return {
        "exchanged": _exchanged(ledger, PAPER),
        "exchanged_buffers": _exchanged(ledger, BUFFERS),
        "exchanged_evaluation": _exchanged(ledger, PAPER, "evaluation"),
    }


def test_table(test: dict[str, Any]) -> str:
    """Loss and NMSE on a test set, per UE and mean, with the floor (of `Figures.summary`)."""
    rows = [(f"UE {row['ue']}", row["loss"], row["nmse_db"]) for row in test["per_ue"]]
    rows += [("mean", test["loss"], test["nmse_db"]), ("0.5", test["floor_loss"], 0.0)]
    head = f"{'test set':>10}  {'loss':>10}  {'NMSE (dB)':>10}\n"
    lines = (f"{name:>10}  {loss:>10.3e}  {nmse_db:>10.2f}" for name, loss, nmse_db in rows)
    return head + "\n".join(lines) + "   a constant 0.5: the floor"


def closing_table(summary: dict[str, Any], folder: Path) -> str:
    """What a finished run prints."""
    crossed = summary["exchanged"]
    lines = ["", test_table(summary["test"])] if summary["test"] else []
    lines += ["", f"{'exchanged':>10}  {'scalars':>14}  {'bytes':>14}   in training, all UEs"]
    for direction, meaning in (("up", "UE → BTS"), ("down", "BTS → UE")):
        lines.append(
            f"{direction:>10}  {crossed['scalars'][direction]:>14,}  "
            f"{crossed['bytes'][direction]:>14,}   {meaning}"
        )
    apart = summary["exchanged_buffers"]
    if any(apart["scalars"].values()):
        scalars, size = (sum(apart[unit].values()) for unit in ("scalars", "bytes"))
        lines.append(f"{'apart':>10}  {scalars:>14,}  {size:>14,}   BatchNorm's, both ways")
    dropped = [f"UE {ue}: {times}" for ue, times in enumerate(summary["dropped"]) if times]
    if dropped:
        lines.append(f"{'left out':>10}  {', '.join(dropped)} iteration(s), being bad")
    stopped = []
    if summary["status"] == "stopped":
        stopped = [f"stopped:      the same command with --run.dir {folder} goes on"]
    lines += [
        "",
        f"{summary['iterations']} iterations, {summary['seconds_per_iteration']:.3f} s per "
        "iteration (median), "
        f"{summary['seconds_total']:.0f} s in all",
        *stopped,
        f"run:          {folder}",
        f"look at it:   tensorboard --logdir {folder}",
    ]
    return "\n".join(lines)
