"""Schedules as data: order, pairing of sends and receives, buffers in flight, no deadlock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from csipipe.measure.clock import Clock
from csipipe.pipeline.schedule import (
    TRAINING,
    Instruction,
    Op,
    execute,
    held,
    split_training,
    stage_attempts,
    stage_evaluation,
    ue_attempts,
    ue_decoding,
    ue_encoding,
    ue_training,
)
from csipipe.settings.config import ScheduleName

SIZES = [1, 2, 4, 7]
STAGES = [1, 2, 3, 5]
PAIRS = {Op.SEND_FORWARD: Op.RECEIVE_FORWARD, Op.SEND_BACKWARD: Op.RECEIVE_BACKWARD}

every_schedule = pytest.mark.parametrize("name", TRAINING)
every_size = pytest.mark.parametrize("size", SIZES)
every_depth = pytest.mark.parametrize("stages", STAGES)


def plans(name: ScheduleName, stages: int, size: int) -> list[list[Instruction]]:
    """Every rank's plan: the stages', then one UE rank's."""
    bts = [list(TRAINING[name](stage, stages, size)) for stage in range(stages)]
    return [*bts, list(ue_training(size))]


def micro_batches_of(plan: list[Instruction], op: Op) -> list[int | None]:
    return [i.micro_batch for i in plan if i.op is op]


@every_schedule
@every_depth
@every_size
def test_every_send_has_its_receive_in_the_same_order(
    name: ScheduleName, stages: int, size: int
) -> None:
    for plan in plans(name, stages, size):
        for send, receive in PAIRS.items():
            sent = micro_batches_of(plan, send)
            assert sent == micro_batches_of(plan, receive) == list(range(size))


@every_schedule
@every_depth
@every_size
def test_every_rank_comes_to_its_end(name: ScheduleName, stages: int, size: int) -> None:
    """Ranks run side by side, waiting for messages only: a circle of waits would stop them all."""
    assert_all_end(plans(name, stages, size))


@every_schedule
@every_depth
@every_size
def test_every_rank_agrees_on_who_takes_part(name: ScheduleName, stages: int, size: int) -> None:
    """Once before the first forward pass and once before anything is changed, in one order."""
    bts, ue = plans(name, stages, size)[:-1], ue_attempts(size)
    parts = [*(stage_attempts(plan, stage, stages) for stage, plan in enumerate(bts)), ue]
    assert_all_end([[*p.once, *p.attempt, *p.end] for p in parts])
    for plan, part in zip([*bts, list(ue_training(size))], parts, strict=True):
        agreed = [i for i in part.attempt if i.op in (Op.ROLL_CALL, Op.VERDICT)]
        assert agreed == [Instruction(Op.ROLL_CALL), Instruction(Op.VERDICT)]
        rest = [*part.once, *(i for i in part.attempt if i not in agreed), *part.end]
        assert sorted(map(str, rest)) == sorted(map(str, plan))
        ops = [i.op for i in part.attempt]
        computing = next(k for k, op in enumerate(ops) if op in (Op.FORWARD, Op.HEAD))
        assert ops.index(Op.ROLL_CALL) < computing
        assert not {Op.STEP, Op.ENCODE, Op.ENCODE_BACKWARD} & set(ops)
    first, last = parts[0].attempt, parts[-2].attempt
    assert first[:size] == [Instruction(Op.RECEIVE_FORWARD, m) for m in range(size)]
    given = last.index(Instruction(Op.VERDICT))
    assert last[given - 1] == Instruction(Op.RECEIVE_BACKWARD, size - 1)


