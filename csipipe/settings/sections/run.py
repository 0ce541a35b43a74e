"""Where a run is stored, and how it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from csipipe.settings.sections.checks import at_least

_SHORTEST = 3.0
"""Seconds: signs of life come every second and are looked for as often, so that one that has just
been missed is seen two seconds later."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run is stored, how often it evaluates, how long it waits for a peer."""

    dir: str | None = None
    """Directory of the run, seen by all nodes. null: runs/<method>-<environment>-<time>, with
    the model behind the method where it isn't csilocal."""
    resume: str = "auto"
    """auto: an unfinished run in run.dir resumes from its newest checkpoint if the settings are the
    same; a finished one is left alone. never: run.dir must not hold a run. Otherwise a path: a
    run's directory, or one of its checkpoints/<iteration>, to resume from in run.dir."""
    save_every: int | None = None
    """Iterations between checkpoints; the last iteration always saves. null: a tenth of the run."""
    keep: int = 2
    """How many of the newest checkpoints are kept; the best weights are kept separately."""
    eval_every: int | None = None
    """Iterations between evaluations; the last one always evaluates. null: a tenth of the run."""
    eval_ues: int | None = None
    """UEs that evaluations are over, drawn by train.seed, the same throughout the run: what is
    shown, and the choice of the best weights. null: all."""
    timeout: float = 60.0
    """Longest wait for a peer inside an iteration, in seconds, on every process group; at least
    3."""
    profile: bool = False
    """Record some iterations on every rank: traces for TensorBoard and Perfetto in profile/, and a
    picture of the pipeline, timeline.png."""
    profile_after: int = 5
    """Iterations before the first profiled one, at least 2: one to learn how large traces get, one
    for the ranks to resynchronise."""
    profile_iterations: int = 3
    """Number of consecutive iterations to profile."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every"):
            at_least(f"run.{name}", getattr(self, name), 1)
        at_least("run.keep", self.keep, 1)
        at_least("run.profile_after", self.profile_after, 2)
        at_least("run.profile_iterations", self.profile_iterations, 1)
        if not self.resume:
            raise ValueError("run.resume is empty; it must be auto, never or a path.")
        if not _SHORTEST <= self.timeout < math.inf:
            raise ValueError(
                f"run.timeout is {self.timeout}; it must be finite, and at least {_SHORTEST:g} "
                "seconds: a rank that is alive says so every second."
            )
