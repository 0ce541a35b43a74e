"""Who takes part in a benchmark: settings, processes and threads of each, as data.

A candidate is a set of processes of its own. All get the same UEs, rows, mini-batches, initial
weights and rates, and the same number of cores.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from csipipe.pipeline import schedule
from csipipe.settings.config import Placement, Settings
from csipipe.settings.tables import METHODS, MODELS, SOURCES

Layers = Literal["ours", "plain"]
LAYERS: tuple[Layers, ...] = ("ours", "plain")

SCHEDULES = {f"ours-{name}": name for name in schedule.TRAINING}
"""Candidates that are ours with another schedule."""
ABOUT = {
    "ours": "csipipe",
    "ours-unpipelined": "csipipe with one BTS stage",
    **{label: f"csipipe with train.schedule {name}" for label, name in SCHEDULES.items()},
    "ours-together": "csipipe with the UEs on the ranks of the stages",
    "ours-one-rank": "csipipe in one process: one BTS stage and all UEs",
    "deepspeed": "DeepSpeed's PipelineEngine and its 1F1B schedule, UE exchange in its loss_fn",
    "torch-gpipe": "torch.distributed.pipelining, ScheduleGPipe",
    "torch-1f1b": "torch.distributed.pipelining, Schedule1F1B",
    "one-process": "the unsplit model in one process, on the same micro-batches",
    "one-piece": "the unsplit model in one process, the whole mini-batch at once",
    "one-compiled": "one-process whose tail, of plain layers, goes through torch.compile",
}
"""Candidates by name, in the order in which they are started and shown."""
TOGETHER = ("ours-together", "ours-one-rank")
"""Candidates whose ranks have two roles."""
COMPILED = "one-compiled"
"""It needs a C++ compiler, and a minute or two before the first round."""
USUAL = tuple(name for name in ABOUT if name not in (*SCHEDULES, *TOGETHER, COMPILED))
"""Candidates by default: ours has the schedule that train.schedule names."""
PEERS = tuple(name for name in ABOUT if not name.startswith("ours") and name != COMPILED)
"""Candidates that can be given plain layers or ours."""
OTHER_NORMS = ("one-piece",)
"""Candidates whose BatchNorms see all rows at once, so that their losses rightly differ."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of those that take turns.

    Attributes:
        name: what it is, of `ABOUT`.
        settings: complete settings of its run.
        ranks: processes.
        threads: CPU threads of each.
        layers: ours, or plain: the tail as published code writes it.
        label: its name in tables.
    """

    name: str
    settings: Settings
    ranks: int
    threads: int
    layers: Layers = "ours"
    label: str

    @property
    def roles(self) -> list[str]:
        """What each of its ranks is."""
        if self.name.startswith("one-"):
            return ["process"]
        if self.name in TOGETHER:
            return [f"stage {r}, UEs" for r in range(self.ranks)]
        stages = self.settings.stages
        return [f"stage {r}" if r < stages else f"UE rank {r}" for r in range(self.ranks)]


def choose(only: str | None) -> list[str]:
    """Names from a comma-separated list, in our order; None: the usual ones.

    Raises:
        ValueError: an unknown name, or one that can't run here.
    """
    wanted = list(USUAL) if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in ABOUT:
            raise ValueError(f"--only names {name!r}; expected some of {', '.join(ABOUT)}.")
    if COMPILED in wanted and shutil.which(compiler()) is None:
        raise ValueError(
            f"--only names {COMPILED}: torch.compile needs a C++ compiler, and there is no "
            f"{compiler()} here; install one, set CXX to it, or leave {COMPILED} out."
        )
    return [name for name in ABOUT if name in wanted]


def has_plain(settings: Settings) -> bool:
    """Whether the model has a tail of PyTorch's own layers that starts from the same weights."""
    model = MODELS.get(settings.model.name)
    return model is not None and model.plain is not None and settings.model.start == "random"


def line_up(
    settings: Settings, ue_ranks: int, names: Sequence[str], layers: Sequence[Layers]
) -> list[Candidate]:
    """The candidates of one benchmark.

    Args:
        ue_ranks: processes that host the UEs.
        layers: which layers the peers get; with both, each peer takes part twice.

    Raises:
        ValueError: settings that can't be compared.
    """
    if not settings.spec.pipelined:
        pipelined = ", ".join(name for name, method in METHODS.items() if method.pipelined)
        raise ValueError(f"method is {settings.method}; the benchmark trains {pipelined}.")
    if settings.topology.participants is not None:
        raise ValueError(
            f"topology.participants is {settings.topology.participants}, but every candidate of "
            "the benchmark trains with all UEs; leave it out."
        )
    plain = "plain" in layers and bool(set(names) & set(PEERS))
    if (plain or COMPILED in names) and not has_plain(settings):
        raise ValueError(
            f"model.name is {settings.model.name} and model.start {settings.model.start}, for "
            f"which there is no tail of plain layers; leave --layers plain and {COMPILED} out."
        )
    if not 1 <= ue_ranks <= settings.topology.ues:
        raise ValueError(
            f"--ue-ranks is {ue_ranks}; it must lie between 1 and topology.ues "
            f"({settings.topology.ues})."
        )
    settings = _with_rows(settings)
    found = []
    for name in names:
        for kind in layers if name in PEERS else ("ours",):
            label = name if kind == "ours" or len(layers) == 1 else f"{name} (plain)"
            kind = "plain" if name == COMPILED else kind
            found.append(_candidate(name, settings, ue_ranks, kind, label))
    return found


def csilocal(settings: Settings, ue_ranks: int, name: str, label: str) -> Candidate:
    """Split training with `settings`, except for what the name says."""
    together = name in TOGETHER
    stages = 1 if name in ("ours-unpipelined", "ours-one-rank") else settings.topology.stages
    placement: Placement = "together" if together else "apart"
    place = replace(settings.topology, placement=placement, stages=stages)
    settings = replace(settings, topology=place)
    if name in SCHEDULES:
        settings = replace(settings, train=replace(settings.train, schedule=SCHEDULES[name]))
    ranks = settings.stages + (0 if together else ue_ranks)
    threads = settings.train.threads or max(1, cores() // ranks)
    return Candidate(name=name, settings=settings, ranks=ranks, threads=threads, label=label)


def compiler() -> str:
    """The C++ compiler that torch.compile takes."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _candidate(
    name: str, settings: Settings, ue_ranks: int, layers: Layers, label: str
) -> Candidate:
    split = replace(csilocal(settings, ue_ranks, name, label), layers=layers)
    if not name.startswith("one-"):
        return split
    if name == "one-piece":
        settings = replace(settings, train=replace(settings.train, micro_batches=1))
    threads = min(cores(), split.ranks * split.threads)  # as many cores as ours has
    return replace(split, settings=settings, ranks=1, threads=threads)


def _with_rows(settings: Settings) -> Settings:
    """Hold out no rows, and generate only as many channels as a mini-batch takes."""
    data = replace(settings.data, holdout=0.0)
    if SOURCES[data.source].train_samples is not None:
        ues = settings.topology.ues
        data = replace(
            data,
            train_samples=data.train_samples or ues * settings.train.batch_size,
            test_samples=data.test_samples or 1,
        )
    return replace(settings, data=data)