def assert_all_end(ring: list[list[Instruction]]) -> None:
    """Stages, then one UE rank."""
    ues = len(ring) - 1  # forward goes 0 → 1 → … → UEs → 0, backward the other way
    sources = {Op.ROLL_CALL: 0, Op.VERDICT: ues - 1}
    neighbour = {Op.SEND_FORWARD: 1, Op.SEND_BACKWARD: -1}
    place = [0] * len(ring)
    arrived: set[tuple[int, Op, int | None]] = set()
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(ring):
            while place[rank] < len(plan):
                op, m = plan[place[rank]].op, plan[place[rank]].micro_batch
                awaited = op in PAIRS.values() or sources.get(op, rank) != rank
                if awaited and (rank, op, m) not in arrived:
                    break
                if sources.get(op) == rank:
                    arrived |= {(other, op, None) for other in range(ues + 1)}
                if op in PAIRS:
                    arrived.add(((rank + neighbour[op]) % (ues + 1), PAIRS[op], m))
                place[rank] += 1
                moved = True
    assert place == [len(plan) for plan in ring]


@every_schedule
@every_depth
@every_size
def test_a_stage_uses_what_it_has(name: ScheduleName, stages: int, size: int) -> None:
    chain = (
        Op.RECEIVE_FORWARD,
        Op.FORWARD,
        Op.SEND_FORWARD,
        Op.RECEIVE_BACKWARD,
        Op.BACKWARD,
        Op.SEND_BACKWARD,
        Op.WEIGHTS,
    )
    for plan in plans(name, stages, size)[:-1]:
        for m in range(size):
            places = [plan.index(Instruction(op, m)) for op in chain]
            assert places == sorted(places)
        assert plan[-1] == Instruction(Op.STEP)
        assert len(plan) == size * len(chain) + 1


@every_schedule
@every_depth
@every_size
def test_gradients_are_summed_in_ascending_order(
    name: ScheduleName, stages: int, size: int
) -> None:
    for plan in plans(name, stages, size)[:-1]:
        assert micro_batches_of(plan, Op.BACKWARD) == list(range(size))
        assert micro_batches_of(plan, Op.WEIGHTS) == list(range(size))
    assert micro_batches_of(list(ue_training(size)), Op.HEAD) == list(range(size))


