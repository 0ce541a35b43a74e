"""What each method exchanges, from the settings alone: arithmetic, nothing is trained.

The paper's count: scalars that cross between UEs and BTS in training, over all UEs; iteration
means one exchange. BatchNorm's running statistics aren't included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from csipipe.comm import codec
from csipipe.comm.ledger import UP, Kind
from csipipe.methods.roster import returning
from csipipe.models import count_parts, widths
from csipipe.settings import tables
from csipipe.settings.config import Settings

_AVERAGED = (Kind.UPDATE, Kind.MEAN_UPDATE)
"""What crosses of the shared parts, one message each."""


def exchanged_per_iteration(settings: Settings) -> dict[str, int]:
    """Scalars `up` (UE → BTS) and `down` in one iteration, over the UEs that take part.

    Neither splitfed's averagings are among them nor what UEs receive that were absent; see
    `exchanged`.
    """
    up, down = tables.found(settings.spec.cost)(settings)
    return {"up": settings.participants * up, "down": settings.participants * down}


def bytes_per_iteration(settings: Settings) -> dict[str, int]:
    """Bytes of those scalars as the codecs write them, `up` and `down`."""
    kinds = [Kind[crossing.upper()] for crossing in settings.spec.crosses]
    now_and_then = _AVERAGED if settings.spec.aggregates else ()
    return _bytes(settings, [kind for kind in kinds if kind not in now_and_then])


def _bytes(settings: Settings, kinds: Iterable[Kind]) -> dict[str, int]:
    """Bytes of all messages of these kinds in an iteration that has them."""
    found = {"up": 0, "down": 0}
    for kind in kinds:
        messages = 1 if kind in _AVERAGED else settings.train.micro_batches
        size = messages * message_bytes(settings, kind)
        found["up" if kind in UP else "down"] += settings.participants * size
    return found


def averagings(settings: Settings) -> int:
    """How often a run averages what UEs share, besides what it exchanges in every iteration."""
    return settings.aggregated // settings.aggregate_every if settings.spec.aggregates else 0


def message_bytes(settings: Settings, kind: Kind) -> int:
    """Bytes of one UE's share of a message, its rows of a micro-batch or its update; 0: none is
    needed."""
    if not _needed(kind, settings):
        return 0
    name = codec.chosen(settings.comm, settings.train.precision)[kind.name.lower()]
    if kind not in _AVERAGED:
        c1, c2 = widths(settings.model)
        width = c1 if kind in (Kind.SMASHED, Kind.SMASHED_GRADIENT) else c2
        rows = settings.train.batch_size // settings.train.micro_batches
        smashed, shape = kind is Kind.SMASHED, (rows, width)
        one = codec.of_rows(name, settings.comm, rows, width, smashed)
    else:
        scalars, _ = shared_parts(settings)
        shape = (1, scalars)
        one = codec.of_vector(name, settings.comm, scalars)
    return math.prod(one.shape(shape)) * one.dtype.itemsize


def feedback_bits(settings: Settings) -> int:
    """Bits of one sample's codeword, as its codec writes it."""
    if settings.feedback_bits is not None:
        return settings.feedback_bits * widths(settings.model)[0]
    name, (width, _) = codec.chosen(settings.comm, settings.train.precision), widths(settings.model)
    one = codec.of_rows(name["smashed"], settings.comm, 1, width)
    return 8 * one.shape((1, width))[1] * one.dtype.itemsize


def exchanged(settings: Settings) -> dict[str, int]:
    """Scalars `up` and `down` in all of a run's iterations, over all UEs.

    A UE of a method that averages, which took no part before, first receives what it missed: as
    many scalars as it shares.
    """
    iterations, ues = settings.train.iterations, settings.participants
    shared = dict(zip(("up", "down"), shared_parts(settings), strict=True))
    found = {
        way: iterations * n + averagings(settings) * ues * shared[way]
        for way, n in exchanged_per_iteration(settings).items()
    }
    found["down"] += _missed(settings)
    return found


def bytes_exchanged(settings: Settings) -> dict[str, int]:
    """Bytes of those scalars; what was missed crosses in `train.precision`, whatever the codecs."""
    iterations, size = settings.train.iterations, {"fp32": 4, "bf16": 2}
    averaging = _bytes(settings, _AVERAGED) if averagings(settings) else {"up": 0, "down": 0}
    found = {
        way: iterations * n + averagings(settings) * averaging[way]
        for way, n in bytes_per_iteration(settings).items()
    }
    found["down"] += size[settings.train.precision] * _missed(settings)
    return found


def _missed(settings: Settings) -> int:
    """Scalars of what UEs receive that were absent."""
    if settings.participants == settings.topology.ues or not settings.spec.shared:
        return 0
    back = (len(returning(settings, k)) for k in range(settings.train.iterations))
    return sum(back) * shared_parts(settings)[1]


def _needed(kind: Kind, settings: Settings) -> bool:
    """Whether something that learns needs a message: gradients stop at what is frozen."""
    behind = {Kind.SMASHED_GRADIENT: ("encoder",), Kind.OUTPUT_GRADIENT: ("encoder", "tail")}
    return kind not in behind or any(p not in settings.train.frozen for p in behind[kind])


def split(settings: Settings) -> tuple[int, int]:
    """A UE's smashed data and gradient at its head's input; the tail's output, and z's gradient.

    Gradients cross only where something before them learns.
    """
    rows, (c1, c2) = settings.train.batch_size, widths(settings.model)
    up = c1 + _needed(Kind.OUTPUT_GRADIENT, settings) * c2
    down = c2 + _needed(Kind.SMASHED_GRADIENT, settings) * c1
    return rows * up, rows * down


def shared_parts(settings: Settings) -> tuple[int, int]:
    """The shared parts that learn, or their gradient: a UE's up, the mean of all UEs down."""
    sizes = count_parts(settings.model)
    scalars = sum(sizes[part] for part in exchanged_parts(settings))
    return scalars, scalars


def exchanged_parts(settings: Settings) -> list[str]:
    """The shared parts that learn."""
    return [part for part in settings.spec.shared if part not in settings.train.frozen]
