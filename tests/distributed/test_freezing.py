"""Parts that are frozen: nothing of them changes, nothing crosses that only they would need."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import joined, small, splits, unsplit
from torch import nn

from csipipe import models
from csipipe.comm.ledger import PAPER, UP, Kind, Ledger
from csipipe.methods.cost import bytes_per_iteration, exchanged_per_iteration
from csipipe.settings.config import Settings

WAYS: dict[str, dict[str, Any]] = {
    "tail": {"freeze": "tail"},
    "head": {"freeze": "head"},
    "encoder": {"freeze": "encoder"},
    "encoder,tail": {"freeze": "encoder,tail"},
    "tail,head": {"freeze": "tail,head", "on_bad_ue": "drop"},
    "head of stacked UEs": {"freeze": "head", "stacked": "always"},
    "rates and augmentation": {"rates": (0.5, 2.0, 1.5), "augment": "angle,phase"},
}
ITERATIONS = 3


def runs(stages: int) -> dict[str, Settings]:
    return {
        name: small(
            topology={"ues": 2, "stages": stages, "placement": "together"},
            data={"train_samples": 24, "test_samples": 6},
            train={"iterations": ITERATIONS, "batch_size": 4, "micro_batches": 2, **way},
        )
        for name, way in WAYS.items()
    }


@cache
def world(stages: int) -> list[dict[str, Any]]:
    return run_world(stages, splits, runs(stages), timeout=180)


def frozen(name: str, settings: Settings) -> bool:
    """Whether a rank's tensor belongs to a frozen part."""
    return any(part in name.split(".") for part in settings.train.frozen)


@pytest.mark.parametrize("name", WAYS)
def test_split_training_with_frozen_parts_is_unsplit_training(name: str) -> None:
    one, two = (joined([rank[name] for rank in world(stages)]) for stages in (1, 2))
    if "stacked" not in name:
        assert_same(one, two, "losses", "parameters", "evaluations", "ledger")
    settings = runs(1)[name]
    whole = unsplit(settings)
    for ours, theirs in zip(one["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(one["evaluations"], whole["evaluations"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert {*one["gradients"]} == {key for key in one["parameters"] if not frozen(key, settings)}


@pytest.mark.parametrize("name", WAYS)
def test_a_frozen_part_stays_to_the_bit_with_its_statistics(name: str) -> None:
    settings = runs(1)[name]
    after = joined([rank[name] for rank in world(2)])["files"]
    model, seed = settings.model, settings.train.seed
    drawn = {
        "encoder": models.build_encoder(model, seed),
        "tail": nn.Sequential(*models.build_tail(model, seed)),
        "head": models.build_head(model, seed),
    }
    before = {part: module.state_dict() for part, module in drawn.items()}
    assert {key.split(".")[0] for tensors in after.values() for key in tensors} == {*before}
    for tensors in after.values():
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            same = torch.equal(tensor, before[part][name])
            assert same or part not in settings.train.frozen, key
            if name.endswith("running_var"):
                assert same == (part in settings.train.frozen), key


@pytest.mark.parametrize("name", WAYS)
def test_what_only_a_frozen_part_would_need_does_not_cross(name: str) -> None:
    settings = runs(1)[name]
    ledger = Ledger(2)
    ledger.counts.copy_(joined([rank[name] for rank in world(2)])["ledger"])
    up = ledger.total("training", [kind for kind in PAPER if kind in UP])
    down = ledger.total("training", [kind for kind in PAPER if kind not in UP])
    for at, count in enumerate((exchanged_per_iteration, bytes_per_iteration)):
        each = count(settings)
        assert {"up": up[at], "down": down[at]} == {w: ITERATIONS * n for w, n in each.items()}
    gradients = ledger.total("training", [Kind.SMASHED_GRADIENT])[0]
    assert (gradients == 0) == ("encoder" in settings.train.frozen)


@pytest.mark.parametrize("method", ["fedavg", "fedgradper"])
def test_a_frozen_tail_is_in_no_federated_update(method: str) -> None:
    settings = small(
        method,
        topology={"ues": 2, "stages": None, "partition": None, "placement": "together"},
        data={"train_samples": 24, "test_samples": 6},
        train={"iterations": 2, "batch_size": 4, "micro_batches": 2, "freeze": "tail"},
    )
    found = joined([rank[""] for rank in run_world(1, splits, {"": settings}, timeout=60)])
    ledger = Ledger(2)
    ledger.counts.copy_(found["ledger"])
    total = ledger.total("training", PAPER)[0]
    assert total == 2 * sum(exchanged_per_iteration(settings).values())
    assert not any("tail" in key for key in found["gradients"])
    # fedgrad's shared parts are stepped by the BTS
    assert any("head" in key or "encoder" in key for key in found["gradients"])


OWN = "frozenmodel:build"
AVERAGING: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedgrad": {"personalisation": "fedalt"},
    "fedgradper": {"personalisation": "fedalt"},
    "splitfed": {"aggregate_every": 1},
}


def averaging(method: str) -> Settings:
    """A model that freezes layers itself, and has parameters without gradients."""
    return small(
        method,
        model={"name": OWN, "c2": None},
        topology={"ues": 2, "participants": 1, "stages": 1, "placement": "together"},
        data={"train_samples": 24, "test_samples": 6},
        train={"iterations": 4, "batch_size": 4, "micro_batches": 2, **AVERAGING[method]},
    )


def test_what_a_model_freezes_itself_is_in_no_vector_and_stays() -> None:
    runs = {method: averaging(method) for method in AVERAGING}
    [found] = run_world(1, splits, runs)
    for method, settings in runs.items():
        model, seed = settings.model, settings.train.seed
        before = {
            "encoder": models.build_encoder(model, seed),
            "tail": nn.Sequential(*models.build_tail(model, seed)),
            "head": models.build_head(model, seed),
        }
        whole = nn.ModuleDict(before)
        stays = {n for n, p in whole.named_parameters() if not p.requires_grad or "spare" in n}
        start = dict(whole.named_parameters())
        changed = {
            name
            for tensors in found[method]["files"].values()
            for name, tensor in tensors.items()
            if name in start and not torch.equal(tensor, start[name])
        }
        assert changed == start.keys() - stays, method
