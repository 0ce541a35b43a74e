"""A wire that trusts nobody: what arrives is checked, and a bad UE is named or left out."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, follow, small
from torch import Tensor

from csipipe import methods
from csipipe.comm import trust
from csipipe.comm.channel import SLOTS, Channel, Peer
from csipipe.comm.codec import Plain
from csipipe.comm.handshake import compare_messages
from csipipe.comm.ledger import Kind
from csipipe.comm.loopback import Loopback
from csipipe.comm.topology import Topology
from csipipe.comm.wire import Wire
from csipipe.comm.world import World
from csipipe.measure.clock import Clock
from csipipe.run.handshake import compare_settings
from csipipe.settings.config import Settings

NAN = math.nan


def send_bad(world: World, values: list[float], kind: Kind) -> str:
    """Rank 1, a UE rank with UEs 4 and 5, sends `values` where two rows of 3 are expected."""
    world.connect(20)
    peer = Peer(1 - world.rank, slice(0, 2), range(4, 6), "UE rank 1 (UEs 4-5)")
    channel = Channel(kind, [peer], (2, 3), 1, Plain(torch.float32), CPU, limit=1e4)
    error = ""
    if world.rank:
        # past `send`, which refuses to send another shape
        work = torch.distributed.isend(torch.tensor(values), 0, tag=kind.value * SLOTS)
        assert work is not None
        work.wait()
    else:
        channel.post()
        try:
            channel.receive(0)
        except trust.BadMessage as bad:
            error = str(bad)
    world.leave()
    return error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2, 3, 4, NAN, 6], "smashed data from UE 5 .* holds nan in 1 of 3 .* scalar 1"),
        ([math.inf, 2, 3, 4, 5, 6], "from UE 4 .* holds inf"),
        ([1e5, 2, 3, 4, 5, 6], "from UE 4 .* root mean square 5.77e.04, above train.max_rms 1e.04"),
        ([1.0, 2, 3, 4, 5], "from UE 5 .* may be shorter than agreed"),
        ([1.0], "from UE 4 .* may be shorter than agreed"),  # each UE's rows have an end
        ([1e3, 2, 3, 4, 5, 6], "^$"),
    ],
)
def test_a_bad_message_is_named(values: list[float], message: str) -> None:
    error = run_world(2, send_bad, values, Kind.SMASHED)[0]
    assert re.search(message, error), error


def send_weights(world: World, weights: list[float]) -> list[float] | str:
    """Weights of rank 1 on rank 0."""
    world.connect(20)
    wire = Wire(Topology(2, 1, 2), world.rank, small(), CPU, Clock(), Loopback())
    channel = wire.weights(1, len(weights))
    received: list[float] | str = []
    if world.rank:
        channel.send(0, torch.tensor(weights, dtype=torch.float64))
        channel.finish()
    else:
        channel.post()
        try:
            received = channel.receive(0).tolist()
        except trust.BadMessage as bad:
            received = str(bad)
    world.leave()
    return received


def test_weights_may_be_large_but_not_infinite() -> None:
    counts = [2e5, 1.0, 0.0]  # BatchNorm's batches in a long run
    assert run_world(2, send_weights, counts)[0] == counts
    assert "holds inf" in str(run_world(2, send_weights, [math.inf, 1.0])[0])


def test_the_norm_finds_every_value_that_is_no_number() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = torch.ones(7, 5, dtype=dtype)
        assert trust.rms(rows) == pytest.approx(1.0)
        for value in (NAN, math.inf, -math.inf):
            for place in range(rows.numel()):
                bad = rows.clone()
                bad.view(-1)[place] = value
                assert not trust.sound(bad, 1e300)
        assert trust.sound(9 * rows, 10)  # a mean: however many there are
        assert not trust.sound(11 * rows, 10)
        short = torch.ones(7, 5, dtype=dtype)
        trust.mark(short)
        assert not trust.sound(short, 1e300)
        assert "may be shorter" in trust.fault(short, 1.0)


def disagree(world: World, on: str) -> str:
    """Rank 1 was started with something else."""
    changed = {"lr": 0.5} if world.rank and on == "settings" else {}
    try:
        compare_settings(world, small(train=changed))
        settings = small(train={"batch_size": 16, "micro_batches": 2})
        wire = Wire(Topology(2, 1, 4), world.rank, settings, CPU, Clock(), Loopback())
        wire.link(Kind.SMASHED, 24 + (world.rank and on == "messages"))
        wire.expect(Kind.OUTPUT, range(4), (8, 16), 2)
        compare_messages(world, [wire])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("settings", "rank 1 was started with train.lr 0.5, rank 0 with 0.002"),
        (
            "messages",
            "exchange 'UE 0: 2 × smashed of 8 × 25 fp32', the BTS "
            "'UE 0: 2 × smashed of 8 × 24 fp32'",
        ),
        ("nothing", ""),
    ],
)
def test_the_handshake_names_the_first_difference(on: str, message: str) -> None:
    assert message in run_world(2, disagree, on)[1]


When = dict[int, list[int]]
"""By UE: in which iterations from 0."""


def spoil(worker: Any, bad: When, value: float, unable: When) -> None:
    """Let UEs send updates with `value` in some iterations, and find no gradient in others."""
    for replica in getattr(worker.halves[-1], "replicas", {}).values():
        train, ue, begun = replica.train, replica.ue.number, [0]

        def spoiled(train: Any = train, ue: int = ue, begun: list[int] = begun) -> Any:
            begun[0] += 1
            update, figures = train()
            if begun[0] - 1 in bad.get(ue, []):
                update[0] = value
            return update, figures

        def none(gradient: Tensor, ue: int = ue, begun: list[int] = begun) -> Tensor:
            return gradient * NAN if begun[0] - 1 in unable.get(ue, []) else gradient

        replica.train = spoiled
        next(replica.tail.parameters()).register_hook(none)


def federate(
    world: World, settings: Settings, bad: When, value: float, unable: When
) -> dict[str, Any]:
    """One rank of a run in which some UEs send what can't be used."""
    build = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = build(world)
    spoil(worker, bad, value, unable)
    try:
        result = follow(worker, settings.train.iterations)
    except trust.BadMessage as error:
        return {"error": str(error)}
    except ConnectionError:
        return {}
    world.leave()
    return result | {"dropped": worker.dropped}


