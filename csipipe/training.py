"""The loop that every rank runs: iterate, evaluate, choose, save."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from csipipe import commandline, handshake
from csipipe.config import Settings
from csipipe.device import keep_memory, pick_device, set_threads
from csipipe.figures import Figures
from csipipe.methods import Worker, manifest, prepare
from csipipe.tracking import Tracker, exchanged_summary
from csipipe.world import World


def launch(world: World, settings: Settings) -> None:
    """Set this rank up, meet the others, train, and part.

    Raises:
        ValueError, OSError: a mistake of the user's, before anything is trained or written.
    """
    handshake.compare_settings(world, settings)
    device = pick_device(settings.train.device, world.local_rank)
    threads = set_threads(settings.train.threads, world.local_size)
    build = prepare(settings, world.rank, world.size, device)
    dealt = manifest(settings, world.rank, world.size)
    keep_memory()  # from here on: a file that was converted is not held on to
    world.ready("data")
    world.connect(settings.run.timeout)
    worker = build(world)
    folder = Path(world.shared("run.dir", str(new_folder(settings))))
    tracker = None
    if world.rank == 0:
        claim(folder, settings)
        tracker = Tracker(folder, settings.train.iterations)
        tracker.say(
            f"{settings.method}: {settings.stages} BTS stage(s) and {settings.topology.ues} UEs on "
            f"{world.size} rank(s), {device.type}, {threads} thread(s) each; run: {folder}"
        )
        for note in worker.notes:
            tracker.say(note)
    world.ready("training")
    if dealt is not None:
        dealt.write(folder)
    run(worker, settings, folder, tracker, world.size)
    world.leave()


def new_folder(settings: Settings) -> Path:
    """Name of the run's directory."""
    if settings.run.dir is not None:
        return Path(settings.run.dir)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{settings.method}-{settings.data.environment}-{now}"


def claim(folder: Path, settings: Settings) -> None:
    """Make the run's directory and write `config.yaml` into it.

    Raises:
        ValueError: the directory holds a run already.
        OSError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x") as file:
            file.write(commandline.to_yaml(settings))
    except FileExistsError as error:
        raise ValueError(
            f"run.dir: {folder} already holds a run (or is a file); nothing was overwritten. "
            "Choose another run.dir."
        ) from error
    except OSError as error:
        raise OSError(f"run.dir: {folder} can't be written: {error.strerror}.") from error


def run(
    worker: Worker, settings: Settings, folder: Path, tracker: Tracker | None, ranks: int
) -> None:
    """Train, evaluate and save on this rank.

    Args:
        tracker: rank 0's; the other ranks have none.
        ranks: processes of the run.
    """
    started = time.monotonic()
    test = None
    best = float("inf")
    iterations = settings.train.iterations
    for iteration in range(iterations):
        before = time.monotonic()
        figures = worker.train_iteration(iteration)
        done = iteration + 1
        if tracker is not None:
            assert figures is not None
            figures.check(iteration)
            seconds = time.monotonic() - before
            tracker.iteration(done, figures, settings.train.lr_at(iteration), seconds)
        if done % settings.eval_every == 0 or done == iterations:
            test, best = _evaluate(worker, folder, tracker, done, best)
    worker.save_weights(folder / "weights")
    ledger = worker.exchanged()
    if tracker is not None:
        assert test is not None
        summary: dict[str, Any] = {
            "method": settings.method,
            "status": "finished",
            "iterations": iterations,
            "test": test.summary(),
            **exchanged_summary(ledger),
            "seconds_per_iteration": tracker.seconds_per_iteration,
            "seconds_total": time.monotonic() - started,
            "parameters": worker.parameters,
            "topology": asdict(settings.topology) | {"stages": settings.stages, "ranks": ranks},
        }
        tracker.finish(summary)


def _evaluate(
    worker: Worker, folder: Path, tracker: Tracker | None, done: int, best: float
) -> tuple[Figures | None, float]:
    """Report on the test set; keep the weights that are best on held-out training rows."""
    holdout = worker.evaluate("holdout") if worker.has_holdout else None
    test = worker.evaluate("test")
    ledger = worker.exchanged()
    if tracker is not None:
        assert test is not None
        tracker.evaluation(done, test, holdout, ledger)
    if worker.has_holdout:
        better = holdout is not None and holdout.nmse_db < best
        if worker.agree(better):
            worker.save_weights(folder / "checkpoints" / "best")
            best = holdout.nmse_db if holdout is not None else best
    return test, best
