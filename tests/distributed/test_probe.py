"""Looking at a run doesn't change it, and what is seen is what was computed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, follow, joined, small
from torch import Tensor

from csipipe import methods
from csipipe.comm.world import World
from csipipe.measure.metrics import centred_nmse
from csipipe.settings.config import Settings

HOLDOUT, TEST = 2, 20  # rows of UE 0


def plain_and_watched(world: World, settings: Settings) -> tuple[Any, Any, Any]:
    """One rank of a run twice: left alone, and with everything looked at."""
    # a UE's draws go on from one worker to the next
    builders = [methods.prepare(settings, world.rank, world.size, CPU) for _ in range(2)]
    world.ready("data")
    world.connect(20.0)
    plain = follow(builders[0](world), 1)
    worker = builders[1](world)
    worker.probe.gradients_wanted = True
    worker.probe.rows_wanted = HOLDOUT + TEST
    watched = follow(worker, 1)
    seen = {
        "norms": worker.probe.norms(),
        "rows": worker.probe.reconstructions(),
        "seconds": worker.clock.seconds,
    }
    world.leave()
    return plain, watched, seen


RUNS = {
    "csilocal": small(train={"iterations": 1}),
    "zero1": small(train={"iterations": 1, "deepspeed": "ds_configs/zero1.json"}),
    "fedavg": small("fedavg", topology={"stages": 1}, train={"iterations": 1}),
    "fedgrad": small("fedgrad", topology={"stages": 1}, train={"iterations": 1}),
}
ZERO1, FEDGRAD = (pytest.param(name, marks=pytest.mark.long) for name in ("zero1", "fedgrad"))


@functools.cache
def ranks(name: str) -> list[Any]:
    """What each rank of a run found: the BTS's, and two UE ranks."""
    settings = RUNS[name]
    return run_world(settings.stages + 2, plain_and_watched, settings)


@pytest.mark.parametrize("name", ["csilocal", ZERO1, "fedavg", FEDGRAD])
def test_a_run_computes_the_same_to_the_bit(name: str) -> None:
    found = ranks(name)
    plain, watched = (joined([rank[i] for rank in found]) for i in (0, 1))
    # FedGrad's gradients go to the BTS; no optimiser at a UE gets them
    recorded = () if name == "fedgrad" else ("gradients",)
    assert_same(plain, watched, *recorded, "losses", "parameters", "evaluations", "ledger")


def norm(gradients: dict[str, Tensor], start: str) -> float:
    """L2 norm of the gradients whose names start so."""
    chosen = [g for name, g in gradients.items() if name.startswith(start)]
    assert chosen
    return float(torch.cat([g.flatten() for g in chosen]).norm())


@pytest.mark.parametrize("name", ["csilocal", ZERO1])
def test_norms_are_of_the_gradients_that_the_optimiser_gets(name: str) -> None:
    found = ranks(name)
    # ZeRO hands its optimiser one flat vector; the gradients are the plain run's
    gradients = joined([rank[1] for rank in ranks("csilocal")])["gradients"]
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


@pytest.mark.parametrize("name", ["fedavg", FEDGRAD])
def test_a_federated_ue_shows_all_its_parts(name: str) -> None:
    found = ranks(name)
    # of the first step, which FedAvg's UEs take from the same weights with the same rows
    gradients = joined([rank[1] for rank in ranks("fedavg")])["gradients"]
    assert found[0][2]["norms"] == {}
    for rank, ues in ((1, (0, 1)), (2, (2, 3))):
        for part in ("encoder", "tail", "head"):
            each = [norm(gradients, f"ue-{ue}.{part}.") for ue in ues]
            assert found[rank][2]["norms"][part] == pytest.approx(sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["csilocal", "fedavg"])
def test_reconstructions_are_ue_0s_rows_without_padding(name: str) -> None:
    found = ranks(name)
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
def test_every_rank_knows_where_its_time_goes(name: str) -> None:
    for _, _, seen in ranks(name):
        assert seen["seconds"]["compute"] > 0
        assert seen["seconds"]["wait"] > 0
        assert seen["seconds"]["send"] > 0
