"""What every rank does in one iteration, as data: no processes, no tensors.

The UEs are the two outermost ends of one pipeline: encoder → tail stages → head, and back. A
schedule is the list of instructions of one rank; a loop on that rank executes it. Every send has
its receive on the neighbour, in the same order: `tests/unit/test_schedule.py` pairs them.

Backward passes take micro-batches in ascending order in every schedule, so that gradients are
summed in one order and results don't depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum


class Op(Enum):
    """One step of a rank; the comment names its counterpart on a neighbour."""

    RECEIVE_FORWARD = "receive forward"  # the SEND_FORWARD of the rank before
    FORWARD = "forward"
    SEND_FORWARD = "send forward"  # RECEIVE_FORWARD of the rank after
    RECEIVE_BACKWARD = "receive backward"  # the SEND_BACKWARD of the rank after
    BACKWARD = "backward"
    SEND_BACKWARD = "send backward"  # RECEIVE_BACKWARD of the rank before
    ENCODE = "encode"  # UE: encoder's forward pass, whole mini-batch
    HEAD = "head"  # UE: head, loss and the head's backward pass
    ENCODE_BACKWARD = "encode backward"  # UE: encoder's backward pass, whole mini-batch
    STEP = "step"  # optimiser


@dataclass(frozen=True)
class Instruction:
    """An operation on one micro-batch, or on the whole mini-batch where that is None."""

    op: Op
    micro_batch: int | None = None


Plan = Iterable[Instruction]
"""One rank's instructions, in order."""


def gpipe(micro_batches: int) -> Iterator[Instruction]:
    """A BTS stage's training: all forward passes, then all backward passes, then Adam."""
    yield from stage_evaluation(micro_batches)
    for m in range(micro_batches):
        yield Instruction(Op.RECEIVE_BACKWARD, m)
        yield Instruction(Op.BACKWARD, m)
        yield Instruction(Op.SEND_BACKWARD, m)
    yield Instruction(Op.STEP)


TRAINING = {"gpipe": gpipe}
"""A BTS stage's schedules by the name that `train.schedule` gives them."""


def stage_evaluation(micro_batches: int) -> Iterator[Instruction]:
    """Forward passes only, on a BTS stage."""
    for m in range(micro_batches):
        yield Instruction(Op.RECEIVE_FORWARD, m)
        yield Instruction(Op.FORWARD, m)
        yield Instruction(Op.SEND_FORWARD, m)


def ue_training(micro_batches: int) -> Iterator[Instruction]:
    """The UE rank's two ends of the same iteration.

    The encoder's BatchNorm sees the whole mini-batch, so encoding isn't cut; heads work on each
    micro-batch as it comes back.
    """
    yield from ue_encoding(micro_batches)
    yield from ue_decoding(micro_batches, send_back=True)
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
