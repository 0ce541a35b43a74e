"""What every rank does in one iteration, as data: no processes, no tensors.

The UEs are the two ends of one pipeline: encoder → tail stages → head, and back. A
schedule is the list of instructions of one rank; `execute` runs it. Every send has its receive on
the neighbour, in the same order: `tests/unit/test_schedule.py` pairs them. Lists of the federated
methods, which are cut by UE, are in `csipipe.pipeline.rounds`.

A backward pass is split in two: BACKWARD computes the gradient at a stage's input, for which the
previous rank waits; WEIGHTS computes the gradients of the weights, for which nobody waits. In every
schedule both take the micro-batches in ascending order, so that gradients are summed in one order
and results don't depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from csipipe.measure.clock import Clock
from csipipe.settings.config import ScheduleName


class Op(Enum):
    """One step of a rank; the comment names its counterpart on a neighbour."""

    RECEIVE_FORWARD = "receive forward"  # the SEND_FORWARD of the rank before
    FORWARD = "forward"
    SEND_FORWARD = "send forward"  # RECEIVE_FORWARD of the rank after
    RECEIVE_BACKWARD = "receive backward"  # the SEND_BACKWARD of the rank after
    BACKWARD = "backward"
    SEND_BACKWARD = "send backward"  # RECEIVE_BACKWARD of the rank before
    WEIGHTS = "weight gradients"  # on a UE rank: the heads', of the whole mini-batch
    ENCODE = "encode"  # UE: encoder's forward pass, whole mini-batch
    HEAD = "head"  # UE: head, loss, and the gradient at the head's input
    ENCODE_BACKWARD = "encode backward"  # UE: encoder's backward pass, whole mini-batch
    ROLL_CALL = "roll call"  # who takes part: once all smashed data have arrived
    VERDICT = "verdict"  # whether that holds: once all gradients have arrived
    STEP = "step"  # optimiser
    # federated methods, and csilocal with averaging, on one UE each
    SEND_MISSED = "send what was missed to UE"  # RECEIVE_MISSED of the UE
    RECEIVE_MISSED = "wait for what was missed, UE"
    LOCAL_STEPS = "local step of UE"  # UE: its own training
    SEND_UPDATE = "upload of UE"  # RECEIVE_UPDATE of the aggregator
    RECEIVE_UPDATE = "wait for UE"
    AGGREGATE = "aggregate UE"
    SEND_MEAN = "send the mean"  # to all UEs; RECEIVE_MEAN of each
    RECEIVE_MEAN = "wait for the mean, UE"
    APPLY = "apply the mean at UE"


@dataclass(frozen=True)
class Instruction:
    """An operation on one micro-batch, or on the whole mini-batch where that is None.

    Federated methods cut an iteration by UE instead: `micro_batch` is the UE's number.
    """

    op: Op
    micro_batch: int | None = None


OF_A_MICRO_BATCH = [
    Op.RECEIVE_FORWARD,
    Op.FORWARD,
    Op.SEND_FORWARD,
    Op.RECEIVE_BACKWARD,
    Op.BACKWARD,
    Op.SEND_BACKWARD,
    Op.WEIGHTS,
]
"""What a BTS stage does with every micro-batch in training, in this order."""

Plan = Iterable[Instruction]
"""One rank's instructions, in order."""
Schedule = Callable[[int, int, int], Iterator[Instruction]]
"""A BTS stage's training: (stage, stages, micro-batches per iteration) → its plan."""


def gpipe(stage: int, stages: int, micro_batches: int) -> Iterator[Instruction]:
    """All forward passes, then all backward passes: holds every micro-batch at once."""
    return _alternate(micro_batches, ahead=micro_batches, lag=0)


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Instruction]:
    """1F1B: a stage is as many micro-batches ahead as there are ranks from it to the heads.

    That includes the heads' ranks, so the last stage works on the next micro-batch while they
    work on this one. Holds `stages - stage + 1` micro-batches.
    """
    return _alternate(micro_batches, ahead=stages - stage, lag=0)


def zero_bubble(stage: int, stages: int, micro_batches: int) -> Iterator[Instruction]:
    """1F1B that is two micro-batches ahead per hop, and whose weight gradients wait.

    Of the two, one is being worked on and one is in flight, so that nobody waits for a message.
    Gradients reach the encoders sooner, and the postponed weight gradients (the later the stage,
    the more of them) fill the end, where a stage would wait for the ones before it. Holds
    `2 * stages - stage + 2` micro-batches. After ZB-H1 in Qi et al., "Zero bubble pipeline
    parallelism", ICLR 2024, with the UEs as first and last stage.
    """
    return _alternate(micro_batches, ahead=2 * (stages - stage), lag=stage + 1)


TRAINING: dict[ScheduleName, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "zerobubble": zero_bubble,
}
"""A BTS stage's schedules by the name that `train.schedule` gives them."""


