"""Evaluations over some of the UEs: the figures that these have in an evaluation over all."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, joined, small, splits, unsplit

from csipipe import methods
from csipipe.comm.world import World
from csipipe.methods.roster import evaluated
from csipipe.settings.config import Placement, Settings

UES, SOME = 5, 2
METHODS = ("csilocal", "fedavg", "fedavgper")


def setting(method: str, some: int | None, placement: Placement = "apart") -> Settings:
    return small(
        method,
        topology={"stages": 1, "ues": UES, "placement": placement},
        train={"iterations": 2},
        run={"eval_ues": some},
    )


@cache
def found(ranks: int, some: int | None = SOME, placement: Placement = "apart") -> dict[str, Any]:
    runs = {method: setting(method, some, placement) for method in METHODS}
    ranks_found = run_world(ranks, splits, runs)
    return {name: joined([rank[name] for rank in ranks_found]) for name in runs}


@pytest.mark.parametrize("method", METHODS)
def test_their_figures_are_those_of_an_evaluation_over_all(method: str) -> None:
    chosen = evaluated(setting(method, SOME))
    assert len(chosen) == SOME
    some, everyone = found(2)[method], found(2, None)[method]
    assert_same(some, everyone, "losses", "parameters", "files")
    for ours, theirs in zip(some["evaluations"], everyone["evaluations"], strict=True):
        torch.testing.assert_close(ours[chosen], theirs[chosen], rtol=1e-12, atol=0)
        others = [ue for ue in range(UES) if ue not in chosen]
        assert not ours[others].any()
        assert theirs[others].any()


@pytest.mark.parametrize(("ranks", "placement"), [(6, "apart"), (5, "together")])
def test_a_placement_changes_no_bit(ranks: int, placement: Placement) -> None:
    """Most ranks have nothing to evaluate."""
    for method, other in found(ranks, placement=placement).items():
        assert_same(found(2)[method], other, "evaluations", "parameters", "ledger")


def test_centralised_evaluates_them_too() -> None:
    central = setting("centralised", SOME)
    central = replace(central, topology=replace(central.topology, stages=None))
    chosen = evaluated(central)
    holdout, test = unsplit(central, shared=True)["evaluations"]
    assert torch.equal(holdout[:, 0] > 0, torch.tensor([ue in chosen for ue in range(UES)]))
    assert torch.equal(test[chosen[0]], test[chosen[1]])
    assert int((test[:, 0] > 0).sum()) == SOME


def slowly(world: World, settings: Settings) -> int:
    """One rank of a run whose evaluation takes longer than a wait may."""
    builder = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(2.0)
    worker: Any = builder(world)
    if world.rank == 0:
        stage = worker.halves[0].stage
        evaluate = stage.evaluate_iteration

        def late(plan: Any) -> None:
            time.sleep(1.0)
            evaluate(plan)

        stage.evaluate_iteration = late
    worker.evaluate("test")
    worker.exchanged()
    world.leave()
    return int(worker.batches["test"])


def test_who_has_nothing_to_evaluate_waits_for_as_long_as_it_takes() -> None:
    assert run_world(UES + 1, slowly, setting("csilocal", SOME))[0] > 2  # seconds
