"""Where a run starts: fresh, from a checkpoint, or not at all because it is finished.

`run.resume` auto: an unfinished run in `run.dir` resumes if its settings are this run's; never: a
directory that holds a run is an error; a path: from that checkpoint, in `run.dir`. After a restart
by torchrun, the run of the previous attempt resumes whatever was asked for; so does one that was
started from the same path, which a requeued job repeats.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from csipipe import checkpoint
from csipipe.files import DAMAGED
from csipipe.methods.roster import averages, drawn, returning
from csipipe.pipeline import settings as deepspeed
from csipipe.run import lock
from csipipe.settings import commandline
from csipipe.settings.commandline import argument
from csipipe.settings.config import Settings, TopologySettings

FREE = (
    "run.",
    "topology.placement",
    "topology.stages",
    "topology.partition",
    "topology.profile",
    "data.path",  # the rows themselves are compared
    "data.accept",
    "train.device",
    "train.threads",
    "train.schedule",
    "train.stacked",
    "train.cuda_graph",
)
"""Settings, or prefixes of them, that decide where and how fast, not what is computed."""
_SAME = "run.eval_ues"
"""Not free, whatever `FREE` says: evaluations before and after would be of different UEs."""
BEFORE: dict[str, Any] = {"data.kind": "channel"}
"""Settings whose default isn't what a run had that is older than they are."""
OF_THE_DATA = ("model.angles", "model.delays", "data.kind")
"""Settings that are the data's own where they are null."""
CONFIG = "config.yaml"
DEEPSPEED = "deepspeed"
"""Key of a checkpoint's manifest: what the file of `train.deepspeed` held; null: not used."""
_FILE = "train.deepspeed"
NO_PATH = ("auto", "never")


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        folder: the run's directory.
        checkpoint: folder of the snapshot to resume from; None: from the first iteration.
        exists: `folder` holds this run already.
        finished: that run is complete, and nothing is to be done.
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


def in_words(start: Start, settings: Settings) -> str:
    """How a run goes on that was begun before, for the user; empty: it is a new one."""
    if start.finished:
        said = f"{start.folder} holds this run, which is finished: nothing to do."
    elif start.checkpoint is not None:
        said = f"resuming after iteration {start.iteration}, from {start.checkpoint}"
    else:
        again = "the run in this directory had no checkpoint yet: it starts again"
        return again if start.exists else ""
    asked, found = settings.run.resume, start.checkpoint and start.checkpoint.resolve()
    source = None if asked in NO_PATH else Path(asked).resolve()
    if source is None or source == found or start.folder.resolve() not in source.parents:
        return said
    return (
        f"{said.removesuffix('.')}. run.resume {asked} took it back before and doesn't again, as "
        "a requeued job repeats its command; to train from there once more, choose a new run.dir."
    )


def decide(settings: Settings, folder: Path, again: bool) -> Start:
    """How the run of `settings` in `folder` begins; only reads.

    Args:
        again: torchrun restarted a run that had begun in `folder`.

    Raises:
        ValueError, OSError: a directory, checkpoint or settings that don't fit; says what to do.
    """
    asked = settings.run.resume
    held = (folder / CONFIG).is_file()
    if asked == "never" and held and not again:
        raise ValueError(
            f"run.dir: {folder} already holds a run, and run.resume is never; nothing was "
            "overwritten. Choose another run.dir, or run.resume auto to resume it."
        )
    if held and (again or asked == "auto" or _begun_from(folder) == Path(asked).resolve()):
        return _go_on(settings, folder)
    if asked in NO_PATH:
        return Start(folder)
    return _from(checkpoint.find(Path(asked)), settings, folder, held)


def written(folder: Path) -> dict[str, Any]:
    """The settings in `config.yaml` of the run in `folder`; raises ValueError."""
    file = folder / CONFIG
    try:
        return dict(yaml.safe_load(file.read_text()))
    except (OSError, *DAMAGED, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} doesn't hold the settings of a run; choose another run.dir."
        ) from error


def ended(folder: Path) -> tuple[str, int] | None:
    """Status and iterations of a run that ended; None: in progress, or interrupted.

    Raises:
        ValueError: its summary can't be read.
    """
    file = folder / "summary.json"
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text())
        return str(summary["status"]), int(summary["iterations"])
    except DAMAGED as error:
        raise ValueError(
            f"{file} can't be read ({error!r}); move it away, and the newest checkpoint is taken."
        ) from error


def source_of(theirs: dict[str, Any]) -> str | None:
    """The path in `run.resume` of a run's settings; None: it names none."""
    run = theirs.get("run")
    named = run.get("resume") if isinstance(run, dict) else None
    return None if named is None or named in NO_PATH else str(named)


def _begun_from(folder: Path) -> Path | None:
    named = source_of(written(folder))
    return Path(named).resolve() if named else None


def _from(source: Path, settings: Settings, folder: Path, held: bool) -> Start:
    """From a checkpoint that the user named."""
    if held and source.resolve().parents[1] != folder.resolve():
        raise ValueError(
            f"run.dir: {folder} holds a run, but run.resume {source} belongs to another; choose a "
            "new run.dir, or leave run.resume out to resume the run in run.dir."
        )
    if held:
        lock.check(folder)
    _check_snapshot(source, settings)
    return Start(folder, source, exists=held)