def _alternate(micro_batches: int, ahead: int, lag: int) -> Iterator[Instruction]:
    """Forward and backward passes in turn.

    Args:
        ahead: forward passes before the first backward pass.
        lag: backward passes between one and its weight gradients.
    """
    for step in range(-ahead, micro_batches + lag):
        if step + ahead < micro_batches:
            yield Instruction(Op.RECEIVE_FORWARD, step + ahead)
            yield Instruction(Op.FORWARD, step + ahead)
            yield Instruction(Op.SEND_FORWARD, step + ahead)
        if 0 <= step < micro_batches:
            yield Instruction(Op.RECEIVE_BACKWARD, step)
            yield Instruction(Op.BACKWARD, step)
            yield Instruction(Op.SEND_BACKWARD, step)
        if step >= lag:
            yield Instruction(Op.WEIGHTS, step - lag)
    yield Instruction(Op.STEP)


Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Attempts(Generic[Piece]):
    """A training iteration in sections: `attempt` may be repeated without UEs that turn out bad.

    Where UEs aren't dropped, all of it is one attempt.

    Attributes:
        before, after: executed in some iterations only, cut by UE: see `rounds.with_averaging`.
        once: executed first; a repetition reuses its results.
        attempt: everything that crosses; at its end all ranks know whether it is valid.
        end: executed after the valid attempt; changes weights.
    """

    once: list[Piece]
    attempt: list[Piece]
    end: list[Piece]
    before: list[Piece] = field(default_factory=list)
    after: list[Piece] = field(default_factory=list)


def one_attempt(plan: Plan) -> Attempts[Instruction]:
    """An iteration that is never repeated."""
    return Attempts([], list(plan), [])


def split_training(
    name: ScheduleName,
    stages: int,
    hosts: int,
    micro_batches: int,
    drop: bool,
    frozen: Collection[str] = (),
) -> list[Attempts[Instruction]]:
    """CSILocal's iteration for every role: BTS stages, then hosts of UEs.

    Args:
        drop: leave out UEs that turn out bad.
        frozen: parts that don't learn: gradients that only they would need aren't exchanged.
    """
    everything = _all_learn(name, stages, hosts, micro_batches, drop)
    of_stage: set[Op] = set()
    of_first: set[Op] = set()
    of_host: set[Op] = set()
    if "encoder" in frozen:
        of_first |= {Op.SEND_BACKWARD}
        of_host |= {Op.RECEIVE_BACKWARD, Op.ENCODE_BACKWARD}
    if {"encoder", "tail"} <= {*frozen}:
        of_stage |= {Op.RECEIVE_BACKWARD, Op.BACKWARD, Op.SEND_BACKWARD}
        of_host |= {Op.SEND_BACKWARD}
    gone = [of_stage | of_first, *[of_stage] * (stages - 1), *[of_host] * hosts]
    return [_without(plan, ops) for plan, ops in zip(everything, gone, strict=True)]


def _without(plan: Attempts[Instruction], ops: Collection[Op]) -> Attempts[Instruction]:
    sections = (plan.once, plan.attempt, plan.end)
    return Attempts(*([i for i in section if i.op not in ops] for section in sections))


def _all_learn(
    name: ScheduleName, stages: int, hosts: int, micro_batches: int, drop: bool
) -> list[Attempts[Instruction]]:
    plans = [stage_training(name, stage, stages, micro_batches) for stage in range(stages)]
    if drop:
        first = [stage_attempts(plan, stage, stages) for stage, plan in enumerate(plans)]
        return first + [ue_attempts(micro_batches)] * hosts
    return [one_attempt(plan) for plan in plans] + [one_attempt(ue_training(micro_batches))] * hosts


def stage_training(
    name: ScheduleName, stage: int, stages: int, micro_batches: int
) -> list[Instruction]:
    """A stage's training plan.

    Raises:
        ValueError: it would compute something else than the other schedules, in silence: something
            is missing, done twice or in another order.
    """
    plan = list(TRAINING[name](stage, stages, micro_batches))
    ops: dict[int | None, list[Op]] = {m: [] for m in (*range(micro_batches), None)}
    for instruction in plan:
        ops.setdefault(instruction.micro_batch, []).append(instruction.op)
    where = f"train.schedule {name}, stage {stage} of {stages}"
    for m, found in ops.items():
        expected = [Op.STEP] if m is None else OF_A_MICRO_BATCH if m < micro_batches else []
        if found != expected:
            what = "the whole mini-batch" if m is None else f"micro-batch {m} of {micro_batches}"
            raise ValueError(f"{where}: {what} has {_words(found)}; expected {_words(expected)}.")
    for op in OF_A_MICRO_BATCH:
        order = [i.micro_batch for i in plan if i.op is op]
        if order != [*range(micro_batches)]:
            raise ValueError(
                f"{where}: {op.value} takes micro-batches {order}; expected ascending."
            )
    if plan[-1].op is not Op.STEP:
        raise ValueError(f"{where}: ends with {plan[-1].op.value}; expected {Op.STEP.value}.")
    return plan


def _words(ops: Iterable[Op]) -> str:
    return ", ".join(op.value for op in ops) or "nothing"


