"""Schedules as data: order, and the pairing of sends and receives."""

from __future__ import annotations

import pytest

from csipipe.schedule import (
    Instruction,
    Op,
    gpipe,
    stage_evaluation,
    ue_decoding,
    ue_encoding,
    ue_training,
)

SIZES = [1, 2, 4, 7]


def micro_batches_of(plan: list[Instruction], op: Op) -> list[int | None]:
    return [i.micro_batch for i in plan if i.op is op]


@pytest.mark.parametrize("size", SIZES)
def test_every_send_has_its_receive_in_the_same_order(size: int) -> None:
    stage, ue = list(gpipe(size)), list(ue_training(size))
    for sender, receiver in [(ue, stage), (stage, stage), (stage, ue)]:
        for send, receive in [
            (Op.SEND_FORWARD, Op.RECEIVE_FORWARD),
            (Op.SEND_BACKWARD, Op.RECEIVE_BACKWARD),
        ]:
            sent = micro_batches_of(sender, send)
            assert sent == micro_batches_of(receiver, receive) == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_pairs_too_and_sends_no_gradient(size: int) -> None:
    stage = list(stage_evaluation(size))
    ue = [*ue_encoding(size), *ue_decoding(size)]
    for plan in (stage, ue):
        assert micro_batches_of(plan, Op.SEND_FORWARD) == list(range(size))
        assert micro_batches_of(plan, Op.RECEIVE_FORWARD) == list(range(size))
        assert not {Op.SEND_BACKWARD, Op.BACKWARD, Op.STEP} & {i.op for i in plan}


@pytest.mark.parametrize("size", SIZES)
def test_a_stage_computes_what_it_has_received_and_sends_what_it_has_computed(size: int) -> None:
    chains = [
        (Op.RECEIVE_FORWARD, Op.FORWARD, Op.SEND_FORWARD),
        (Op.FORWARD, Op.RECEIVE_BACKWARD, Op.BACKWARD, Op.SEND_BACKWARD),
    ]
    plan = list(gpipe(size))
    for m in range(size):
        for chain in chains:
            places = [plan.index(Instruction(op, m)) for op in chain]
            assert places == sorted(places)
    assert plan[-1] == Instruction(Op.STEP)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_summed_in_ascending_order(size: int) -> None:
    assert micro_batches_of(list(gpipe(size)), Op.BACKWARD) == list(range(size))
    assert micro_batches_of(list(ue_training(size)), Op.HEAD) == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_the_encoder_sees_the_whole_mini_batch(size: int) -> None:
    plan = list(ue_training(size))
    assert plan[0] == Instruction(Op.ENCODE)
    assert plan[-2:] == [Instruction(Op.ENCODE_BACKWARD), Instruction(Op.STEP)]
