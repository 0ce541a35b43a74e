"""The loop that every rank runs: iterate, evaluate, keep the best weights, save, stop."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from csipipe import checkpoint
from csipipe.channels import Manifest
from csipipe.comm.world import World
from csipipe.device import (
    keep_memory,
    memory_explained,
    pick_device,
    precision_notes,
    set_arithmetic,
    set_threads,
    thread_notes,
)
from csipipe.measure.figures import WORST
from csipipe.methods import Worker, manifest, memory, prepare
from csipipe.methods.roster import evaluated
from csipipe.methods.state import ue_name
from csipipe.run import handshake, initial, summary
from csipipe.run.folder import BEGUN, claim, new_folder
from csipipe.run.resuming import Start, decide, in_words
from csipipe.run.saving import Saver, restore
from csipipe.run.stopping import Stopping
from csipipe.settings.config import Settings
from csipipe.tracking import BEGINNING, RankTracker, Tracker

KEPT = 1e-4
"""Adam's rate at which a start by PCA was kept, see docs/models.md."""


def launch(world: World, settings: Settings) -> None:
    """Set this rank up, meet the others, train, and part.

    Raises:
        ValueError, OSError: a mistake of the user's, before anything is trained or written.
        OSError: a GPU's memory is full.
    """
    settings = _absolute(settings.on(world.size))
    world.silence = settings.run.timeout
    world.attend()
    with memory_explained(settings, world.local_size):
        _launch(world, settings)


def _absolute(settings: Settings) -> Settings:
    """The same with a path that names the same weights in any folder, and after a resume."""
    train = settings.train
    if train.init is None:
        return settings
    return replace(settings, train=replace(train, init=os.path.abspath(train.init)))


def _launch(world: World, settings: Settings) -> None:
    handshake.compare_settings(world, settings)
    settings = handshake.agree_on_images(world, settings)
    start = _begin(world, settings)
    if start.finished:
        if world.rank == 0:
            print(in_words(start, settings), flush=True)
        return
    begun = None if start.checkpoint else initial.read(settings)
    device = pick_device(settings.train.device, world.local_rank)
    set_arithmetic(settings.train.tf32)
    threads = set_threads(settings.train.threads, world.local_size)
    build = prepare(settings, world.rank, world.size, device)
    dealt = manifest(settings, world.rank, world.size)
    keep_memory()  # only now, so that memory used for converting a file is not kept
    world.ready("data")
    world.connect(settings.run.timeout)
    worker = build(world)
    if start.checkpoint is not None:
        restore(worker, settings, checkpoint.Snapshot(start.checkpoint))
        if dealt is not None:
            _same_rows(dealt, start.checkpoint.parents[1])
    elif begun is not None:
        begun.give(worker)
    world.ready("state")
    tracker = held = None
    if world.rank == 0:
        start, held = claim(start, settings, world)
        tracker = Tracker(start.folder, settings, start.iteration)
        _introduce(tracker, settings, start, world, f"{device.type}, {threads} thread(s) each")
        for note in (
            *([] if begun is None else [begun.note]),
            *worker.notes,
            *precision_notes(settings.train.precision, device),
            *start_notes(settings),
            *thread_notes(world.local_size),
        ):
            tracker.say(note)
    start = replace(start, folder=Path(world.shared("folder", str(start.folder))))
    world.ready("training")
    if dealt is not None:
        dealt.write(start.folder)
    mine = RankTracker(
        start.folder,
        world.role(world.rank),
        worker,
        settings.train.iterations,
        start.iteration,
        draws=ue_name(worker.probe.ue) in worker.units(),
        axes=settings.axes,
    )
    run(worker, settings, start, tracker, mine, world)
    world.leave()
    if held is not None:
        held.release()


def _begin(world: World, settings: Settings) -> Start:
    """How this run begins, decided by rank 0 and the same on every rank."""
    mine = ""
    if world.rank == 0:
        begun = world.remembered(BEGUN, "")
        folder = Path(begun) if begun else new_folder(settings)
        mine = decide(settings, folder, again=begun != "").to_text()
    return Start.from_text(world.shared("start", mine))


def _introduce(
    tracker: Tracker, settings: Settings, start: Start, world: World, where: str
) -> None:
    tracker.say(
        f"{settings.method}: {settings.stages} BTS stage(s) and {settings.topology.ues} UEs on "
        f"{world.size} rank(s), {where}; run: {start.folder}"
    )
    if settings.topology.placement == "together" and settings.stages:
        tracker.say("together: " + "; ".join(map(world.role, range(world.size))))
    if settings.stages:
        tracker.say(memory.note(settings))
    if settings.run.eval_ues is not None:
        chosen = evaluated(settings)
        tracker.say(
            f"evaluations are over {len(chosen)} of the {settings.topology.ues} UEs, drawn by "
            f"train.seed: {', '.join(map(str, chosen))}"
        )
    if begun := in_words(start, settings):
        tracker.say(begun)


