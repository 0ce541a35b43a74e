"""The training loop in one process: when it evaluates and saves, and what it keeps as the best."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, small
from torch.distributed import HashStore  # type: ignore[attr-defined]

from csipipe import checkpoint, methods
from csipipe.comm.world import World
from csipipe.measure.figures import Figures
from csipipe.methods.base import EvalRows
from csipipe.methods.centralised import Centralised
from csipipe.run.resuming import Start
from csipipe.run.saving import Saver, restore
from csipipe.run.training import run
from csipipe.tracking import RankTracker, Tracker

Score = tuple[int, float]
"""UEs that are left out of an evaluation on held-out rows, and the NMSE of the others, linear."""


class Scored(Centralised):
    """A worker whose held-out rows come to what is given."""

    scores: Iterator[Score]

    def evaluate(self, part: EvalRows) -> Figures:
        if part == "test":
            return super().evaluate(part)
        out, nmse = next(self.scores)
        sums = torch.tensor([[1, 1e-3, nmse, 1e-3, 0]] * 4, dtype=torch.float64)
        return Figures(sums, frozenset(range(out)))


def trained(
    folder: Path, scores: list[Score], patch: pytest.MonkeyPatch, **settings: Any
) -> list[int]:
    """After which iterations the weights were the best, in a run that goes on in its folder."""
    torch.set_num_threads(1)
    one = small("centralised", topology={"stages": None}, **settings)
    worker, world = (
        Scored(one, *methods.load(one, range(4), CPU), CPU),
        World(HashStore(), 0, 1, 0, 1),
    )
    worker.scores = iter(scores)
    source = checkpoint.newest(folder / "checkpoints")
    start = Start(folder, source, exists=source is not None)
    if source is not None:
        restore(worker, one, checkpoint.Snapshot(source))
    done, last = start.iteration, one.train.iterations
    mine = RankTracker(folder, "rank 0", worker, last, done, draws=False)
    kept: list[int] = []
    best = Saver.best

    def noted(saver: Saver, done: int) -> bool:
        kept.append(done)
        return best(saver, done)

    patch.setattr(Saver, "best", noted)
    run(worker, one, start, Tracker(folder, one, done), mine, world)
    patch.undo()
    assert next(worker.scores, None) is None, "as many evaluations as there are scores"
    return kept


def every(iterations: int) -> dict[str, Any]:
    """Settings of a run that evaluates and saves after every iteration."""
    return {
        "train": {"iterations": iterations, "lr_schedule": "constant"},
        "run": {"eval_every": 1, "save_every": 1},
    }


def test_the_best_weights_are_kept_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Score] = [(1, 0.5), (1, 0.7), (1, 0.5)]
    assert trained(tmp_path, first, monkeypatch, **every(3)) == [1]  # not the same once more
    # figures of fewer UEs are no match for those of more, better or not
    then: list[Score] = [(1, 0.6), (0, 0.9), (1, 0.1), (0, 0.9), (0, 0.8)]
    assert trained(tmp_path, then, monkeypatch, **every(8)) == [5, 8]
    assert (tmp_path / "checkpoints" / "best").is_dir()
    shutil.rmtree((tmp_path / "checkpoints" / "best").resolve())
    assert trained(tmp_path, [(2, 2.0), (2, 2.0)], monkeypatch, **every(10)) == [9]


def test_the_last_iteration_is_evaluated_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, times = {"iterations": 5}, {"eval_every": 3, "save_every": 2, "keep": 9}
    kept = trained(tmp_path, [(0, 0.5), (0, 0.4)], monkeypatch, train=train, run=times)
    assert kept == [3, 5]
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / "5"
    two, four = (checkpoint.Snapshot(newest.with_name(name)).content for name in ("2", "4"))
    assert (two["best"], two["best_without"]) == (None, None)  # JSON has no infinity
    assert (four["best"], four["best_without"]) == (pytest.approx(-3.0103, abs=1e-4), 0)
