"""Where a run starts: fresh, from a checkpoint, or not at all because it is finished.

`run.resume` auto: an unfinished run in `run.dir` goes on if its settings are this run's; never: a
directory that holds a run is an error; a path: from that checkpoint, in `run.dir`. After a restart
by torchrun, the run of the attempt before goes on whatever was asked.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from csipipe import checkpoint, commandline, lock
from csipipe.config import Settings

FREE = (
    "run.",
    "topology.stages",
    "topology.partition",
    "topology.profile",
    "data.path",  # the rows themselves are compared
    "train.device",
    "train.threads",
    "train.schedule",
)
"""Settings, or beginnings of them, that decide where and how fast, not what is computed."""
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        folder: the run's directory.
        checkpoint: folder of the snapshot to go on from; None: from the first iteration.
        exists: `folder` holds this run already.
        finished: it holds it to the end, and nothing is to be done.
    """

    folder: Path
    checkpoint: Path | None = None
    exists: bool = False
    finished: bool = False

    def to_text(self) -> str:
        """For the other ranks."""
        return json.dumps(
            {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        )

    @classmethod
    def from_text(cls, text: str) -> Start:
        """What `to_text` said."""
        said = json.loads(text)
        for name in ("folder", "checkpoint"):
            said[name] = None if said[name] is None else Path(said[name])
        return cls(**said)

    @property
    def iteration(self) -> int:
        """Iterations that are done already."""
        return int(self.checkpoint.name) if self.checkpoint else 0


def decide(settings: Settings, folder: Path, again: bool) -> Start:
    """How the run of `settings` in `folder` begins; only reads.

    Args:
        again: torchrun restarted a run that had begun in `folder`.

    Raises:
        ValueError, OSError: a directory, checkpoint or settings that don't fit; says what to do.
    """
    resume = "auto" if again else settings.run.resume
    held = (folder / CONFIG).is_file()
    if resume == "never":
        if held:
            raise ValueError(
                f"run.dir: {folder} already holds a run, and run.resume is never; nothing was "
                "overwritten. Choose another run.dir, or run.resume auto to go on."
            )
        return Start(folder)
    if resume != "auto":
        return _from(checkpoint.find(Path(resume)), settings, folder, held)
    if not held:
        return Start(folder)
    return _go_on(settings, folder)


def _from(source: Path, settings: Settings, folder: Path, held: bool) -> Start:
    """From a checkpoint that a person named."""
    if held and source.resolve().parents[1] != folder.resolve():
        raise ValueError(
            f"run.dir: {folder} holds another run than run.resume {source}; choose a new run.dir, "
            "or leave run.resume out to go on with the run in run.dir."
        )
    if held:
        lock.check(folder)
    _check_snapshot(source, settings)
    return Start(folder, source, exists=held)


def _go_on(settings: Settings, folder: Path) -> Start:
    """From the newest checkpoint of the run in `folder`."""
    lock.check(folder)
    done = _finished(folder)
    file = folder / CONFIG
    try:
        found = dict(yaml.safe_load(file.read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} isn't the settings of a run; choose another run.dir.") from error
    _check_settings(found, settings, str(folder))
    if done is not None and done >= settings.train.iterations:
        return Start(folder, exists=True, finished=True)
    source = checkpoint.newest(folder / "checkpoints")
    if source is not None:
        _check_snapshot(source, settings)
    return Start(folder, source, exists=True)


def _finished(folder: Path) -> int | None:
    """Iterations of a finished run; None: it isn't finished."""
    file = folder / "summary.json"
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text())
        return int(summary["iterations"]) if summary["status"] == "finished" else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} can't be read ({error!r}); delete it to go on from the newest checkpoint."
        ) from error


def _check_snapshot(source: Path, settings: Settings) -> None:
    content = checkpoint.Snapshot(source).content
    _check_settings(content["settings"], settings, str(source))
    if content["iteration"] > settings.train.iterations:
        raise ValueError(
            f"{source} is of iteration {content['iteration']}, but train.iterations is "
            f"{settings.train.iterations}; ask for more, or name an earlier one in run.resume."
        )


def _check_settings(theirs: dict[str, Any], settings: Settings, where: str) -> None:
    """Refuse to go on with settings that would change the result."""
    wanted = commandline.dotted(commandline.plain(settings))
    # a setting younger than the run had its default's effect
    found = commandline.dotted(commandline.plain(Settings())) | commandline.dotted(theirs)
    constant = settings.train.lr_schedule == "constant"
    for key in [*wanted, *(set(found) - set(wanted))]:
        if key.startswith(FREE) or found.get(key) == wanted.get(key):
            continue
        if key == "train.iterations" and constant:
            continue
        reason = (
            "; the rates of train.lr_schedule cosine depend on it"
            if key == "train.iterations"
            else ""
        )
        raise ValueError(
            f"{where} was made with {key} {found.get(key)!r}, this run has {wanted.get(key)!r}"
            f"{reason}: going on would be neither of the two. Give the same {key}, or choose "
            "another run.dir."
        )