def start_notes(settings: Settings) -> list[str]:
    """What becomes of a start that isn't random."""
    if settings.model.start == "random" or settings.train.lr <= KEPT:
        return []
    return [
        f"model.start is {settings.model.start} and train.lr {settings.train.lr:g}: such steps "
        f"lose at first what it starts with; {KEPT:g} kept it where it was tried"
    ]


def _same_rows(dealt: Manifest, before: Path) -> None:
    """Refuse (ValueError) to resume with other rows than the run in `before` trained on."""
    if (before / "manifest.json").is_file() and Manifest.read(before) != dealt:
        raise ValueError(
            f"the rows that data.* selects now aren't those that {before / 'manifest.json'} lists; "
            "use the same files, seed and version of csipipe, or choose another run.dir."
        )


def run(
    worker: Worker,
    settings: Settings,
    start: Start,
    tracker: Tracker | None,
    mine: RankTracker,
    world: World,
) -> None:
    """Train, evaluate and save on this rank until the end, or until the run is asked to stop.

    Args:
        tracker: rank 0's, of the whole run; the other ranks have none.
        mine: of this rank.
    """
    best = WORST if tracker is None else _resume(tracker, start)
    saver = Saver(worker, settings, start.folder, world)
    iterations, done = settings.train.iterations, start.iteration
    with Stopping(world, start.folder) as stopping:
        step, profile = worker.train_iteration, None
        if settings.run.profile:
            from csipipe.profiling import Profile

            profile = Profile(
                worker, settings, start.folder, done, world, tracker, stopping.unhurried
            )
            step = profile.train_iteration
        stop = False
        while done < iterations and not stop:
            before = time.monotonic()
            mine.before(done + 1)
            seen = stopping.ends(done + 1) or _evaluates(settings, done + 1)
            seen = seen or _saves(settings, done + 1) or mine.shows(done + 2)
            worker.probe.unseen = not seen
            figures = step(done)
            done += 1
            mine.after(done)
            if tracker is not None:
                assert figures is not None
                figures.check(done - 1)
                seconds = time.monotonic() - before
                tracker.iteration(done, figures, settings.train.lr_at(done - 1), seconds)
            stop = stopping.after(done)
            last = stop or done == iterations
            with stopping.unhurried():
                if _evaluates(settings, done):
                    best = _evaluate(worker, settings, saver, tracker, mine, done, best)
                if saver.due(done, at_once=last):
                    _settle(saver, tracker, done)
                if last or _saves(settings, done):
                    _save(worker, saver, tracker, done, best)
                if last:
                    error = _settle(saver, tracker, done)
                    if error is not None and done < iterations:
                        raise error
        if profile is not None:
            profile.close()
        mine.close()
        with stopping.unhurried():
            worker.save_weights(start.folder / "weights")
            pca = summary.pca(settings, world) if done == iterations else None
        ledger = worker.exchanged()
        if tracker is not None:
            tracker.finish(
                summary.content(worker, settings, tracker, ledger, done, world.size, pca)
            )
            stopping.answered()


def _resume(tracker: Tracker, start: Start) -> tuple[float, float]:
    """Have rank 0 go on where the run was; returns the score of its best weights so far."""
    if start.checkpoint is None:
        if start.exists:
            tracker.resume(BEGINNING)
        return WORST
    content = checkpoint.Snapshot(start.checkpoint).content
    tracker.resume(content)
    if content["best"] is None or not (start.folder / "checkpoints" / "best").exists():
        return WORST
    return content.get("best_without", 0), content["best"]  # none in older runs


def _evaluates(settings: Settings, done: int) -> bool:
    """Whether an evaluation follows the `done`-th iteration."""
    return done % settings.eval_every == 0 or done == settings.train.iterations


def _saves(settings: Settings, done: int) -> bool:
    """Whether a checkpoint follows it, also where the run goes on."""
    return done % settings.save_every == 0


def _save(
    worker: Worker, saver: Saver, tracker: Tracker | None, done: int, best: tuple[float, float]
) -> None:
    """Begin a checkpoint."""
    without, score = (None, None) if best == WORST else best
    progress: dict[str, Any] = {"best": score, "best_without": without}
    if tracker is not None:
        progress |= tracker.progress()
    saver.begin(done, worker.exchanged(), progress)


def _settle(saver: Saver, tracker: Tracker | None, done: int) -> OSError | None:
    """Complete the checkpoint that was begun; returns why that failed, if it did."""
    error = saver.settle()
    if tracker is not None:
        tracker.saved(done, saver.seconds)
    return error


def _evaluate(
    worker: Worker,
    settings: Settings,
    saver: Saver,
    tracker: Tracker | None,
    mine: RankTracker,
    done: int,
    best: tuple[float, float],
) -> tuple[float, float]:
    """Report on the test set; keep the weights that are best on held-out training rows."""
    holdout = worker.evaluate("holdout") if worker.has_holdout else None
    mine.before_test(done)
    test = worker.evaluate("test")
    mine.after_test(done)
    ledger = worker.exchanged()
    if tracker is not None:
        assert test is not None
        tracker.evaluation(done, test, holdout, ledger)
    if worker.has_holdout:
        score = best if holdout is None else holdout.score(settings.similarity)
        if worker.agree(score < best) and saver.best(done):
            best = score
    return best