def federated(method: str, ues: int, **train: Any) -> Settings:
    return small(
        method,
        topology={"ues": ues, "stages": 1},
        data={"train_samples": 20 * ues},
        train={"iterations": 5, **train},
    )


@pytest.mark.parametrize("method", ["fedavg", pytest.param("fedgradper", marks=pytest.mark.long)])
@pytest.mark.parametrize("value", [NAN, pytest.param(1e30, marks=pytest.mark.long)])
def test_a_federated_ue_that_is_dropped_leaves_no_trace(method: str, value: float) -> None:
    always = {3: [0, 1, 2, 3, 4]}
    with_it = run_world(3, federate, federated(method, 4, on_bad_ue="drop"), always, value, {})
    without = run_world(3, federate, federated(method, 3), {}, value, {})
    assert with_it[0]["dropped"] == [0, 0, 0, 5]
    for k in range(5):
        assert with_it[0]["losses"][k][:3] == without[0]["losses"][k]
        assert with_it[0]["losses"][k][3] == 0.0
    ours = {k: v for rank in with_it for k, v in rank["parameters"].items()}
    theirs = {k: v for rank in without for k, v in rank["parameters"].items()}
    assert theirs
    assert_same({name: ours[name] for name in theirs}, theirs)


def test_a_federated_ue_is_taken_back_when_it_is_sound_again() -> None:
    settings = federated("fedavg", 4, on_bad_ue="drop")
    ranks = run_world(3, federate, settings, {1: [2], 3: [1, 2]}, NAN, {0: [3]})
    assert ranks[0]["dropped"] == [1, 1, 0, 2]
    losses = ranks[0]["losses"]
    out = [[ue for ue in range(4) if not loss[ue]] for loss in losses]
    assert out == [[], [3], [1, 3], [0], []]
    kept = [p for rank in ranks for p in rank["parameters"].values()]
    assert kept
    assert all(torch.isfinite(p).all() for p in kept)


def test_an_exchange_without_a_sound_ue_stops() -> None:
    settings = federated("fedavg", 4, on_bad_ue="drop")
    ranks = run_world(3, federate, settings, {ue: [1] for ue in range(4)}, NAN, {})
    assert "no sound UE is left to train with: all 4 are bad" in ranks[0]["error"]


def test_stop_names_the_ue_and_the_value() -> None:
    ranks = run_world(3, federate, federated("fedavg", 4), {2: [3]}, math.inf, {})
    assert "update from UE 2" in ranks[0]["error"]
    assert "holds inf in 1 of" in ranks[0]["error"]
