"""Every model of the table is split as the unsplit one computes, wherever its tail is cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import Rounded, joined, small, splits, unsplit

from csipipe.settings.config import Settings
from csipipe.settings.tables import MODELS

NAMES = [name for name in MODELS if not MODELS[name].plain]
"""All but the one that the other tests train."""
MODELS_OF = {name: {"name": name} for name in NAMES} | {"crblock": {"head": "crblock"}}
"""What is trained here, by its name in this file."""


def runs(stages: int) -> dict[str, Settings]:
    return {
        name: small(
            model={**model, "c1": 12, "c2": None},
            topology={"ues": 2, "stages": stages, "partition": None if stages > 1 else "uniform"},
            data={"train_samples": 24, "test_samples": 6},
            train={"iterations": 4, "batch_size": 4, "micro_batches": 2},
        )
        for name, model in MODELS_OF.items()
    }


@cache
def world(stages: int) -> list[dict[str, Any]]:
    return run_world(stages + 1, splits, runs(stages), timeout=180)


@pytest.mark.parametrize("name", MODELS_OF)
def test_one_stage_and_two_are_the_unsplit_model(name: str) -> None:
    one, two = (joined([rank[name] for rank in world(stages)]) for stages in (1, 2))
    assert_same(one, two, "losses", "parameters", "evaluations", "ledger")
    whole = unsplit(runs(1)[name])
    assert one["losses"][-1] != one["losses"][0]
    for ours, theirs in zip(one["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert one["parameters"].keys() == whole["parameters"].keys()
    for key, gradient in whole["gradients"].items():
        scale = max(float(gradient.norm()), 1e-4)  # where the true one is zero, it is noise
        assert float((one["gradients"][key] - gradient).norm()) <= 1e-4 * scale, key
    for ours, theirs in zip(one["evaluations"], whole["evaluations"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def in_bf16() -> dict[str, Settings]:
    return {
        name: replace(run, train=replace(run.train, precision="bf16", iterations=2))
        for name, run in runs(2).items()
    }


@cache
def bf16_world() -> list[dict[str, Any]]:
    return run_world(3, splits, in_bf16(), timeout=180)


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_what_crosses_is_rounded_and_nothing_else(name: str) -> None:
    found = joined([rank[name] for rank in bf16_world()])
    whole = unsplit(in_bf16()[name], crossing=Rounded.apply)
    for ours, theirs in zip(found["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found["losses"] != unsplit(runs(2)[name])["losses"][:2]
