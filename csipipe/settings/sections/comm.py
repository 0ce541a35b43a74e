"""What crosses between UEs and BTS."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from csipipe.settings.tables import CODECS


@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """How each kind of message is written: fp32, bf16, int8, int4, int2 or topk."""

    smashed: str | None = None
    """Smashed data, UE to BTS: fp32, bf16, int8, int4, int2 (levels of that many bits) or topk (the
    largest, with their places). null, here and below: as train.precision says."""
    output: str | None = None
    """The tail's output, BTS to UE."""
    output_gradient: str | None = None
    """The gradient at the head's input, UE to BTS."""
    smashed_gradient: str | None = None
    """The gradient at the encoder's output, BTS to UE."""
    update: str | None = None
    """Federated methods and splitfed: the change of the shared parts or their gradient, UE to
    BTS."""
    mean_update: str | None = None
    """Federated methods and splitfed: the mean of the UEs' updates, BTS to UE."""

    def __post_init__(self) -> None:
        for kind, name in vars(self).items():
            if name is not None and name not in CODECS:
                raise ValueError(
                    f"comm.codec.{kind} is {name!r}; it must be one of {', '.join(CODECS)}."
                )


@dataclass(frozen=True, kw_only=True)
class CommSettings:
    """What crosses between UEs and BTS: as how many bytes, and how it is rounded."""

    codec: CodecSettings = field(default_factory=CodecSettings)
    """How each kind of message is written."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How int8, int4 and int2 round in training. stochastic: up or down at random, right in the
    mean; drawn by train.seed, kind, iteration and UE."""
    scale: Literal["row", "ue", "range"] = "row"
    """What has a scale, of 4 bytes, in common (int8, int4, int2). row: a row of a micro-batch; 256
    scalars of an update. ue: all that a UE sends or receives in a message. range: as row, but every
    entry of the smashed data has a range that is fixed in the first iteration, and the encoder is
    trained for it."""
    topk: float = 0.05
    """Share of the scalars of a row, or of an update, that topk sends."""
    noise: float = 0.0
    """Gaussian noise that a UE adds to its smashed data, in training and evaluations: standard
    deviation over the root mean square of what it sends in a message."""
    error_feedback: bool = False
    """Federated methods and splitfed: what an update loses at its codec is added to the next one,
    at the UEs and at the BTS."""

    def __post_init__(self) -> None:
        if not 0 < self.topk <= 1:
            raise ValueError(f"comm.topk is {self.topk}; it must lie in (0, 1].")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"comm.noise is {self.noise}; it must be finite and at least 0.")
