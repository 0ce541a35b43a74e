"""Every DeepSpeed key that csipipe takes leaves the results as they are; all others are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits import assert_same
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import config, constants
from harness import run_world
from runs import joined, small, splits
from torch import nn

from csipipe import models
from csipipe.pipeline import settings as deepspeed
from csipipe.pipeline.partition import cuts
from csipipe.settings.config import Settings

NEEDED = {"gradient_clipping": 0.0}
COMPUTED = ("losses", "parameters", "evaluations")


def file_of(values: dict[str, Any]) -> dict[str, Any]:
    """What a file holds for values by dotted key."""
    keys: dict[str, Any] = dict(NEEDED)
    for key, value in values.items():
        outer, _, inner = key.partition(".")
        if inner:
            keys.setdefault(outer, {})[inner] = value
        else:
            keys[outer] = value
    return keys


def of_all_keys(i: int, stage: int) -> dict[str, Any]:
    """A file with the value `i` of every allowed key, and with this stage of ZeRO."""
    values = {
        key: ((1, 10**9) if isinstance(allowed, str) else allowed)[i]
        for key, allowed in deepspeed.ALLOWED.items()
    }
    # autocast is bf16, which a file of fp32 refuses (see test_parity.py)
    return file_of(
        values | {"torch_autocast.enabled": False, "zero_optimization.stage": stage},
    )


def test_every_allowed_key_computes_the_same(tmp_path: Path) -> None:
    """Each with every value, and all keys at once: one that changed anything would be seen."""
    contents = {"plain": NEEDED, "zero": file_of({"zero_optimization.stage": 1})} | {
        f"{name} {i}": of_all_keys(i, stage)
        for name, stage in (("plain", 0), ("zero", 1))
        for i in (0, -1)
    }
    runs = {}
    for name, keys in contents.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(keys))
        runs[name] = small(train={"deepspeed": str(file), "iterations": 3})
    ranks = run_world(3, splits, runs)
    found = {name: joined([rank[name] for rank in ranks]) for name in runs}
    for name in runs:
        assert_same(found[name.split()[0]], found[name], *COMPUTED)
    # ZeRO's Adam steps a stage as one vector: other last bits
    losses = [torch.tensor(found[name]["losses"]) for name in ("zero", "plain")]
    torch.testing.assert_close(*losses)


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
    ("method", "stages", "message"),
    [
        ("uniform", 6, "stage 4 without parameters; only 5 of its layers have any: use 5 stages"),
        ("type:CRBlock", 4, "stage 2 without parameters; use topology.partition para"),
        ("type:Transformer", 2, "matches no layer of the tail; .* CRBlock.*use parameters, unif"),
    ],
)
def test_a_stage_without_parameters_gets_a_remedy_that_helps(
    method: str, stages: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cuts(models.sketch_tail(small().model), stages, method)


@pytest.mark.parametrize(("split", "stages"), [((1, 4), 1), ((4, 9), 2), ((5, 13), 2)])
def test_another_cut_of_the_model_needs_no_partition(split: tuple[int, int], stages: int) -> None:
    model = replace(small().model, split=split)  # the first two tails have no CRBlock
    tail = models.sketch_tail(model)
    found = cuts(tail, stages, Settings(model=model).partition)
    assert (found[0], found[-1], len(found)) == (0, len(tail), stages + 1)


@pytest.mark.parametrize("method", ["uniform", "parameters", "type:crblock|linear"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_tail_is_cut_as_deepspeed_cuts_it(method: str, stages: int) -> None:
    """By its own class, without what needs a process group."""

    class Module(PipelineModule):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_stages, self.global_rank = stages, 1
            self._layer_specs = models.build_tail(small().model, 0)
            self._topo = SimpleNamespace(get_coord=lambda _: SimpleNamespace(pipe=0))

        def _set_bounds(self, start: int, stop: int) -> None:
            pass

    module = Module()
    module._partition_layers(method)
    assert cuts(models.sketch_tail(small().model), stages, method) == module.parts
