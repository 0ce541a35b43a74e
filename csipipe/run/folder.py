"""A run's directory: its name, who has it, what is written when a run begins or resumes in it."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from csipipe import checkpoint
from csipipe.comm.world import World
from csipipe.files import write_file
from csipipe.run.lock import Lock
from csipipe.run.naming import title
from csipipe.run.resuming import CONFIG, NO_PATH, Start, source_of, written
from csipipe.settings import commandline
from csipipe.settings.config import Settings

BEGUN = "run.dir"
"""Under which a run that torchrun restarts finds its directory in the store."""


def new_folder(settings: Settings) -> Path:
    """Name of the run's directory; a new one unless it was given."""
    if settings.run.dir is not None:
        return Path(settings.run.dir)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = Path("runs") / f"{title(settings)}-{now}"
    others = (name.with_name(f"{name.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([name], others) if not folder.exists())


def claim(start: Start, settings: Settings, world: World) -> tuple[Start, Lock]:
    """Make the run's directory this run's own, and write `config.yaml` into it.

    If another run was faster to take a directory named by the clock, this one gets another.

    Raises:
        ValueError: a live run has it, or another run was faster.
        OSError: it can't be written.
    """
    while True:
        try:
            lock = _claim(start, settings)
            break
        except ValueError:
            if settings.run.dir is not None or start.exists:
                raise
            start = replace(start, folder=new_folder(settings))
    world.remembered(BEGUN, str(start.folder))
    return start, lock


def _claim(start: Start, settings: Settings) -> Lock:
    folder, lock = start.folder, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        if not start.exists:
            _write_config(folder / CONFIG, settings)
            _take_best_along(start)
    except OSError as error:
        if lock is not None:
            lock.release()
        if isinstance(error, FileExistsError):
            raise ValueError(
                f"run.dir: {folder} already holds a run, or is a file; nothing was overwritten. "
                "Choose another run.dir."
            ) from error
        raise OSError(
            f"run.dir: {folder} can't be written: {error.strerror or error}. Make room there if it "
            "is full, or choose another run.dir."
        ) from error
    if start.exists:
        reopen(start, settings)
    return lock


def _write_config(file: Path, settings: Settings) -> None:
    """Write a new `config.yaml`; half of one would belong to no run (FileExistsError, OSError)."""
    opened = open(file, "x")  # noqa: SIM115  # what isn't ours stays
    try:
        with opened:
            opened.write(commandline.to_yaml(anywhere(settings)))
    except OSError:
        file.unlink()
        raise


def anywhere(settings: Settings) -> Settings:
    """The same with absolute paths, so that they can be followed from any folder."""
    data, run = settings.data, settings.run
    if data.path is not None:
        data = replace(data, path=os.path.abspath(data.path))
    if run.resume not in NO_PATH:
        run = replace(run, resume=os.path.abspath(run.resume))
    return replace(settings, data=data, run=run)


def reopen(start: Start, settings: Settings) -> None:
    """Rewind the directory of a resumed run to the checkpoint."""
    folder = start.folder
    checkpoint.sweep(folder / "checkpoints")
    # before config.yaml is rewritten: if interrupted here, the same command does it again
    if later := checkpoint.rewind(folder / "checkpoints", start.iteration):
        print(
            f"removed checkpoint(s) {', '.join(map(str, later))} of {folder}: it resumes after "
            f"iteration {start.iteration}.",
            flush=True,
        )
    # a run that hasn't saved yet still has to start from the source that was named first
    named = source_of(written(folder))
    if settings.run.resume in NO_PATH and named is not None:
        settings = replace(settings, run=replace(settings.run, resume=named))
    write_file(folder / CONFIG, commandline.to_yaml(anywhere(settings)))
    (folder / "summary.json").unlink(missing_ok=True)


def _take_best_along(start: Start) -> None:
    """Copy the best weights so far into the directory of a run that resumes elsewhere.

    Where the other run went on and found better ones, those from before are lost.
    """
    if start.checkpoint is None:
        return
    best = start.checkpoint.parent / "best"
    taken = checkpoint.switched(best)
    if best.is_dir() and taken is not None and taken <= start.iteration:
        mine = start.folder / "checkpoints"
        partial = mine / f"{best.resolve().name}.partial"
        shutil.copytree(best, partial)
        checkpoint.switch(partial, mine / "best")
