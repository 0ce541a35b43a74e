"""The split, pipelined program computes what the unsplit model does (reading.md, point 8)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, Rounded, joined, small, split, unsplit
from torch import nn

from csipipe import methods, models

TOLERANCE = 1e-5
COMPUTED = ("losses", "parameters", "evaluations")
# before a BatchNorm the bias's true gradient is zero; what is computed is noise
NOISE = "encoder.0.bias"


@cache
def csilocal(
    stages: int,
    ue_ranks: int,
    micro_batches: int,
    partition: str,
    schedule: str = "zerobubble",
    placement: str = "apart",
    kernels_by: str = "torch",
    iterations: int = 10,
) -> dict[str, Any]:
    settings = small(
        model={"kernels_by": kernels_by},
        topology={"stages": stages, "partition": partition, "placement": placement},
        train={"micro_batches": micro_batches, "schedule": schedule, "iterations": iterations},
    )
    ranks = ue_ranks + (stages if placement == "apart" else 0)
    return joined(run_world(ranks, split, settings))


@cache
def reference(micro_batches: int, kernels_by: str = "torch") -> dict[str, Any]:
    return unsplit(small(model={"kernels_by": kernels_by}, train={"micro_batches": micro_batches}))


def worst_gradient(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest ‖difference‖ / ‖gradient‖ over the parameters of every part."""
    assert found["gradients"].keys() == wanted["gradients"].keys()
    ratios = [
        # a block that adds nothing yet has gradients of zero
        (found["gradients"][name] - g).norm() / g.norm().clamp_min(1e-20)
        for name, g in wanted["gradients"].items()
        if not name.endswith(NOISE)
    ]
    return float(torch.stack(ratios).max())  # NaN if any is


def worst_loss(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest relative difference of a UE's loss over the iterations."""
    a, b = torch.tensor(found["losses"]), torch.tensor(wanted["losses"])
    assert a.shape == b.shape
    return float(((a - b).abs() / b).max())


HOSTED = (1, 2, None)
"""UE ranks; None: the ranks of the stages host the UEs."""
NUMBERS = (1, 2, 4)
"""Of stages, and of micro-batches."""


@pytest.mark.parametrize(
    ("ue_ranks", "stages", "micro_batches"),
    [
        # a plain run has each two of the three together once
        pytest.param(hosted, stages, m, marks=() if (i + j + k) % 3 == 1 else pytest.mark.long)
        for i, hosted in enumerate(HOSTED)
        for j, stages in enumerate(NUMBERS)
        for k, m in enumerate(NUMBERS)
    ],
)
def test_split_training_is_unsplit_training(
    stages: int, micro_batches: int, ue_ranks: int | None
) -> None:
    if ue_ranks is None:
        found = csilocal(stages, stages, micro_batches, "uniform", placement="together")
    else:
        found = csilocal(stages, ue_ranks, micro_batches, "uniform")
    wanted = reference(micro_batches)
    gradient, loss = worst_gradient(found, wanted), worst_loss(found, wanted)
    print(f"S={stages} M={micro_batches} UE ranks={ue_ranks}: {gradient:.1e} {loss:.1e}")
    assert gradient <= TOLERANCE
    assert loss <= TOLERANCE
    for a, b in zip(found["evaluations"], wanted["evaluations"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("stages", "placement"), [(2, "apart"), (2, "together")])
def test_fused_kernels_split_as_the_layers_do(stages: int, placement: str) -> None:
    one = csilocal(1, 1, 2, "uniform", kernels_by="auto")
    found = csilocal(stages, stages, 2, "uniform", placement=placement, kernels_by="auto")
    assert_same(one, found, *COMPUTED, "ledger")
    wanted = reference(2, "auto")
    assert worst_gradient(found, wanted) <= TOLERANCE
    assert worst_loss(found, wanted) <= TOLERANCE


PLACED = [
    (2, 1, "uniform", "apart"),
    (4, 1, "uniform", "apart"),
    (2, 2, "type:CRBlock", "apart"),
    (2, 4, "parameters", "apart"),
    (3, 2, "measured", "apart"),
    (1, 1, "uniform", "together"),
    (1, 3, "uniform", "together"),
    (2, 2, "measured", "together"),
    (4, 4, "uniform", "together"),
]
PLAIN = (4, 4, 4, 2, 1, 4, 4, 2, 1)
"""Micro-batches of each in a plain run."""


@pytest.mark.parametrize(
    ("stages", "ue_ranks", "partition", "placement", "micro_batches"),
    [
        pytest.param(
            *placed, micro_batches, marks=() if micro_batches == plain else pytest.mark.long
        )
        for placed, plain in zip(PLACED, PLAIN, strict=True)
        for micro_batches in NUMBERS
    ],
)
def test_stages_partition_and_placement_change_no_bit(
    stages: int, ue_ranks: int, partition: str, placement: str, micro_batches: int
) -> None:
    one = csilocal(1, 1, micro_batches, "uniform")
    other = csilocal(stages, ue_ranks, micro_batches, partition, placement=placement)
    assert_same(one, other, *COMPUTED, "ledger")


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.long), 8])
@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("placement", ["apart", pytest.param("together", marks=pytest.mark.long)])
def test_schedules_change_no_bit(placement: str, stages: int, micro_batches: int) -> None:
    """With fewer micro-batches than stages too; 8 go around the ring of buffers more than once."""
    plans = [
        csilocal(stages, 1, micro_batches, "uniform", iterations=3),
        *(
            csilocal(stages, stages, micro_batches, "uniform", name, placement, iterations=3)
            for name in ("gpipe", "1f1b", "zerobubble")
        ),
    ]
    for other in plans[1:]:
        assert_same(plans[0], other, *COMPUTED)


