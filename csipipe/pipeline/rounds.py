"""What every rank does in a federated iteration, cut by UE, as data; also around CSILocal's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from csipipe.pipeline.schedule import Attempts, Instruction, Op, one_attempt


def ue_round(ues: Iterable[int], absent: bool = False) -> Iterator[Instruction]:
    """A federated iteration at the UEs of one rank.

    Args:
        absent: UEs may have been; what concerns one that is absent isn't executed.
    """
    for ue in ues:
        if absent:
            yield Instruction(Op.RECEIVE_MISSED, ue)
        yield Instruction(Op.LOCAL_STEPS, ue)
        yield Instruction(Op.SEND_UPDATE, ue)
    for ue in ues:
        yield Instruction(Op.RECEIVE_MEAN, ue)
        yield Instruction(Op.APPLY, ue)


def aggregation(ues: Sequence[int], absent: bool = False) -> Iterator[Instruction]:
    """A federated iteration at the BTS; one UE's update is held at a time; as `ue_round`."""
    for ue in ues if absent else ():
        yield Instruction(Op.SEND_MISSED, ue)
    for ue in ues:
        yield Instruction(Op.RECEIVE_UPDATE, ue)
        yield Instruction(Op.AGGREGATE, ue)
    yield Instruction(Op.SEND_MEAN)


def federated_training(
    hosted: Sequence[range], absent: bool = False
) -> list[Attempts[Instruction]]:
    """A federated iteration for every role: the aggregator, then hosts of the UEs `hosted`."""
    everyone = range(sum(map(len, hosted)))
    rounds = [ue_round(ues, absent) for ues in hosted]
    return [one_attempt(plan) for plan in (aggregation(everyone, absent), *rounds)]


def with_averaging(
    plans: Sequence[Attempts[Instruction]], stages: int, hosted: Sequence[range], absent: bool
) -> list[Attempts[Instruction]]:
    """CSILocal's iteration for every role, and around it what averages the UEs' parts.

    It is a federated iteration without local steps, with the first stage as the aggregator. Whoever
    was absent first hears what it missed, before anything else.
    """
    federated = federated_training(hosted, absent)
    idle = one_attempt([])
    rounds = [federated[0], *[idle] * (stages - 1), *federated[1:]]
    missed = (Op.SEND_MISSED, Op.RECEIVE_MISSED)
    return [
        replace(
            plan,
            before=[i for i in round_.attempt if i.op in missed],
            after=[i for i in round_.attempt if i.op not in (*missed, Op.LOCAL_STEPS)],
        )
        for plan, round_ in zip(plans, rounds, strict=True)
    ]
