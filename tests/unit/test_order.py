"""The order of a rank with two roles: no deadlock, plans kept, sends that never wait."""

from __future__ import annotations

from collections import Counter

import pytest

from csipipe.comm.topology import Topology
from csipipe.pipeline.order import Part, merge, of_rank
from csipipe.pipeline.rounds import aggregation, ue_round, with_averaging
from csipipe.pipeline.schedule import (
    TRAINING,
    Instruction,
    Op,
    held,
    split_training,
    stage_attempts,
    ue_attempts,
    ue_training,
)
from csipipe.settings.config import ScheduleName

every_schedule = pytest.mark.parametrize("name", TRAINING)
every_world = pytest.mark.parametrize(
    ("ranks", "stages"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 4), (6, 5)]
)
every_size = pytest.mark.parametrize("size", [1, 2, 4, 7])

Plans = list[list[Instruction]]


def csilocal(name: ScheduleName, topology: Topology, size: int, attempts: bool) -> Plans:
    stages = topology.stages
    plans = [list(TRAINING[name](stage, stages, size)) for stage in range(stages)]
    plans += [list(ue_training(size)) for _ in topology.ue_roles]
    if not attempts:
        return plans
    parts = [stage_attempts(plans[stage], stage, stages) for stage in range(stages)]
    parts += [ue_attempts(size) for _ in topology.ue_roles]
    return [part.attempt for part in parts]


def ordered(plans: Plans, topology: Topology) -> list[Part]:
    return merge(plans, topology.stages, [topology.rank(role) for role in range(len(plans))])


def flat(order: list[Part]) -> list[tuple[int, Instruction]]:
    return [(role, instruction) for role, part in order for instruction in part]


def assert_never_waits(order: list[Part], topology: Topology) -> None:
    """Every message was sent before its turn comes: nobody in the order waits for a later one."""
    stages = topology.stages
    sent: Counter[tuple[int, Op, int | None]] = Counter()
    hosts = list(topology.ue_roles)
    for role, (op, m) in ((r, (i.op, i.micro_batch)) for r, i in flat(order)):
        first, last = role == 0, role == stages - 1
        if op is Op.RECEIVE_FORWARD:
            before = [stages - 1] if role in hosts else hosts if first else [role - 1]
            assert all(sent[r, Op.SEND_FORWARD, m] for r in before), (role, op, m)
        elif op is Op.RECEIVE_BACKWARD:
            after = [0] if role in hosts else hosts if last else [role + 1]
            assert all(sent[r, Op.SEND_BACKWARD, m] for r in after), (role, op, m)
        elif op in (Op.ROLL_CALL, Op.VERDICT):
            decides = 0 if op is Op.ROLL_CALL else stages - 1
            assert role == decides or sent[decides, op, None]
        sent[role, op, m] += 1


@every_schedule
@every_world
@every_size
@pytest.mark.parametrize("attempts", [False, True])
def test_all_roles_come_to_their_end(
    name: ScheduleName, ranks: int, stages: int, size: int, attempts: bool
) -> None:
    topology = Topology(ranks, stages, 8, together=True)
    plans = csilocal(name, topology, size, attempts)
    order = ordered(plans, topology)
    for role, plan in enumerate(plans):
        assert [i for r, i in flat(order) if r == role] == plan
    assert_never_waits(order, topology)
    assert ordered(plans, topology) == order
    parts = [part for rank in range(ranks) for part in of_rank(order, topology.roles_of(rank))]
    assert sorted(map(str, parts)) == sorted(map(str, order))


@every_schedule
@every_world
@pytest.mark.parametrize("attempts", [False, True])
def test_no_send_waits_for_a_buffer(
    name: ScheduleName, ranks: int, stages: int, attempts: bool
) -> None:
    """What `TailStage.open` posts suffices: a stage's sends under way never fill its window."""
    size = 40
    topology = Topology(ranks, stages, 8, together=True)
    plans = csilocal(name, topology, size, attempts)
    room = [held(plan, Op.RECEIVE_FORWARD, Op.WEIGHTS) + 1 for plan in plans[:stages]]
    back = [held(plan, Op.RECEIVE_BACKWARD, Op.WEIGHTS) + 1 for plan in plans[:stages]]
    weights = [0] * stages
    for role, instruction in flat(ordered(plans, topology)):
        op, m = instruction.op, instruction.micro_batch
        if role >= stages or m is None:
            continue
        if op is Op.WEIGHTS:
            weights[role] = m + 1
        oldest = m - room[role]  # must have been taken, so that this one may be sent
        if op is Op.SEND_FORWARD and role + 1 < stages:
            assert oldest < weights[role + 1] + room[role + 1]
        if op is Op.SEND_BACKWARD and role:
            assert oldest < weights[role - 1] + back[role - 1]


