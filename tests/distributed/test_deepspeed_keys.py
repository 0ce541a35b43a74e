"""Every DeepSpeed key that csipipe takes leaves the results as they are; all others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same
from deepspeed.runtime import config, constants
from harness import run_world
from runs import joined, small, splits

from csipipe import models
from csipipe.pipeline import settings as deepspeed
from csipipe.pipeline.engine import check_partition

NEEDED = {"gradient_clipping": 0.0}
COMPUTED = ("losses", "parameters", "evaluations")


def entries() -> dict[str, dict[str, Any]]:
    """A file for each allowed value, by key and value; ZeRO's with ZeRO switched on."""
    found = {}
    for key, values in deepspeed.ALLOWED.items():
        outer, _, inner = key.partition(".")
        for value in (1, 10**9) if isinstance(values, str) else values:
            switched = {"stage": 1} if outer == "zero_optimization" else {}
            keys = NEEDED | {outer: {**switched, inner: value} if inner else value}
            # autocast is bf16, which a file of fp32 refuses (see test_parity.py)
            if (key, value) != ("torch_autocast.enabled", True):
                found[f"{key} {value}"] = keys
    return found


def test_every_allowed_key_computes_the_same(tmp_path: Path) -> None:
    runs = {}
    for i, (name, keys) in enumerate(entries().items()):
        file = tmp_path / f"{i}.json"
        file.write_text(json.dumps(keys))
        runs[name] = small(train={"deepspeed": str(file), "iterations": 3})
    ranks = run_world(3, splits, runs)
    plain, zero = (
        joined([rank[name] for rank in ranks])
        for name in ("gradient_clipping 0.0", "zero_optimization.stage 1")
    )
    for name in runs:
        switched = name.startswith("zero_optimization") and not name.endswith("stage 0")
        found = joined([rank[name] for rank in ranks])
        assert_same(zero if switched else plain, found, *COMPUTED)
    # ZeRO's Adam steps a stage as one vector: other last bits
    torch.testing.assert_close(torch.tensor(zero["losses"]), torch.tensor(plain["losses"]))


def test_all_other_keys_of_deepspeed_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    # every word that DeepSpeed's configuration looks for, keys among them
    names = {
        value
        for module in (constants, config)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str) and value.isidentifier() and value.islower()
    }
    assert {"communication_data_type", "prescale_gradients", "data_efficiency"} <= names
    names |= {"activation_checkpointing", "compression_training", "flops_profiler", "tensorboard"}
    known = {key.partition(".")[0] for key in deepspeed.ALLOWED}
    for name in sorted(names - known):
        file.write_text(json.dumps(NEEDED | {name: True}))
        with pytest.raises(ValueError, match=f"sets '{name}'"):
            deepspeed.load(str(file), "fp32")


@pytest.mark.parametrize(
    ("method", "parts", "remedy"),
    [
        ("uniform", [0, 1, 2, 4, 5, 6, 8], "only 5 of its layers have any: use 5 stages or fewer"),
        ("uniform", [0, 1, 2, 8], "another partition, for example parameters"),
        ("type:CRBlock", [0, 1, 2, 8], "another partition, for example uniform"),
    ],
)
def test_a_stage_without_parameters_gets_a_remedy_that_helps(
    method: str, parts: list[int], remedy: str
) -> None:
    layers = models.build_tail(small().model, 0)
    with pytest.raises(ValueError, match="leaves BTS stage 1 without parameters") as refusal:
        check_partition(layers, parts, method)
    assert remedy in str(refusal.value)