Change = Callable[[list[Instruction]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop(), "the whole mini-batch has nothing; expected step"),
        (lambda plan: plan.insert(0, plan[-1]), "has step, step; expected step"),
        (lambda plan: plan.insert(0, plan.pop()), "ends with weight gradients; expected step"),
        (
            lambda plan: plan.remove(Instruction(Op.WEIGHTS, 1)),
            "micro-batch 1 of 3 has .*, send backward; expected .*, weight gradients",
        ),
        (
            lambda plan: plan.insert(0, Instruction(Op.WEIGHTS, 2)),
            "micro-batch 2 of 3 has weight gradients, receive forward.*; expected receive forward",
        ),
        (
            lambda plan: plan.insert(0, Instruction(Op.WEIGHTS, 3)),
            "micro-batch 3 of 3 has weight gradients; expected nothing",
        ),
        (
            lambda plan: plan.insert(-1, plan.pop(plan.index(Instruction(Op.WEIGHTS, 0)))),
            r"weight gradients takes micro-batches \[1, 2, 0\]; expected ascending",
        ),
    ],
)
def test_a_schedule_that_would_train_wrongly_in_silence_is_refused(
    change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(stage: int, stages: int, size: int) -> Iterator[Instruction]:
        plan = list(right(stage, stages, size))
        if stage == 1:
            change(plan)
        return iter(plan)

    right = TRAINING["1f1b"]
    monkeypatch.setitem(TRAINING, "1f1b", changed)
    with pytest.raises(ValueError, match=f"^train.schedule 1f1b, stage 1 of 2: .*{message}"):
        split_training("1f1b", 2, 1, 3, drop=False)


@every_depth
def test_micro_batches_in_flight(stages: int) -> None:
    many = 40
    for stage in range(stages):
        most = {
            name: held(schedule(stage, stages, many), Op.RECEIVE_FORWARD, Op.WEIGHTS)
            for name, schedule in TRAINING.items()
        }
        zerobubble = 2 * stages - stage + 2
        assert most == {"gpipe": many, "1f1b": stages - stage + 1, "zerobubble": zerobubble}


@every_depth
def test_an_iteration_is_shorter_than_with_all_forward_passes_first(stages: int) -> None:
    """Forward, backward and weights take one unit each, UEs and messages nothing.

    How long until the last gradient is at the UEs: 1F1B waits as often as GPipe, at other times;
    only weight gradients that wait end the iteration sooner.
    """
    many = 2 * stages + 2
    ends = {name: _until_gradients_are_back(name, stages, many) for name in TRAINING}
    assert ends["zerobubble"] <= ends["1f1b"] <= ends["gpipe"]
    if stages > 1:
        assert ends["zerobubble"] < ends["gpipe"]


def _until_gradients_are_back(name: ScheduleName, stages: int, size: int) -> int:
    cost = {Op.FORWARD: 1, Op.BACKWARD: 1, Op.WEIGHTS: 1}
    bts = plans(name, stages, size)[:-1]
    now, place = [0] * stages, [0] * stages
    # smashed data is there from the start; heads answer at once
    arrives: dict[tuple[int, Op, int | None], int] = {
        (0, Op.RECEIVE_FORWARD, m): 0 for m in range(size)
    }
    back = 0
    while place != [len(plan) for plan in bts]:
        for stage, plan in enumerate(bts):
            while place[stage] < len(plan):
                op, m = plan[place[stage]].op, plan[place[stage]].micro_batch
                if op in PAIRS.values():
                    if (stage, op, m) not in arrives:
                        break
                    now[stage] = max(now[stage], arrives[stage, op, m])
                now[stage] += cost.get(op, 0)
                if op is Op.SEND_FORWARD:
                    last = stage == stages - 1
                    goes = (stage, Op.RECEIVE_BACKWARD) if last else (stage + 1, PAIRS[op])
                    arrives[*goes, m] = now[stage]
                elif op is Op.SEND_BACKWARD and stage:
                    arrives[stage - 1, PAIRS[op], m] = now[stage]
                elif op is Op.SEND_BACKWARD:
                    back = now[stage]
                place[stage] += 1
    return back


@every_size
def test_evaluation_pairs_too_and_sends_no_gradient(size: int) -> None:
    stage = list(stage_evaluation(size))
    ue = [*ue_encoding(size), *ue_decoding(size)]
    for plan in (stage, ue):
        assert micro_batches_of(plan, Op.SEND_FORWARD) == list(range(size))
        assert micro_batches_of(plan, Op.RECEIVE_FORWARD) == list(range(size))
        assert not {Op.SEND_BACKWARD, Op.BACKWARD, Op.STEP} & {i.op for i in plan}
    assert held(stage, Op.RECEIVE_FORWARD, Op.FORWARD) == 1


@every_size
def test_the_encoder_sees_the_whole_mini_batch(size: int) -> None:
    plan = list(ue_training(size))
    assert plan[0] == Instruction(Op.ENCODE)
    assert plan[-2:] == [Instruction(Op.ENCODE_BACKWARD), Instruction(Op.STEP)]


def test_heads_send_every_gradient_before_they_turn_to_their_weights() -> None:
    plan = list(ue_training(3))
    weights = plan.index(Instruction(Op.WEIGHTS))
    assert plan.index(Instruction(Op.SEND_BACKWARD, 2)) < weights
    assert weights < plan.index(Instruction(Op.RECEIVE_BACKWARD, 0))


def test_execution_follows_the_plan_and_counts_time_by_activity() -> None:
    seen: list[tuple[str, int | None]] = []
    clock = Clock()
    execute(
        [
            Instruction(Op.RECEIVE_FORWARD, 0),
            Instruction(Op.FORWARD, 0),
            Instruction(Op.SEND_FORWARD, 0),
            Instruction(Op.STEP),
        ],
        {Op.STEP: lambda: seen.append(("step", None))},
        {
            Op.RECEIVE_FORWARD: lambda m: seen.append(("receive", m)),
            Op.FORWARD: lambda m: seen.append(("forward", m)),
            Op.SEND_FORWARD: lambda m: seen.append(("send", m)),
        },
        clock,
    )
    assert seen == [("receive", 0), ("forward", 0), ("send", 0), ("step", None)]
    clock.stop()
    assert all(seconds > 0 for seconds in clock.seconds.values())
    clock.reset()
    assert not any(clock.seconds.values())
