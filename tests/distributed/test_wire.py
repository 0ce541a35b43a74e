"""What crosses between UEs and BTS: the paper's count, and both ledgers alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from harness import run_world
from runs import CPU, joined, small, split

from csipipe.comm.channel import Channel, Peer
from csipipe.comm.codec import Plain
from csipipe.comm.collectives import merged
from csipipe.comm.ledger import COUNTED, PHASES, Kind, Ledger
from csipipe.comm.world import World

SETTINGS = small()
C2 = 16


@pytest.fixture(scope="module")
def ledger() -> torch.Tensor:
    """(phase, kind, UE, 2) counts of a run of ten iterations and two evaluations."""
    counts: torch.Tensor = joined(run_world(4, split, SETTINGS))["ledger"]
    return counts


def test_training_exchanges_what_the_paper_counts(ledger: torch.Tensor) -> None:
    train, model = SETTINGS.train, SETTINGS.model
    training = ledger[PHASES.index("training")]
    widths = {
        Kind.SMASHED: model.c1,
        Kind.OUTPUT: C2,
        Kind.OUTPUT_GRADIENT: C2,
        Kind.SMASHED_GRADIENT: model.c1,
    }
    for kind, width in widths.items():
        scalars = train.iterations * train.batch_size * width
        for ue in range(SETTINGS.topology.ues):
            assert training[COUNTED.index(kind), ue].tolist() == [scalars, 4 * scalars]
    per_ue = 2 * (model.c1 + C2) * train.batch_size * train.iterations
    assert int(training[..., 0].sum()) == SETTINGS.topology.ues * per_ue


def test_evaluation_is_counted_apart_and_sends_no_gradients(ledger: torch.Tensor) -> None:
    evaluation = ledger[PHASES.index("evaluation"), ..., 0].sum(dim=1)
    # 20 test rows and 2 held-out ones, in batches of 8
    rows = SETTINGS.topology.ues * (3 + 1) * 8
    assert evaluation[COUNTED.index(Kind.SMASHED)] == rows * SETTINGS.model.c1
    assert evaluation[COUNTED.index(Kind.OUTPUT)] == rows * C2
    assert evaluation[COUNTED.index(Kind.OUTPUT_GRADIENT)] == 0
    assert evaluation[COUNTED.index(Kind.SMASHED_GRADIENT)] == 0


def test_bf16_halves_the_bytes() -> None:
    settings = small(train={"precision": "bf16", "iterations": 2})
    result = joined(run_world(4, split, settings))
    scalars, size = result["ledger"].sum(dim=(0, 1, 2)).tolist()
    assert size == 2 * scalars
    assert all(np.isfinite(result["losses"]).ravel())


def lose_a_message(world: World) -> str:
    """Two ranks whose ledgers differ by one message."""
    world.connect(20)
    ues, bts = Ledger(1), Ledger(1)
    if world.rank == 0:
        bts.count(Kind.SMASHED, range(1), 6, 24)
    try:
        merged(ues, bts)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ledgers_that_differ_are_an_error() -> None:
    assert all("differ: a message was lost" in message for message in run_world(2, lose_a_message))


def mix_up(world: World) -> list[float]:
    """Rank 0 sends two kinds in one order, rank 1 receives them in the other."""
    world.connect(20)
    peer = [Peer(1 - world.rank, slice(0, 1))]
    one, two = (
        Channel(kind, peer, (1, 1), 2, Plain(torch.float32), CPU)
        for kind in (Kind.ACTIVATION, Kind.ACTIVATION_GRADIENT)
    )
    got = []
    if world.rank == 0:
        for value, (channel, m) in enumerate([(two, 1), (one, 0), (two, 0), (one, 1)]):
            channel.send(m, torch.full((1, 1), float(value)))
        one.finish()
        two.finish()
    else:
        one.post()
        two.post()
        got = [channel.receive(m).item() for channel in (one, two) for m in range(2)]
    world.leave()
    return got


def test_a_tag_tells_kinds_and_micro_batches_apart() -> None:
    assert run_world(2, mix_up)[1] == [1.0, 3.0, 2.0, 0.0]


def go_round(world: World, staged: bool) -> list[float]:
    """Rank 0 sends seven micro-batches, rank 1 has room for two."""
    world.connect(20)
    channel = Channel(
        Kind.ACTIVATION, [Peer(1 - world.rank, slice(0, 1))], (1, 1), 7, Plain(torch.float32), CPU
    )
    if staged:  # as between a GPU and gloo: through host buffers, by the channel's thread
        channel._thread = ThreadPoolExecutor(1)
    channel.window = 2
    got = []
    for _ in range(2):  # iterations: buffers are used again
        if world.rank == 0:
            for m in range(7):
                channel.send(m, torch.full((1, 1), float(m)))
                assert len(channel._sends) <= 2
            channel.finish()
        else:
            channel.post(2)
            for m in range(7):
                got.append(channel.receive(m).clone().item())
                channel.release(m)
            assert len(channel._buffers) == 2
    world.leave()
    return got


@pytest.mark.parametrize("staged", [False, True])
def test_two_buffers_carry_any_number_of_micro_batches(staged: bool) -> None:
    assert run_world(2, go_round, staged)[1] == [*map(float, range(7))] * 2


def stay_silent(world: World) -> str:
    """Rank 0 never sends what rank 1 waits for."""
    world.connect(1.0)
    peer = Peer(0, slice(0, 1), role="BTS stage 0")
    channel = Channel(Kind.SMASHED, [peer], (1, 1), 3, Plain(torch.float32), CPU)
    if world.rank == 0:
        world.store.get("rank 1 gave up")
        return ""
    channel.post()
    try:
        channel.receive(2)
        return "received"
    except ConnectionError as error:
        return str(error)
    finally:
        world.store.set("rank 1 gave up", "")


def test_a_silent_peer_is_named_after_the_timeout() -> None:
    message = run_world(2, stay_silent, timeout=20)[1]
    assert "waiting for smashed data of micro-batch 2 from BTS stage 0" in message