def _go_on(settings: Settings, folder: Path) -> Start:
    """From the newest checkpoint of the run in `folder`, or from where it was begun."""
    lock.check(folder)
    status, done = ended(folder) or ("", 0)
    finished = status == "finished" and done >= settings.train.iterations
    found = written(folder)
    # when a run resumes, what the file holds is compared with its checkpoint instead
    _check_settings(found, settings, str(folder), FREE if finished else (*FREE, _FILE))
    if finished:
        return Start(folder, exists=True, finished=True)
    source = checkpoint.newest(folder / "checkpoints")
    named = source_of(found)
    if source is None and named is not None:
        source = _find_again(named, folder)
    if source is not None:
        _check_snapshot(source, settings)
    return Start(folder, source, exists=True)


def _find_again(named: str, folder: Path) -> Path:
    """The checkpoint that the run in `folder`, which has none of its own, was begun from."""
    try:
        return checkpoint.find(Path(named))
    except ValueError as error:
        raise ValueError(
            f"{folder} has no checkpoint of its own and was started from run.resume {named}, which "
            f"{Path.cwd()} doesn't see any more; restore it, start in the folder that its path is "
            "relative to, or choose another run.dir."
        ) from error


def _check_snapshot(source: Path, settings: Settings) -> None:
    content = checkpoint.Snapshot(source).content
    _check_settings(content["settings"], settings, str(source), (*FREE, _FILE))
    wanted = deepspeed.of(settings) or {}
    _check_deepspeed(content[DEEPSPEED] or {}, wanted, source)
    if stage := wanted.get("zero_optimization", {}).get("stage", 0):
        _check_cut(content["settings"]["topology"], settings, stage, source)
    _check_averaging(content["settings"], settings, content["iteration"], source)
    if content["iteration"] > settings.train.iterations:
        raise ValueError(
            f"{source} is from iteration {content['iteration']}, but train.iterations is "
            f"{settings.train.iterations}; train longer, or name an earlier one in run.resume."
        )


def _check_averaging(theirs: dict[str, Any], settings: Settings, done: int, source: Path) -> None:
    """Refuse another number of iterations where UEs took part, or were averaged, by the old one."""
    iterations = theirs["train"]["iterations"]
    before = replace(settings, train=replace(settings.train, iterations=iterations))
    if not settings.spec.aggregates or before.aggregated == settings.aggregated:
        return
    for k in range(min(before.aggregated, settings.aggregated), done):
        if any(rule(before, k) != rule(settings, k) for rule in (drawn, returning, averages)):
            raise ValueError(
                f"{source} is from iteration {done} of a run with train.iterations {iterations}, "
                f"this run has {settings.train.iterations}: in iteration {k + 1}, other UEs would "
                "have taken part or been averaged, and the result would be neither of the two. "
                f"Give train.iterations {iterations}, resume from a checkpoint of iteration {k} or "
                "earlier (run.resume), or choose another run.dir."
            )


def _check_deepspeed(found: dict[str, Any], wanted: dict[str, Any], source: Path) -> None:
    """Refuse to resume with a DeepSpeed file that holds something else, whatever its name."""
    for key, before, now in commandline.differences(found, wanted):
        raise ValueError(
            f"{source} was made with {key} {argument(before)} in the file of {_FILE}, this "
            f"run has {argument(now)}: the result would be neither of the two. Give a file "
            f"with the same {key}, or choose another run.dir."
        )


def _check_cut(theirs: dict[str, Any], settings: Settings, stage: int, source: Path) -> None:
    """Refuse another cut of the tail under ZeRO, which steps a BTS stage as one vector."""
    topology = TopologySettings(stages=theirs["stages"], partition=theirs["partition"])
    before = replace(settings, topology=topology)
    cuts = {
        "stages": (before.stages, settings.stages),
        "partition": (before.partition, settings.partition),
    }
    for name, (found, wanted) in cuts.items():
        if found != wanted:
            raise ValueError(
                f"{source} was made with topology.{name} {argument(found)}, this run has "
                f"{argument(wanted)}: with ZeRO stage {stage} in the file of {_FILE}, Adam steps a "
                "BTS stage's parameters as one vector, and another cut changes the last bits. Give "
                f"the same topology.{name}, or choose another run.dir."
            )


def _check_settings(
    theirs: dict[str, Any], settings: Settings, where: str, free: tuple[str, ...]
) -> None:
    """Refuse to resume with settings, other than `free` ones, that would change the result."""
    wanted = commandline.dotted(commandline.plain(settings))
    # a setting that is newer than the run had the effect of its default
    usual = commandline.dotted(commandline.plain(Settings())) | BEFORE
    found = usual | commandline.dotted(theirs)
    constant = settings.train.lr_schedule == "constant"
    for key, before, now in commandline.differences(found, wanted):
        if (key.startswith(free) and key != _SAME) or (key == "train.iterations" and constant):
            continue
        reason = (
            "; the rates of train.lr_schedule cosine depend on it"
            if key == "train.iterations"
            else ""
        )
        raise ValueError(
            f"{where} was made with {key} {argument(before)}, this run has "
            f"{argument(now)}{reason}: the result would be neither of the two. Give the "
            f"same {key}, or choose another run.dir."
        )
