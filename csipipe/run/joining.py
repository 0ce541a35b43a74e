"""When UEs that come to a trained model (`train.init`) have caught up with those that it had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csipipe.measure.metrics import to_db
from csipipe.methods.roster import drawn
from csipipe.run import initial
from csipipe.settings.config import Settings

NEAR = 0.5
"""dB."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """When a UE that the other run didn't have was as good as those that it had, within `NEAR`."""

    ue: int
    iterations: int
    """0: not yet."""
    samples: int
    """Rows that it had drawn by then."""
    bytes: int | None
    """That it had exchanged by then, up and down; None: an earlier release, which didn't note
    them, was at work then."""


def joined(settings: Settings, history: Sequence[Mapping[str, Any]]) -> list[Joined]:
    """For each newcomer, the first evaluation at which its NMSE was near the others' mean.

    Where UEs have no part of their own, nobody joins.

    Args:
        history: a line per evaluation, as in `history.jsonl`.
    """
    try:
        source = initial.read(settings)
    except (ValueError, OSError):  # gone since the run began
        return []
    if source is None or not source.private:
        return []
    known, ues = len(source.known), settings.topology.ues
    return [_joined(settings, history, known, ue) for ue in range(known, ues)]


def _joined(
    settings: Settings, history: Sequence[Mapping[str, Any]], known: int, ue: int
) -> Joined:
    for line in history:
        linear = {row["ue"]: 10 ** (row["nmse_db"] / 10) for row in line["test"]["per_ue"]}
        others = [nmse for other, nmse in linear.items() if other < known]
        if ue not in linear or not others:  # not evaluated
            continue
        if to_db(linear[ue]) <= to_db(sum(others) / len(others)) + NEAR:
            done, train = line["iteration"], settings.train
            taken = sum(ue in drawn(settings, iteration) for iteration in range(done))
            of_each = line.get("bytes_of_each")
            return Joined(
                ue=ue,
                iterations=done,
                samples=taken * train.local_steps * train.batch_size,
                bytes=of_each and of_each[ue],
            )
    return Joined(ue=ue, iterations=0, samples=0, bytes=0)
