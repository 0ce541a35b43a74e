"""The order in which a rank with two roles executes their plans: a pure function, no processes.

All ranks compute one order of all instructions of all roles, in which each instruction has what it
needs when its turn comes, and every rank executes its part of it. So the first instruction that
isn't done yet never waits, and ranks can't wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from csipipe.pipeline.schedule import Instruction, Op

_SENT_BY = {
    Op.RECEIVE_FORWARD: Op.SEND_FORWARD,
    Op.RECEIVE_BACKWARD: Op.SEND_BACKWARD,
    Op.RECEIVE_MISSED: Op.SEND_MISSED,
    Op.RECEIVE_UPDATE: Op.SEND_UPDATE,
    Op.RECEIVE_MEAN: Op.SEND_MEAN,
}
_SENDS = frozenset(_SENT_BY.values())
_URGENT = (
    Op.BACKWARD,
    Op.AGGREGATE,
    Op.SEND_MEAN,
    Op.HEAD,
    Op.FORWARD,
    Op.ENCODE,
    Op.ROLL_CALL,
    Op.VERDICT,
    Op.APPLY,
    Op.LOCAL_STEPS,
    Op.ENCODE_BACKWARD,
    Op.WEIGHTS,
    Op.STEP,
)
"""Of two roles, the one whose next work comes first here is next: others wait for it the most."""

Part = tuple[int, list[Instruction]]
"""A role, and some of its instructions."""


def merge(plans: Sequence[Sequence[Instruction]], stages: int, hosts: Sequence[int]) -> list[Part]:
    """One order of the instructions of all roles: stages 0 … S-1, then hosts of UEs.

    In rounds: each rank takes the next piece of work, with its transfers, of one of its roles;
    what is sent in a round has arrived in the next.

    Args:
        plans: of each role.
        hosts: the rank of each role.
    """
    ranks = sorted(set(hosts))
    place, done = [0] * len(plans), set[tuple[int, Instruction]]()
    every = [set(plan) for plan in plans]
    order: list[Part] = []

    def ready(role: int, at: int) -> bool:
        needed = _needs(role, plans[role][at], stages, len(plans))
        return all(n in done or n[1] not in every[n[0]] for n in needed)

    def piece(role: int) -> list[Instruction]:
        """Instructions up to a piece of work that `role` can do now, and the sends after it."""
        start = end = place[role]
        worked = False
        while end < len(plans[role]) and ready(role, end):
            op = plans[role][end].op
            if worked and op not in _SENDS:
                break
            worked = worked or op in _URGENT
            end += 1
        return list(plans[role][start:end])

    while any(at < len(plan) for at, plan in zip(place, plans, strict=True)):
        before = len(order)
        for rank in ranks:
            pieces = [(role, piece(role)) for role, host in enumerate(hosts) if host == rank]
            able = [part for part in pieces if part[1]]
            if able:
                order.append(min(able, key=_urgency))
        assert len(order) > before, f"the roles wait for each other, at {place} of their plans"
        for role, part in order[before:]:
            place[role] += len(part)
            done.update((role, instruction) for instruction in part)
    return order


def of_rank(order: Sequence[Part], roles: Sequence[int]) -> list[Part]:
    """What a rank with `roles` executes."""
    return [part for part in order if part[0] in roles]


def _urgency(part: Part) -> int:
    """The smaller, the sooner; a piece without work only transfers, and nobody waits longer."""
    work = (_URGENT.index(i.op) for i in part[1] if i.op in _URGENT)
    return next(work, -1)


def _needs(
    role: int, instruction: Instruction, stages: int, roles: int
) -> list[tuple[int, Instruction]]:
    """What must be done before: by whom, where its plan has it."""
    op = instruction.op
    ring = [[stage] for stage in range(stages)] + [list(range(stages, roles))]
    at = min(role, stages)  # hosts of UEs are next to the first stage and to the last
    if op in _SENT_BY:
        neighbours = ring[(at + (1 if op is Op.RECEIVE_BACKWARD else -1)) % len(ring)]
        if op in (Op.RECEIVE_MISSED, Op.RECEIVE_MEAN):
            neighbours = ring[0]  # it aggregates
        sent = Instruction(_SENT_BY[op], None if op is Op.RECEIVE_MEAN else instruction.micro_batch)
        return [(neighbour, sent) for neighbour in neighbours]
    if op in (Op.ROLL_CALL, Op.VERDICT):
        decides = 0 if op is Op.ROLL_CALL else stages - 1
        return [] if role == decides else [(decides, instruction)]
    return []
