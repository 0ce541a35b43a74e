"""train.stacked: the UEs of a rank as one, the same but for rounding, whoever takes part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_world
from runs import CPU, follow, small
from torch import Tensor

from csipipe import methods
from csipipe.comm.world import World
from csipipe.methods.csilocal_ue import UeHalf
from csipipe.methods.ends import Stacked
from csipipe.settings.config import Settings

WAYS = ("never", "always")
# before a BatchNorm the bias's true gradient is zero; what is computed is noise
NOISE = "encoder.0.bias"


def setting(stacked: str, participants: int | None = None, **train: Any) -> Settings:
    return small(
        topology={"stages": 1, "placement": "together", "participants": participants},
        train={"iterations": 3, "stacked": stacked, **train},
    )


def state(worker: Any) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: tensor.clone() for key, tensor in unit.state().items()}
        for name, unit in worker.units().items()
    }


def both(world: World, settings: dict[str, Settings]) -> dict[str, Any]:
    """Train both ways; then each way from the other's state."""
    builders = {way: methods.prepare(s, world.rank, world.size, CPU) for way, s in settings.items()}
    world.ready("data")
    world.connect(20.0)
    workers: dict[str, Any] = {way: build(world) for way, build in builders.items()}
    for way, worker in workers.items():
        (half,) = (half for half in worker.halves if isinstance(half, UeHalf))
        assert isinstance(half.ends, Stacked) == (way == "always")
        if settings[way].train.on_bad_ue == "drop":
            spoil(half)
    found: dict[str, Any] = {way: follow(w, 2) | {"state": state(w)} for way, w in workers.items()}
    for way, other in zip(WAYS, reversed(WAYS), strict=True):
        for name, unit in workers[way].units().items():
            unit.load(found[other]["state"][name])
    swapped = {way: worker.train_iteration(2) for way, worker in workers.items()}
    found["swapped"] = {way: figures.loss_per_ue for way, figures in swapped.items() if figures}
    world.leave()
    return found


def spoil(half: UeHalf) -> None:
    """UE 2 sends NaN in the last micro-batch."""
    send = half.ports.forward_out.send

    def poisoned(m: int, tensor: Tensor) -> Tensor:
        if m == half.wire.micro_batches - 1:
            tensor = tensor.clone()
            tensor[2 * half.wire.rows, 1] = float("nan")
        return send(m, tensor)

    half.ports.forward_out.send = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("case", ["all take part", "some take part", "one is left out"])
def test_stacked_ues_train_as_they_do_one_after_the_other(case: str) -> None:
    cases: dict[str, dict[str, Any]] = {
        "all take part": {},
        "some take part": {"participants": 3},
        "one is left out": {"on_bad_ue": "drop"},
    }
    more = cases[case]
    found = run_world(1, both, {way: setting(way, **more) for way in WAYS})[0]
    one, two = (found[way] for way in WAYS)
    torch.testing.assert_close(
        torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-6, atol=0
    )
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        if not name.endswith(NOISE):
            away = float((two["gradients"][name] - gradient).norm() / gradient.norm())
            assert away < 1e-5, name
    assert torch.equal(one["ledger"], two["ledger"])
    assert {k: {n: t.shape for n, t in v.items()} for k, v in one["files"].items()} == {
        k: {n: t.shape for n, t in v.items()} for k, v in two["files"].items()
    }
    for name, part in one["state"].items():
        assert part.keys() == two["state"][name].keys()
        for key in part:
            if key.endswith((".step", "batches_tracked", "draws")):
                assert torch.equal(part[key], two["state"][name][key]), (name, key)
    swapped = found["swapped"]
    assert swapped["never"] == pytest.approx(swapped["always"], rel=1e-4)
    if case == "one is left out":
        assert [line[2] for line in two["losses"]] == [0, 0]
