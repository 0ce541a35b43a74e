"""SplitFed: CSILocal whose encoders and heads are averaged; identities, ledger, placement."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trainedruns
from bits import assert_same
from harness import run_world
from runs import CPU, joined, small, splits
from test_codecs import check_ledger, listened, of_all
from test_drop import NAN
from test_participants import beginning

from csipipe import methods
from csipipe.comm.ledger import COUNTED, PAPER, PHASES, UP, Kind
from csipipe.comm.world import World
from csipipe.methods.cost import exchanged
from csipipe.settings.config import CodecSettings, Settings

ITERATIONS = 4
RESULTS = ("parameters", "losses", "evaluations", "files")


def splitfed(every: int = 1, personal: int = 0, **sections: Any) -> Settings:
    train = {
        "iterations": ITERATIONS,
        "aggregate_every": every,
        "personal_iterations": personal,
        **sections.pop("train", {}),
    }
    return small("splitfed", train=train, **sections)


def csilocal(**sections: Any) -> Settings:
    return small(train={"iterations": ITERATIONS, **sections.pop("train", {})}, **sections)


SOME = {"participants": 2}
CODECS = {
    "codec": CodecSettings(smashed="int8", update="int8", mean_update="int8"),
    "rounding": "stochastic",
    "error_feedback": True,
}


def runs(**topology: Any) -> dict[str, Settings]:
    """What is compared; with changes of all topologies."""
    some, short = topology | SOME, {"iterations": 3}
    return {
        "csilocal": csilocal(topology=topology),
        "never": splitfed(ITERATIONS + 1, topology=topology),
        "csilocal of some": csilocal(topology=some),
        "never of some": splitfed(ITERATIONS + 1, topology=some),
        "csilocal of three": csilocal(topology=topology, train=short),
        "three": splitfed(3, topology=topology, train=short),
        "every": splitfed(topology=topology),
        "personal": splitfed(2, personal=3, topology=topology),
        "of some": splitfed(2, personal=1, topology=some),
        "int8": splitfed(2, topology=topology, comm=CODECS),
        "stacked": splitfed(2, topology=topology, train={"stacked": "always"}),
        "stacked, of some": splitfed(1, personal=1, topology=some, train={"stacked": "always"}),
        "stacked, one": splitfed(
            1, personal=2, topology=topology | {"participants": 1}, train={"stacked": "always"}
        ),
        "one by one, of some": splitfed(1, personal=1, topology=some, train={"stacked": "never"}),
        "frozen": splitfed(2, topology=topology, train={"freeze": "head"}),
    }


@cache
def found() -> list[dict[str, Any]]:
    """Two stages and two hosts of UEs."""
    return run_world(4, listened, runs(), timeout=120)


def result(name: str) -> dict[str, Any]:
    return of_all(found(), name)


def parts_of(name: str, ue: int) -> dict[str, torch.Tensor]:
    """A UE's encoder and head, with BatchNorm's statistics, as they are saved."""
    state = result(name)["files"][f"ue-{ue}.safetensors"]
    return {k: v for k, v in state.items() if "tracked" not in k}


def are_alike(name: str, ue: int) -> bool:
    one, other = parts_of(name, 0), parts_of(name, ue)
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("never", "csilocal"),
        ("never of some", "csilocal of some"),
    ],
)
def test_without_an_averaging_it_is_csilocal_to_the_bit(name: str, other: str) -> None:
    assert_same(result(name), result(other), *RESULTS)
    training = PHASES.index("training")
    assert_same(result(name)["ledger"][training], result(other)["ledger"][training])


def test_the_first_averaging_is_the_mean_of_what_csilocal_comes_to() -> None:
    every = [parts_of("csilocal of three", ue) for ue in range(4)]
    assert any("running_var" in key for key in every[0])
    for ue in range(4):
        for key, mean in parts_of("three", ue).items():
            wanted = torch.stack([one[key] for one in every]).mean(0)
            torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-6)
    assert not are_alike("csilocal of three", 1)


def test_ues_are_alike_after_an_averaging_and_only_then() -> None:
    assert all(are_alike(name, ue) for name in ("every", "three", "int8") for ue in range(4))
    assert not any(are_alike(name, ue) for name in ("personal", "of some") for ue in range(1, 4))
    head, encoder = (
        [
            torch.equal(parts_of("frozen", 1)[k], v)
            for k, v in parts_of("frozen", 0).items()
            if p in k
        ]
        for p in ("head", "encoder")
    )
    assert head
    assert encoder
    assert all(head + encoder)
    assert result("every")["losses"] != result("csilocal")["losses"]


def test_the_ledger_counts_what_crosses() -> None:
    check_ledger(found(), runs(), lent=(Kind.MISSED, Kind.MISSED_STATISTICS))
    for name, settings in runs().items():
        training = result(name)["ledger"][PHASES.index("training")]
        counted = {
            way: sum(int(training[COUNTED.index(k), :, 0].sum()) for k in PAPER if (k in UP) == up)
            for way, up in (("up", True), ("down", False))
        }
        assert counted == exchanged(settings), name
    statistics = result("every")["ledger"][0, COUNTED.index(Kind.STATISTICS), :, 0]
    assert len(set(statistics.tolist())) == 1
    assert statistics[0] > 0


def test_stacked_ues_are_averaged_likewise() -> None:
    one, other = result("stacked"), joined_alone()["one by one"]
    for key, tensor in one["parameters"].items():
        torch.testing.assert_close(tensor, other["parameters"][key], rtol=1e-3, atol=1e-5)


def test_stacked_ues_begin_with_what_they_missed() -> None:
    one, other = joined_alone()["stacked, of some"], joined_alone()["one by one, of some"]
    for name, tensors in one["files"].items():
        for key, tensor in tensors.items():
            wanted = other["files"][name][key].double()
            # Adam moves a bias before BatchNorm, whose gradient is rounding alone, by some 1e-3
            assert (tensor - wanted).norm() <= 2e-3 * wanted.norm(), (name, key)


@cache
def joined_alone() -> dict[str, Any]:
    """In one process."""
    place = {"stages": 1, "placement": "together"}
    one = {"ues": 1, **place}
    names = {
        k: v for k, v in runs(**place).items() if "of some" in k or k in ("int8", "personal")
    } | {
        "one by one": splitfed(2, topology=place),
        "one UE": splitfed(2, topology=one),
        "one UE, csilocal": csilocal(topology=one),
    }
    [rank] = run_world(1, splits, names, timeout=120)
    return {name: joined([rank[name]]) for name in names}


@pytest.mark.parametrize("name", ["of some", "int8", "personal"])
def test_a_placement_changes_no_bit(name: str) -> None:
    assert_same(joined_alone()[name], result(name), *RESULTS, "ledger")


def test_two_stages_that_host_ues_change_no_bit() -> None:
    names = {k: v for k, v in runs(placement="together").items() if k in ("of some", "int8")}
    ranks = run_world(2, splits, names, timeout=60)
    for name in names:
        assert_same(joined([r[name] for r in ranks]), result(name), *RESULTS, "ledger")


def test_one_ue_alone_is_csilocal_but_for_rounding() -> None:
    ours, theirs = (joined_alone()[name] for name in ("one UE", "one UE, csilocal"))
    for a, b in zip(ours["losses"], theirs["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def spoiled(world: World, settings: Settings) -> dict[str, Any]:
    """UE 1 sends NaN as its update in the first averaging, and as a gradient before it."""
    worker: Any = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker = worker(world)
    half = worker.halves[-1]
    send, gradient = half.exchange.send, half.ports.backward_out.send
    now = 0

    def bad(ue: int, update: torch.Tensor) -> None:
        send(ue, update * NAN if (ue, now) == (1, 1) else update)

    def bad_gradient(m: int, tensor: torch.Tensor) -> torch.Tensor:
        if now == 1:
            tensor = tensor.clone()
            tensor[half.wire.rows :][: half.wire.rows] = NAN
        sent: torch.Tensor = gradient(m, tensor)
        return sent

    half.exchange.send, half.ports.backward_out.send = bad, bad_gradient
    for now in range(4):
        worker.train_iteration(now)
    state = {name: unit.state() for name, unit in worker.units().items()}
    world.leave()
    return {"dropped": worker.dropped, "state": state}


def test_a_bad_update_is_left_out_and_its_ue_goes_on_with_the_mean() -> None:
    place = {"stages": 1, "placement": "together"}
    train = {"iterations": 4, "on_bad_ue": "drop"}
    [rank] = run_world(1, spoiled, splitfed(2, topology=place, train=train))
    assert rank["dropped"] == [0, 1, 0, 0]
    one, other = rank["state"]["ue-0"], rank["state"]["ue-1"]
    parts = [key for key in one if key.startswith(("encoder.", "head.")) and "tracked" not in key]
    assert_same({key: one[key] for key in parts}, {key: other[key] for key in parts})
    assert all(one[key].isfinite().all() for key in parts)
    # nothing else crosses: Adam's moments are each UE's own
    moments = [key for key in one if key.endswith("exp_avg_sq")]
    assert moments
    assert not any(torch.equal(one[key], other[key]) for key in moments)


def test_ues_begin_alike_with_the_weights_of_another_run(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    place = {"stages": 1, "placement": "together", "ues": 5, "participants": 2}
    settings = splitfed(topology=place, train={"init": str(tmp_path / "run")})
    [parts] = run_world(1, beginning, settings)
    for ue in range(5):
        state = parts[f"ue-{ue}"]
        for name in ("encoder", "head"):
            keys = [key for key in state if key.startswith(f"{name}.")]
            assert_same({k: state[k] for k in keys}, {k: parts["bts"][k] for k in keys})
        weights = torch.cat([state[k].flatten() for k in state if k.endswith(("weight", "bias"))])
        assert torch.equal(state["agreed.values"].sort().values, weights.sort().values)
