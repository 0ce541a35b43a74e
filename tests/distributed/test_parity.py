"""The split, pipelined program computes what the unsplit model does (reading.md, point 8)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from harness import run_world
from runs import joined, small, split, unsplit

TOLERANCE = 1e-5
# before a BatchNorm the bias's true gradient is zero; what is computed is noise
NOISE = "encoder.0.bias"


@cache
def csilocal(stages: int, ue_ranks: int, micro_batches: int, partition: str) -> dict[str, Any]:
    settings = small(
        topology={"stages": stages, "partition": partition},
        train={"micro_batches": micro_batches},
    )
    return joined(run_world(stages + ue_ranks, split, settings))


@cache
def reference(micro_batches: int) -> dict[str, Any]:
    return unsplit(small(train={"micro_batches": micro_batches}))


def worst_gradient(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest ‖difference‖ / ‖gradient‖ over the parameters of every part."""
    assert found["gradients"].keys() == wanted["gradients"].keys()
    return max(
        float((found["gradients"][name] - g).norm() / g.norm())
        for name, g in wanted["gradients"].items()
        if not name.endswith(NOISE)
    )


def worst_loss(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest relative difference of a UE's loss over the iterations."""
    a, b = torch.tensor(found["losses"]), torch.tensor(wanted["losses"])
    assert a.shape == b.shape
    return float(((a - b).abs() / b).max())


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("ue_ranks", [1, 2])
def test_split_training_is_unsplit_training(stages: int, micro_batches: int, ue_ranks: int) -> None:
    found = csilocal(stages, ue_ranks, micro_batches, "uniform")
    wanted = reference(micro_batches)
    gradient, loss = worst_gradient(found, wanted), worst_loss(found, wanted)
    print(f"S={stages} M={micro_batches} UE ranks={ue_ranks}: {gradient:.1e} {loss:.1e}")
    assert gradient <= TOLERANCE
    assert loss <= TOLERANCE
    for a, b in zip(found["evaluations"], wanted["evaluations"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("stages", "ue_ranks", "partition"),
    [(2, 1, "uniform"), (4, 1, "uniform"), (2, 2, "type:CRBlock"), (2, 4, "parameters")],
)
def test_stages_partition_and_placement_change_no_bit(
    stages: int, ue_ranks: int, partition: str
) -> None:
    one = csilocal(1, 1, 4, "uniform")
    other = csilocal(stages, ue_ranks, 4, partition)
    assert one["losses"] == other["losses"]
    assert one["parameters"].keys() == other["parameters"].keys()
    for name, parameter in one["parameters"].items():
        assert torch.equal(parameter, other["parameters"][name]), name
    for a, b in zip(one["evaluations"], other["evaluations"], strict=True):
        assert torch.equal(a, b)
