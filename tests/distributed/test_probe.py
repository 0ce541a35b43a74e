"""Looking at a run doesn't change it, and what is seen is what was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_world
from runs import CPU, follow, joined, small
from torch import Tensor

from csipipe import methods
from csipipe.config import Settings
from csipipe.metrics import centred_nmse
from csipipe.world import World

HOLDOUT, TEST = 2, 20  # rows of UE 0


def plain_and_watched(world: World, runs: dict[str, Settings]) -> dict[str, Any]:
    """One rank of every run twice: left alone, and with everything looked at."""
    builders = {  # a UE's draws go on from one worker to the next
        name: [methods.prepare(settings, world.rank, world.size, CPU) for _ in range(2)]
        for name, settings in runs.items()
    }
    world.ready("data")
    world.connect(20.0)
    found = {}
    for name, (build, build_again) in builders.items():
        plain = follow(build(world), 1)
        worker = build_again(world)
        worker.probe.gradients_wanted = True
        worker.probe.rows_wanted = HOLDOUT + TEST
        watched = follow(worker, 1)
        seen = {
            "norms": worker.probe.norms(),
            "rows": worker.probe.reconstructions(),
            "seconds": worker.clock.seconds,
        }
        found[name] = (plain, watched, seen)
    world.leave()
    return found


RUNS = {
    "csilocal": small(train={"iterations": 1}),
    "zero1": small(train={"iterations": 1, "deepspeed": "ds_configs/zero1.json"}),
    "fedavg": small("fedavg", topology={"stages": 1}, train={"iterations": 1}),
    "fedgrad": small("fedgrad", topology={"stages": 1}, train={"iterations": 1}),
}


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """What each of two BTS and two UE ranks found of `csilocal` and `zero1`."""
    return run_world(4, plain_and_watched, {k: RUNS[k] for k in ("csilocal", "zero1")})


@pytest.fixture(scope="module")
def federated() -> list[Any]:
    """The same of the BTS and two UE ranks of the others."""
    return run_world(3, plain_and_watched, {k: RUNS[k] for k in ("fedavg", "fedgrad")})


def of(name: str, request: pytest.FixtureRequest) -> list[Any]:
    world = request.getfixturevalue("federated" if name.startswith("fed") else "ranks")
    return [rank[name] for rank in world]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_computes_the_same_to_the_bit(name: str, request: pytest.FixtureRequest) -> None:
    found = of(name, request)
    plain, watched = (joined([rank[i] for rank in found]) for i in (0, 1))
    assert plain["losses"] == watched["losses"]
    assert same(plain["gradients"], watched["gradients"])
    assert same(plain["parameters"], watched["parameters"])
    assert all(map(torch.equal, plain["evaluations"], watched["evaluations"]))
    assert torch.equal(plain["ledger"], watched["ledger"])


def norm(gradients: dict[str, Tensor], start: str) -> float:
    """L2 norm of the gradients whose names start so."""
    chosen = [g for name, g in gradients.items() if name.startswith(start)]
    assert chosen
    return float(torch.cat([g.flatten() for g in chosen]).norm())


@pytest.mark.parametrize("name", ["csilocal", "zero1"])
def test_norms_are_of_the_gradients_that_the_optimiser_gets(
    name: str, request: pytest.FixtureRequest
) -> None:
    found = of(name, request)
    # ZeRO hands its optimiser one flat vector; the gradients are the plain run's
    gradients = joined([rank[1] for rank in of("csilocal", request)])["gradients"]
    norms = [seen["norms"] for _, _, seen in found]
    assert set(norms[2]) == set(norms[3]) == {"encoder", "head"}
    for rank, ues in ((2, (0, 1)), (3, (2, 3))):
        for part in ("encoder", "head"):
            each = [norm(gradients, f"ue-{ue}.{part}.") for ue in ues]
            assert norms[rank][part] == pytest.approx(sum(each) / 2, rel=1e-5)
    layers = {k: v for stage in norms[:2] for k, v in stage.items() if k != "tail"}
    assert set(layers) == {f"tail_layer_{n}" for n in (0, 2, 4, 5, 7)}
    for layer, value in layers.items():
        number = layer.removeprefix("tail_layer_")
        assert value == pytest.approx(norm(gradients, f"tail.{number}."), rel=1e-5)
    whole = sum(stage["tail"] ** 2 for stage in norms[:2]) ** 0.5
    assert whole == pytest.approx(norm(gradients, "tail."), rel=1e-5)


@pytest.mark.parametrize("name", ["fedavg", "fedgrad"])
def test_a_federated_ue_shows_all_its_parts(name: str, request: pytest.FixtureRequest) -> None:
    found = of(name, request)
    gradients = joined([rank[1] for rank in found])["gradients"]
    assert found[0][2]["norms"] == {}
    for rank, ues in ((1, (0, 1)), (2, (2, 3))):
        for part in ("encoder", "tail", "head"):
            # FedGrad's UEs all step by the mean gradient; the first one's is recorded then
            each = [norm(gradients, f"ue-{ue}.{part}.") for ue in ues[: 1 + (name == "fedavg")]]
            mean = sum(each) / len(each)
            assert found[rank][2]["norms"][part] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", ["csilocal", "fedavg"])
def test_reconstructions_are_ue_0s_rows_without_padding(
    name: str, request: pytest.FixtureRequest
) -> None:
    found = of(name, request)
    first = 1 if name == "fedavg" else 2
    assert [seen["rows"] is not None for _, _, seen in found] == [
        rank == first for rank in range(len(found))
    ]
    h, h_hat = found[first][2]["rows"]
    holdout, test = found[0][1]["evaluations"]
    nmse = centred_nmse(h_hat, h)
    assert float(nmse[:HOLDOUT].sum()) == pytest.approx(float(holdout[0, 2]), rel=1e-5)
    if name == "csilocal":  # of one shared model, each UE tests a share of the rows
        assert len(nmse) == HOLDOUT + TEST
        assert float(nmse[HOLDOUT:].sum()) == pytest.approx(float(test[0, 2]), rel=1e-5)


@pytest.mark.parametrize("name", ["csilocal", "fedavg"])
def test_every_rank_knows_where_its_time_goes(name: str, request: pytest.FixtureRequest) -> None:
    for _, _, seen in of(name, request):
        assert seen["seconds"]["compute"] > 0
        assert seen["seconds"]["wait"] > 0
        assert seen["seconds"]["send"] > 0