def stage_attempts(plan: Plan, stage: int, stages: int) -> Attempts[Instruction]:
    """A stage's training plan, with agreement on who takes part.

    The first stage receives all smashed data before its first forward pass and calls the roll;
    the last one gives the verdict as soon as it has the last gradient, while the others are still
    working. Every rank receives both before it needs them.
    """
    *attempt, end = plan
    if stage == 0:
        attempt.sort(key=lambda i: i.op is not Op.RECEIVE_FORWARD)  # stable
    calls = sum(i.op is Op.RECEIVE_FORWARD for i in attempt) if stage == 0 else 0
    attempt.insert(calls, Instruction(Op.ROLL_CALL))
    last = max(k for k, i in enumerate(attempt) if i.op is Op.RECEIVE_BACKWARD)
    given = last + 1 if stage == stages - 1 else len(attempt)
    attempt.insert(given, Instruction(Op.VERDICT))
    return Attempts([], attempt, [end])


def ue_attempts(micro_batches: int) -> Attempts[Instruction]:
    """`ue_training`, with agreement on who takes part; smashed data are sent again unchanged."""
    plan = list(ue_training(micro_batches))
    sent = 1 + micro_batches
    attempt = [
        *plan[1:sent],
        Instruction(Op.ROLL_CALL),
        *plan[sent:-2],
        Instruction(Op.VERDICT),
    ]
    return Attempts(plan[:1], attempt, plan[-2:])


def stage_evaluation(micro_batches: int) -> Iterator[Instruction]:
    """Forward passes only, on a BTS stage."""
    for m in range(micro_batches):
        yield Instruction(Op.RECEIVE_FORWARD, m)
        yield Instruction(Op.FORWARD, m)
        yield Instruction(Op.SEND_FORWARD, m)


def ue_training(micro_batches: int) -> Iterator[Instruction]:
    """The UE rank's two ends of the same iteration.

    The encoder's BatchNorm sees the whole mini-batch, so encoding isn't split; heads work on each
    micro-batch as it comes back. The heads' weight gradients fill the wait for the last stages.
    """
    yield from ue_encoding(micro_batches)
    yield from ue_decoding(micro_batches, send_back=True)
    yield Instruction(Op.WEIGHTS)
    for m in range(micro_batches):
        yield Instruction(Op.RECEIVE_BACKWARD, m)
    yield Instruction(Op.ENCODE_BACKWARD)
    yield Instruction(Op.STEP)


def ue_encoding(micro_batches: int) -> Iterator[Instruction]:
    """The UE rank's first half of an evaluation batch; the next batch's may precede `ue_decoding`.

    So the first stage has something to do while the heads work.
    """
    yield Instruction(Op.ENCODE)
    for m in range(micro_batches):
        yield Instruction(Op.SEND_FORWARD, m)


def ue_decoding(micro_batches: int, send_back: bool = False) -> Iterator[Instruction]:
    """The second half: reconstruct; `send_back` adds the gradient at each head's input."""
    for m in range(micro_batches):
        yield Instruction(Op.RECEIVE_FORWARD, m)
        yield Instruction(Op.HEAD, m)
        if send_back:
            yield Instruction(Op.SEND_BACKWARD, m)


def bubble(stages: int, micro_batches: int) -> float:
    """Share of time that a stage idles under `gpipe` at best, with equal stages: (S-1)/(M+S-1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def held(plan: Plan, start: Op, end: Op) -> int:
    """Most micro-batches between `start` and `end` at any time: how many buffers a rank needs."""
    now = most = 0
    for instruction in plan:
        now += (instruction.op is start) - (instruction.op is end)
        most = max(most, now)
    return most


def execute(
    plan: Plan,
    whole: Mapping[Op, Callable[[], None]],
    per_micro_batch: Mapping[Op, Callable[[int], None]],
    clock: Clock,
) -> None:
    """Run a rank's instructions.

    Args:
        whole, per_micro_batch: what the rank does at instructions without and with a micro-batch.
        clock: counts the time of each; that of the last one continues until the clock is told more.
    """
    for instruction in plan:
        op, m = instruction.op, instruction.micro_batch
        clock.begin(ACTIVITY.get(op, "compute"), op.value, m)
        if m is None:
            whole[op]()
        else:
            per_micro_batch[op](m)


ACTIVITY = {
    Op.RECEIVE_FORWARD: "wait",
    Op.RECEIVE_BACKWARD: "wait",
    Op.SEND_FORWARD: "send",
    Op.SEND_BACKWARD: "send",
    Op.SEND_MISSED: "send",
    Op.RECEIVE_MISSED: "wait",
    Op.SEND_UPDATE: "send",
    Op.RECEIVE_UPDATE: "wait",
    Op.SEND_MEAN: "send",
    Op.RECEIVE_MEAN: "wait",
    Op.ROLL_CALL: "wait",
    Op.VERDICT: "wait",
}
"""What a clock counts the time of an instruction as, where that isn't computing."""
