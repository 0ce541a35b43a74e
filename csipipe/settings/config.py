"""All settings of a run: its sections, what they must be to each other, and what follows from them.

A setting's name, default, unit and check are in its section (`csipipe.settings.sections`). The
defaults are the `laptop` preset; `launch/configs/` holds the presets as files. Nothing is read or
opened here. A room gets its own section of the settings, never all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from csipipe.settings import tables
from csipipe.settings.sections.comm import CodecSettings, CommSettings
from csipipe.settings.sections.data import DataSettings, Environment, Kind, Verdict
from csipipe.settings.sections.model import (
    CRNET_KERNELS,
    HeadName,
    Kernel,
    KernelsBy,
    ModelSettings,
)
from csipipe.settings.sections.run import RunSettings
from csipipe.settings.sections.topology import Placement, TopologySettings
from csipipe.settings.sections.train import (
    LossName,
    Moments,
    Precision,
    ScheduleName,
    TrainSettings,
)
from csipipe.settings.tables import CODECS, KINDS, LOSSES, METHODS, MODELS, SOURCES, MethodSpec

__all__ = [
    "CRNET_KERNELS",
    "CodecSettings",
    "CommSettings",
    "DataSettings",
    "Environment",
    "HeadName",
    "Kernel",
    "KernelsBy",
    "Kind",
    "LossName",
    "ModelSettings",
    "Moments",
    "Placement",
    "Precision",
    "RunSettings",
    "ScheduleName",
    "Settings",
    "TopologySettings",
    "TrainSettings",
    "Verdict",
    "suited",
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of one method."""

    method: str = "csilocal"
    """How it is trained."""
    model: ModelSettings = field(default_factory=ModelSettings)
    topology: TopologySettings = field(default_factory=TopologySettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        tables.check("method", self.method)
        # said in full, as it is stored and shown
        object.__setattr__(self, "data", replace(self.data, environment=self.data.where))
        if self.train.local_steps > 1 and not self.spec.local_steps:
            several = [name for name, method in METHODS.items() if method.local_steps]
            raise ValueError(
                f"train.local_steps is {self.train.local_steps}, but {self.method} exchanges after "
                f"every step; leave it at 1, or use one of {', '.join(several)}."
            )
        if self.topology.participants is not None and not self.spec.stages:
            raise ValueError(
                f"topology.participants is {self.topology.participants}, but {self.method} has the "
                "rows of all UEs in one process, and nobody takes part or doesn't; leave it out."
            )
        loss, kinds = self.train.loss, [n for n, kind in KINDS.items() if kind.similarity]
        if LOSSES[loss].similarity and self.data.kind not in (None, *kinds):
            raise ValueError(
                f"train.loss is {loss}, which needs images of data.kind {', '.join(kinds)}, but "
                f"these are of kind {self.data.kind}; use another train.loss, or convert the data."
            )
        if self.run.eval_ues is not None and not 1 <= self.run.eval_ues <= self.topology.ues:
            raise ValueError(
                f"run.eval_ues is {self.run.eval_ues}; it must lie between 1 and topology.ues "
                f"{self.topology.ues}, or be null: all of them."
            )
        if self.model.start == "pca" and self.spec.shared:
            raise ValueError(
                f"model.start is pca and method {self.method}, whose UEs average "
                f"{', '.join(self.spec.shared)}: parts that start from each UE's own components "
                "can't be averaged; use model.start random."
            )
        if self.train.average and self.spec.shared and self.participants < self.topology.ues:
            raise ValueError(
                f"train.average is {self.train.average} and topology.participants "
                f"{self.participants} of {self.topology.ues} UEs, with method {self.method}: a UE "
                "that takes no part has no mean of what all have in common; leave one of them out."
            )
        if self.model.start == "pca" and self.feedback_bits is not None:
            raise ValueError(
                "model.start is pca and comm.scale range, which scales every entry of the codeword "
                "by itself, so that the tail would not put it together again; use model.start "
                "random, or another comm.scale."
            )
        if "angle" in self.train.augmentation and self.similarity:
            raise ValueError(
                f"train.augment is {self.train.augment}, but images of data.kind {self.data.kind} "
                "have no angles that could be shifted; leave angle out."
            )
        shared = self.spec.shared
        if shared and not set(shared) - set(self.train.frozen):
            raise ValueError(
                f"train.freeze is {self.train.freeze}, which are all the parts that {self.method} "
                "exchanges; freeze fewer."
            )
        if self.train.stacked == "always" and not self.spec.pipelined:
            raise ValueError(
                f"train.stacked is always, but {self.method} has no UEs whose encoders and heads "
                "could be computed as one; leave it at auto."
            )
        last = self.run.profile_after + self.run.profile_iterations
        if self.run.profile and last > self.train.iterations:
            raise ValueError(
                f"run.profile_iterations is {self.run.profile_iterations} and run.profile_after "
                f"{self.run.profile_after}, but train.iterations {self.train.iterations}: the last "
                f"profiled iteration would be {last}; profile fewer, or train more."
            )

    def check_comm(self) -> None:
        """Refuse (ValueError) what is said of messages that the method doesn't exchange."""
        crosses, train = self.spec.crosses, self.train
        for name in ("aggregate_every", "personal_iterations"):
            if getattr(train, name) and not self.spec.aggregates:
                able = [method for method, spec in METHODS.items() if spec.aggregates]
                raise ValueError(
                    f"train.{name} is {getattr(train, name)}, but {self.method} has no iterations "
                    f"with and without an averaging; leave it out, or use {', '.join(able)}."
                )
        for kind, name in vars(self.comm.codec).items():
            if name is not None and kind not in crosses:
                what = ", ".join(crosses) or "nothing"
                raise ValueError(
                    f"comm.codec.{kind} is {name}, but {self.method} exchanges {what}; leave it "
                    "out."
                )
        if self.comm.noise and "smashed" not in crosses:
            raise ValueError(
                f"comm.noise is {self.comm.noise}, but {self.method} exchanges no smashed data; "
                "leave it out."
            )
        if self.comm.scale == "range" and self.feedback_bits is None:
            raise ValueError(
                f"comm.scale is range, but comm.codec.smashed is {self.comm.codec.smashed}; ranges "
                "are for smashed data in int8, int4 or int2. Name one of them, or use comm.scale "
                "row."
            )
        if self.comm.scale == "range" and self.spec.shared:
            raise ValueError(
                f"comm.scale is range, but {self.method} averages encoders, whose ranges are found "
                "by every UE for itself; use comm.scale row or ue."
            )
        if self.comm.error_feedback and "update" not in crosses:
            raise ValueError(
                f"comm.error_feedback is true, but {self.method} sends no updates, whose losses "
                "could be made up for by the next one; leave it out."
            )

    def on(self, ranks: int) -> Settings:
        """The same run on `ranks` processes: who is where is decided, unless it was."""
        place = self.topology
        placement = place.placement or ("together" if ranks == 1 else "apart")
        stages = self.stages
        if place.stages is None and placement == "together":
            stages = min(stages, ranks)
        decided = replace(place, placement=placement, stages=stages or None)
        return replace(self, topology=decided)

    @property
    def spec(self) -> MethodSpec:
        """What there is to know of the method."""
        return METHODS[self.method]

    @property
    def feedback_bits(self) -> int | None:
        """Bits for which every entry of the codeword is trained; None: for none."""
        name = self.comm.codec.smashed
        if name is None or self.comm.scale != "range":
            return None
        return CODECS[name].bits

    @property
    def stages(self) -> int:
        """BTS pipeline stages of this run; the unsplit model has none."""
        return self.topology.stages or self.spec.stages

    @property
    def participants(self) -> int:
        """UEs that take part in an iteration."""
        return self.topology.participants or self.topology.ues

    @property
    def aggregate_every(self) -> int:
        """Iterations between two averagings of what the UEs share."""
        return self.train.aggregate_every or self.spec.aggregates or 1

    @property
    def aggregated(self) -> int:
        """Iterations up to the last averaging; in those that follow, every UE is on its own."""
        common = self.train.iterations - self.train.personal_iterations
        return common - common % self.aggregate_every

    @property
    def similarity(self) -> bool:
        """Whether SGCS compares the columns of the images themselves."""
        return self.data.kind is not None and KINDS[self.data.kind].similarity

    @property
    def axes(self) -> tuple[str, str]:
        """What stands at an image's axes in pictures, see `SourceSpec.axes`."""
        kind = self.data.kind and KINDS[self.data.kind]
        return (kind and kind.axes) or SOURCES[self.data.source].axes

    @property
    def partition(self) -> str:
        """How this run's tail is cut into stages."""
        row = MODELS.get(self.model.name) if self.model.split is None else None
        return self.topology.partition or (row.partition if row else tables.OWN_PARTITION)

    @property
    def eval_every(self) -> int:
        """Iterations between evaluations."""
        return self.run.eval_every or max(1, self.train.iterations // 10)

    @property
    def save_every(self) -> int:
        """Iterations between checkpoints."""
        return self.run.save_every or max(1, self.train.iterations // 10)


def suited(method: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, by section, without what is said only to other methods than `method`.

    They needn't suit any single method before: a report's are for several.
    """
    spec = METHODS[method]
    comm, train, topology = (sections[name] for name in ("comm", "train", "topology"))
    kinds = [field.name for field in fields(CodecSettings)]
    split, ranged = "smashed" in spec.crosses, comm.scale == "range"
    comm = replace(
        comm,
        codec=replace(comm.codec, **dict.fromkeys(set(kinds) - set(spec.crosses))),
        error_feedback=comm.error_feedback and "update" in spec.crosses,
        noise=comm.noise if split else 0.0,
        scale="row" if ranged and (spec.shared or not split) else comm.scale,
    )
    train = replace(
        train,
        local_steps=train.local_steps if spec.local_steps else 1,
        aggregate_every=train.aggregate_every if spec.aggregates else None,
        personal_iterations=train.personal_iterations if spec.aggregates else 0,
        stacked="auto" if train.stacked == "always" and not spec.pipelined else train.stacked,
    )
    topology = replace(topology, stages=topology.stages if spec.pipelined else None)
    found = {"method": method, "comm": comm, "train": train, "topology": topology}
    return {**sections, **found}