@every_schedule
def test_messages_to_oneself_are_few(name: ScheduleName) -> None:
    """With one rank, what lies between its roles follows the schedule, not the mini-batch."""
    topology = Topology(1, 1, 4, together=True)
    plans = csilocal(name, topology, 40, False)
    under_way = most = 0
    for role, instruction in flat(ordered(plans, topology)):
        under_way += (role, instruction.op) in ((0, Op.SEND_FORWARD), (1, Op.SEND_BACKWARD))
        under_way -= (role, instruction.op) in ((1, Op.RECEIVE_FORWARD), (0, Op.RECEIVE_BACKWARD))
        most = max(most, under_way)
    assert most <= held(plans[0], Op.FORWARD, Op.BACKWARD)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_aggregator_holds_one_update_of_its_own_ues(ranks: int) -> None:
    topology = Topology(ranks, 1, 9, together=True)
    plans = [list(aggregation(range(9)))]
    plans += [list(ue_round(topology.ues_of(role))) for role in topology.ue_roles]
    order = ordered(plans, topology)
    here = [i.op for _, part in of_rank(order, [0, 1]) for i in part]
    under_way = [
        here[:k].count(Op.SEND_UPDATE) - min(here[:k].count(Op.RECEIVE_UPDATE), 9 // ranks)
        for k in range(len(here))
    ]
    assert max(under_way) <= 1
    assert {r: [i for role, i in flat(order) if role == r] for r in range(ranks + 1)} == dict(
        enumerate(plans)
    )


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_the_first_stage_averages_and_nobody_waits_for_another(ranks: int, stages: int) -> None:
    topology = Topology(ranks, stages, 8, together=True)
    hosted = [topology.ues_of(role) for role in topology.ue_roles]
    split = split_training("1f1b", stages, len(hosted), 4, drop=False)
    plans = with_averaging(split, stages, hosted, absent=True)
    assert [plan.attempt for plan in plans] == [plan.attempt for plan in split]
    assert not any(plan.before or plan.after for plan in plans[1:stages])
    for section in ([plan.before for plan in plans], [plan.after for plan in plans]):
        order = flat(ordered(section, topology))
        for sent, received in (
            (Op.SEND_MISSED, Op.RECEIVE_MISSED),
            (Op.SEND_UPDATE, Op.RECEIVE_UPDATE),
            (Op.SEND_MEAN, Op.RECEIVE_MEAN),
        ):
            places = {}
            for at, (_, i) in enumerate(order):
                places[i.op, i.micro_batch] = at
            for op, ue in places:
                if op is received:
                    assert places[sent, None if sent is Op.SEND_MEAN else ue] < places[op, ue]
    ops = {i.op for plan in plans for i in plan.after}
    assert Op.LOCAL_STEPS not in ops
    assert {Op.SEND_UPDATE, Op.AGGREGATE, Op.APPLY} <= ops


def test_roles_that_wait_for_each_other_are_found() -> None:
    stage, ue = list(TRAINING["1f1b"](0, 1, 2)), list(ue_training(2))
    gradient = Instruction(Op.RECEIVE_BACKWARD, 0)
    stage.remove(gradient)
    stage.insert(0, gradient)  # waits for it before it has sent anything
    with pytest.raises(AssertionError, match="wait for each other"):
        merge([stage, ue], 1, [0, 0])


def test_the_heads_of_a_rank_come_before_its_next_forward_pass() -> None:
    """Gradients return as soon as they can: whoever waits for them is the whole pipeline."""
    topology = Topology(1, 1, 4, together=True)
    ops = [i for _, i in flat(ordered(csilocal("1f1b", topology, 4, False), topology))]
    assert ops.index(Instruction(Op.HEAD, 0)) < ops.index(Instruction(Op.FORWARD, 1))
    assert ops.index(Instruction(Op.BACKWARD, 0)) < ops.index(Instruction(Op.FORWARD, 2))
