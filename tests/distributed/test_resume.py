"""A run that was saved and goes on: the same bits, on any topology."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bits import assert_same
from harness import run_world
from runs import CPU, joined, named_parameters, small
from test_run import ROOT

from csipipe import checkpoint, methods
from csipipe.comm.world import World
from csipipe.run.saving import Saver, restore
from csipipe.settings import tables
from csipipe.settings.config import CodecSettings, Placement, Settings

HALF = 3


def straight(world: World, runs: dict[str, Settings], folder: str) -> dict[str, dict[str, Any]]:
    """One rank of several runs, one after the other, each saved after `HALF` of its iterations."""
    return _through(world, runs, folder, resume=False)


def resumed(world: World, runs: dict[str, Settings], folder: str) -> dict[str, dict[str, Any]]:
    """The second halves of the same runs, from what `straight` saved."""
    return _through(world, runs, folder, resume=True)


def _through(
    world: World, runs: dict[str, Settings], folder: str, resume: bool
) -> dict[str, dict[str, Any]]:
    builders = {
        name: methods.prepare(settings, world.rank, world.size, CPU)
        for name, settings in runs.items()
    }
    world.ready("data")
    world.connect(30.0)
    found = {}
    for name, build in builders.items():
        worker: Any = build(world)
        settings, place = runs[name], Path(folder) / name
        first = 0
        if resume:
            first = HALF
            restore(worker, settings, checkpoint.Snapshot(checkpoint.find(place)))
        losses = []
        for k in range(first, 2 * HALF):
            figures = worker.train_iteration(k)
            losses.append(None if figures is None else figures.sums)
            if k + 1 == HALF and not resume:
                worker.evaluate("test")  # counts in the ledger, and must leave no other trace
                saver = Saver(worker, settings, place, world)
                saver.begin(HALF, worker.exchanged(), {})
            elif k == HALF and not resume:  # training went on meanwhile
                assert saver.settle() is None
        figures = worker.evaluate("test")
        found[name] = {
            "losses": losses[HALF - first :],
            "evaluations": [] if figures is None else [figures.sums],
            "parameters": {n: p.detach().clone() for n, p in named_parameters(worker).items()},
            "ledger": worker.exchanged().counts,
            "state": {
                f"{part}.{key}": tensor.clone()
                for part, unit in worker.units().items()
                for key, tensor in unit.state().items()
            },
            "gradients": {},
            "files": {},
        }
    world.leave()
    return found


def together(results: list[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    """What the ranks of one world found in one run."""
    parts = [result[name] for result in results]
    return joined(parts) | {"state": {k: v for p in parts for k, v in p["state"].items()}}


ALL = ("parameters", "state", "losses", "evaluations", "ledger")
"""Of what `together` finds."""


METHODS: dict[str, Settings] = (
    {
        name: small(name, train={"iterations": 2 * HALF}, topology={"stages": None})
        for name, spec in tables.METHODS.items()
        if spec.shared and not spec.pipelined
    }
    | {
        name + " of some": small(
            name,
            train={"iterations": 2 * HALF, "moments": "bf16"},
            topology={"stages": None, "participants": 2},
        )
        for name in ("fedavg", "fedgradper")
    }
    | {
        "feedback": small(
            "fedavg",
            train={"iterations": 2 * HALF},
            topology={"stages": None, "participants": 3},
            comm={
                "codec": CodecSettings(update="int4", mean_update="topk"),
                "rounding": "stochastic",
                "error_feedback": True,
            },
        ),
        "fedalt": small(
            "fedproxper",
            train={"iterations": 2 * HALF, "local_steps": 2, "personalisation": "fedalt"},
            topology={"stages": None},
        ),
    }
)
CSILOCAL = {
    "fp32": small(
        train={
            "iterations": 2 * HALF,
            "augment": "angle,phase",
            "rates": (1.0, 2.0, 3.0),
            "average": 0.9,
        }
    ),
    "frozen": small(train={"iterations": 2 * HALF, "freeze": "tail"}),
    "bf16": small(train={"iterations": 2 * HALF, "precision": "bf16"}),
    "some": small(train={"iterations": 2 * HALF, "moments": "bf16"}, topology={"participants": 2}),
    "int4": small(
        train={"iterations": 2 * HALF},
        comm={
            "codec": CodecSettings(smashed="int8", output_gradient="int4", smashed_gradient="int2"),
            "rounding": "stochastic",
            "scale": "range",
            "noise": 0.1,
        },
    ),
    "splitfed": small(  # the checkpoint is between two averagings
        "splitfed",
        train={"iterations": 2 * HALF, "aggregate_every": 2, "personal_iterations": 1},
        topology={"participants": 3},
        comm={
            "codec": CodecSettings(update="int4", mean_update="topk"),
            "rounding": "stochastic",
            "error_feedback": True,
        },
    ),
    "random": small(model={"name": "randommodel:build"}, train={"iterations": 2 * HALF}),
    "transnet": small(model={"name": "transnet"}, train={"iterations": 2 * HALF}),
    "zero1": small(
        train={"iterations": 2 * HALF, "deepspeed": str(ROOT / "ds_configs" / "zero1.json")}
    ),
}


def test_every_federated_method_goes_on_to_the_bit(tmp_path: Path) -> None:
    before = run_world(3, straight, METHODS, str(tmp_path))
    after = run_world(5, resumed, METHODS, str(tmp_path))  # 4 UE ranks instead of 2
    for name in METHODS:
        assert_same(together(before, name), together(after, name), *ALL)
    lost = together(before, "feedback")["state"]
    assert all(lost[f"{part}.feedback.value"].any() for part in ("bts", "ue-0", "ue-3"))


def test_centralised_goes_on_to_the_bit(tmp_path: Path) -> None:
    runs = {"": small("centralised", train={"iterations": 2 * HALF}, topology={"stages": None})}
    before = run_world(1, straight, runs, str(tmp_path))
    after = run_world(1, resumed, runs, str(tmp_path))
    assert_same(together(before, ""), together(after, ""), *ALL)


@pytest.fixture(scope="module")
def saved_csilocal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """A folder with runs of 2 stages and 2 UE ranks, and what they came to."""
    folder = str(tmp_path_factory.mktemp("csilocal"))
    return folder, run_world(4, straight, CSILOCAL, folder, timeout=120)


@pytest.mark.parametrize(
    ("placement", "stages", "size", "names"),
    [
        ("apart", 2, 4, ["zero1"]),
        (
            "apart",
            1,
            5,
            ["fp32", "bf16", "some", "int4", "random", "transnet", "frozen", "splitfed"],
        ),
        ("apart", 3, 4, ["fp32"]),
        ("together", 1, 1, ["fp32", "some", "int4", "splitfed"]),
        ("together", 2, 2, ["zero1"]),
        pytest.param("apart", 2, 4, ["fp32", "bf16", "zero1"], marks=pytest.mark.long),
        pytest.param("apart", 1, 2, ["fp32", "bf16"], marks=pytest.mark.long),
        pytest.param("apart", 3, 7, ["fp32", "bf16"], marks=pytest.mark.long),
        pytest.param("apart", 4, 5, ["fp32", "bf16"], marks=pytest.mark.long),
        pytest.param("apart", 4, 8, ["fp32", "bf16"], marks=pytest.mark.long),
        pytest.param("together", 2, 3, ["fp32", "bf16"], marks=pytest.mark.long),
    ],
)
def test_csilocal_goes_on_to_the_bit_on_any_topology(
    placement: Placement,
    stages: int,
    size: int,
    names: list[str],
    saved_csilocal: tuple[str, list[Any]],
) -> None:
    folder, before = saved_csilocal
    runs = {name: placed(CSILOCAL[name], placement, stages) for name in names}
    after = run_world(size, resumed, runs, folder, timeout=120)
    for name in names:
        assert_same(together(before, name), together(after, name), *ALL)


def placed(settings: Settings, placement: Placement, stages: int) -> Settings:
    topology = replace(settings.topology, placement=placement, stages=stages)
    return replace(settings, topology=topology)


@pytest.mark.parametrize("name", ["csilocal", "fedavg"])
def test_what_ran_in_one_process_goes_on_apart(name: str, tmp_path: Path) -> None:
    settings = CSILOCAL["fp32"] if name == "csilocal" else METHODS[name]
    before = run_world(1, straight, {"": placed(settings, "together", 1)}, str(tmp_path))
    after = run_world(3, resumed, {"": placed(settings, "apart", 1)}, str(tmp_path))
    assert_same(together(before, ""), together(after, ""))
