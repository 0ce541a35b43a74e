"""A user's own model with random layers: split as unsplit, wherever it runs, resumed to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import joined, small, splits, unsplit

from csipipe.settings.config import Settings

COMPUTED = ("losses", "parameters", "evaluations", "ledger")


def settings(stages: int, **topology: Any) -> Settings:
    return small(
        model={"name": "randommodel:build", "c1": 12, "c2": None},
        topology={"ues": 3, "stages": stages, **topology},
        data={"train_samples": 24, "test_samples": 6},
        train={"iterations": 4, "batch_size": 4, "micro_batches": 2},
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """A stage and a UE rank; two stages, cut in two ways, and a UE rank; three ranks as both."""
    two = {"uniform": settings(2), "parameters": settings(2, partition="parameters")}
    worlds = [
        run_world(2, splits, {"one": settings(1)}),
        run_world(3, splits, two),
        run_world(3, splits, {"moved": settings(3, placement="together")}),
    ]
    return {name: joined([rank[name] for rank in world]) for world in worlds for name in world[0]}


def test_random_layers_draw_the_same_wherever_they_are(runs: dict[str, dict[str, Any]]) -> None:
    for name in ("uniform", "parameters", "moved"):
        assert_same(runs["one"], runs[name], *COMPUTED)


def test_split_is_unsplit(runs: dict[str, dict[str, Any]]) -> None:
    whole = unsplit(settings(1))
    for ours, theirs in zip(runs["one"]["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for key, value in whole["parameters"].items():
        torch.testing.assert_close(runs["one"]["parameters"][key], value, rtol=1e-3, atol=1e-5)
    counts = {k: v for f in runs["one"]["files"].values() for k, v in f.items() if "passes" in k}
    assert {int(count) for key, count in counts.items() if "tail" in key} == {8}
    assert {int(count) for key, count in counts.items() if "encoder" in key} == {4}
