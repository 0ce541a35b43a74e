"""K of N: only the UEs of an iteration send, are counted and change."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, Unsplit, joined, small, split, unsplit
from test_drop import NAN, spoil
from test_parity import TOLERANCE, worst_gradient

from csipipe import methods
from csipipe.comm.ledger import COUNTED, PHASES, Kind
from csipipe.comm.world import World
from csipipe.methods.roster import drawn
from csipipe.settings.config import Placement, Settings

UES, PARTICIPANTS = 5, 2


def setting(
    stages: int = 1,
    placement: Placement = "apart",
    topology: dict[str, Any] | None = None,
    **train: Any,
) -> Settings:
    place = {"ues": UES, "participants": PARTICIPANTS, "stages": stages, "placement": placement}
    return small(topology=place | (topology or {}), train=train)


@cache
def csilocal(
    stages: int, hosts: int, placement: Placement = "apart", schedule: str = "zerobubble"
) -> dict[str, Any]:
    ranks = hosts + (stages if placement == "apart" else 0)
    settings = setting(stages, placement, schedule=schedule)
    return joined(run_world(ranks, split, settings, timeout=120))


def turns(settings: Settings) -> list[list[int]]:
    return [drawn(settings, k) for k in range(settings.train.iterations)]


def test_it_is_the_unsplit_model_of_those_ues() -> None:
    found, wanted = csilocal(1, 1), unsplit(setting())
    assert worst_gradient(found, wanted) <= TOLERANCE
    for ours, theirs, present in zip(
        found["losses"], wanted["losses"], turns(setting()), strict=True
    ):
        assert [ue for ue, loss in enumerate(ours) if loss] == present
        assert ours == pytest.approx(theirs, rel=TOLERANCE)
    for a, b in zip(found["evaluations"], wanted["evaluations"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    files = found["files"]
    for ue in range(UES):  # an encoder's BatchNorm counts the iterations of its UE
        [seen] = [t for n, t in files[f"ue-{ue}.safetensors"].items() if "tracked" in n]
        assert seen == sum(ue in present for present in turns(setting()))


@pytest.mark.parametrize(
    ("stages", "hosts", "placement", "schedule"),
    [
        (2, 5, "apart", "1f1b"),  # with one UE each: most of them have nothing to do
        (2, 2, "together", "zerobubble"),
        pytest.param(1, 3, "apart", "gpipe", marks=pytest.mark.long),
        pytest.param(1, 1, "together", "1f1b", marks=pytest.mark.long),
        pytest.param(2, 5, "together", "gpipe", marks=pytest.mark.long),
        pytest.param(2, 2, "apart", "zerobubble", marks=pytest.mark.long),
    ],
)
def test_placement_and_schedule_change_no_bit(
    stages: int, hosts: int, placement: Placement, schedule: str
) -> None:
    other = csilocal(stages, hosts, placement, schedule)
    assert_same(csilocal(1, 1), other, "losses", "parameters", "evaluations", "ledger")


def test_who_takes_no_part_is_not_counted() -> None:
    settings, ledger = setting(), csilocal(1, 1)["ledger"]
    training = ledger[PHASES.index("training")]
    for kind, width in (
        (Kind.SMASHED, settings.model.c1),
        (Kind.OUTPUT, 16),
        (Kind.OUTPUT_GRADIENT, 16),
        (Kind.SMASHED_GRADIENT, settings.model.c1),
    ):
        for ue in range(UES):
            times = sum(ue in present for present in turns(settings))
            scalars = times * settings.train.batch_size * width
            assert training[COUNTED.index(kind), ue].tolist() == [scalars, 4 * scalars]


def spoiled(world: World, settings: Settings, bad: int) -> dict[str, Any]:
    """One rank, with a UE whose gradients are bad whenever it takes part."""
    builder = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = builder(world)
    spoil(worker, {bad: ("output_gradient", list(range(100)))}, NAN)
    losses = [worker.train_iteration(k) for k in range(settings.train.iterations)]
    world.leave()
    return {
        "losses": [f.loss_per_ue for f in losses if f is not None],
        "dropped": worker.dropped,
    }


def test_of_those_who_take_part_a_bad_one_is_dropped() -> None:
    """What is left is the unsplit model of the others; each UE has a rank to itself."""
    settings = setting(1, topology={"ues": 3}, iterations=6, on_bad_ue="drop")
    present = turns(settings)
    bad = present[0][0]
    found = run_world(4, spoiled, settings, bad)[0]
    assert found["dropped"] == [sum(ue == bad and ue in p for p in present) for ue in range(3)]
    assert 0 < found["dropped"][bad] < 6
    wanted = Unsplit(settings, *methods.load(settings, range(3), CPU), CPU, shared=False)
    wanted.without = frozenset([bad])
    for k, losses in enumerate(found["losses"]):
        assert losses == pytest.approx(wanted.train_iteration(k).loss_per_ue, rel=TOLERANCE)


def slowly(world: World, settings: Settings) -> list[list[int]]:
    """One rank of a run whose first stage is slow."""
    builder = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(1.0)
    worker: Any = builder(world)
    for k in range(settings.train.iterations):
        if world.rank == 0:
            time.sleep(0.25)
        worker.train_iteration(k)
    world.leave()
    return turns(settings)


def test_a_rank_without_work_waits_for_nobody_for_long() -> None:
    """One of them has none for longer than the time-out."""
    settings = setting(topology={"ues": 4, "participants": 1}, iterations=8)
    present = run_world(5, slowly, settings)[0]
    idle = ["".join("x" if ue in there else "." for there in present).split("x") for ue in range(4)]
    assert max(len(turns) for ue in idle for turns in ue) * 0.25 > 1.0