@pytest.mark.parametrize(("loss", "kind"), [("sgcs", "eigenvectors"), ("nmse", "channel")])
def test_any_loss_and_size_split_as_they_do_unsplit(loss: str, kind: str) -> None:
    settings = small(model={"angles": 5, "delays": 13}, data={"kind": kind}, train={"loss": loss})
    found, wanted = joined(run_world(4, split, settings)), unsplit(settings)
    assert worst_gradient(found, wanted) <= TOLERANCE
    assert worst_loss(found, wanted) <= TOLERANCE
    for a, b in zip(found["evaluations"], wanted["evaluations"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
        assert (a[:, 4] > 0).all() == (kind == "eigenvectors")


def test_parts_that_start_from_the_rows_of_their_ue_split_as_they_do_unsplit() -> None:
    settings = small(model={"start": "pca"})
    found, wanted = joined(run_world(4, split, settings)), unsplit(settings)
    assert worst_gradient(found, wanted) < TOLERANCE
    assert worst_loss(found, wanted) < TOLERANCE


@pytest.mark.parametrize("stages", [1, 2])
def test_one_ue_trains_the_centralised_model(stages: int) -> None:
    settings = small(topology={"ues": 1, "stages": stages})
    found = joined(run_world(stages + 1, split, settings))
    wanted = unsplit(settings, shared=True)
    assert worst_gradient(found, wanted) <= TOLERANCE
    assert worst_loss(found, wanted) <= TOLERANCE


def test_bf16_on_a_cpu_rounds_what_crosses_between_ues_and_bts_and_nothing_else() -> None:
    settings = small(train={"precision": "bf16", "iterations": 3})
    found = joined(run_world(4, split, settings))
    wanted = unsplit(settings, crossing=Rounded.apply)
    assert worst_gradient(found, wanted) <= TOLERANCE
    assert worst_loss(found, wanted) <= TOLERANCE
    assert found["losses"] != reference(4)["losses"][:3]


def test_evaluation_is_the_mean_over_the_whole_test_set() -> None:
    settings = small()  # 20 test rows in batches of 8: the last is padded
    ranks = run_world(4, split, settings)
    [_, test] = ranks[0]["evaluations"]
    assert test[:, 0].tolist() == [20.0] * 4
    tail = nn.Sequential(*models.build_tail(settings.model, 0)).eval()
    tail.load_state_dict(strip(ranks[0]["files"]["tail.safetensors"], "tail."))
    ues = ranks[2]["files"] | ranks[3]["files"]
    for ue, sums in enumerate(test):
        encoder = models.build_encoder(settings.model, 0).eval()
        head = models.build_head(settings.model, 0).eval()
        encoder.load_state_dict(strip(ues[f"ue-{ue}.safetensors"], "encoder."))
        head.load_state_dict(strip(ues[f"ue-{ue}.safetensors"], "head."))
        h = methods.load(settings, range(1), CPU)[1]
        with torch.no_grad():
            h_hat = head(tail(encoder(h)))
        error, power = ((h_hat - h) ** 2).sum((1, 2, 3)), (h**2).sum((1, 2, 3))
        centred = ((h - 0.5) ** 2).sum((1, 2, 3))
        wanted = [
            20.0,
            *(float(x.sum()) for x in (error / power, error / centred, centred / power)),
            0.0,  # no SGCS of channels
        ]
        torch.testing.assert_close(sums.tolist(), wanted, rtol=1e-4, atol=0)


def test_saved_weights_are_the_trained_ones() -> None:
    ranks = run_world(4, split, small())
    files = joined(ranks)["files"]
    assert sorted(files) == ["tail.safetensors", *(f"ue-{n}.safetensors" for n in range(4))]
    for name, parameter in joined(ranks)["parameters"].items():
        file, key = ("tail", name) if name.startswith("tail") else name.split(".", 1)
        assert torch.equal(files[f"{file}.safetensors"][key], parameter), name


def strip(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A part's own state out of a file's."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
