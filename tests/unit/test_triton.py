"""The kernels for GPUs, on a CPU: numbers by Triton's interpreter, code by its compiler.

Speed, and that a GPU's code computes the same, only a GPU can tell (`csipipe/gpucheck`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from csipipe.models import kernels
from csipipe.models.crblock import CRBlock

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton isn't installed")
RUNS = Path(__file__).with_name("tritonruns.py")


def run(*words: str, interpret: bool) -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    found = subprocess.run(
        [sys.executable, str(RUNS), *words],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: dict[str, Any] = json.loads(found.stdout)
    return result


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        "one path",
        pytest.param("norm", marks=pytest.mark.long),
        pytest.param("norm of tiles", marks=pytest.mark.long),
        pytest.param("convolution", marks=pytest.mark.long),
        pytest.param("no bias", marks=pytest.mark.long),
        pytest.param("two channels", marks=pytest.mark.long),
        pytest.param("CRNet", marks=pytest.mark.long),
        pytest.param("several tiles", marks=pytest.mark.long),
        pytest.param("5 x 9", marks=pytest.mark.long),
        pytest.param("16 x 8", marks=pytest.mark.long),
        pytest.param("12 x 20", marks=pytest.mark.long),
        pytest.param("1 x 17", marks=pytest.mark.long),
        pytest.param("one row", marks=pytest.mark.long),
    ],
)
def test_numbers_are_those_of_the_layers(case: str) -> None:
    found = run("numbers", case, interpret=True)[case]
    assert found["by"] == "triton"
    for what in ("fp32", "buffers", "evaluation"):
        assert found[what] < 1e-5, (what, found)
    assert found["put off"] or case.startswith("norm")  # whose gradients never wait
    if case == "one path":  # the quick one
        return
    assert found["evaluation's gradients"] < 1e-5, found
    if case.startswith("norm"):  # theirs rounds nothing there
        assert found["bf16"] < 0.02, found
        return
    assert found["bf16 by"] == "triton"
    assert found["bf16 type"] == "torch.bfloat16"
    # as far from float64 as autocast's layers, which round in other places
    assert found["bf16"] < max(2 * found["theirs"], 0.02), found


@needs_triton
@pytest.mark.long
def test_stacked_layers_compute_what_each_does() -> None:
    found = run("numbers", "stacked", interpret=True)["stacked"]
    assert found.pop("by") == ["triton"] * 3
    assert len(found) == 6
    assert max(found.values()) < 1e-5, found


@needs_triton
def test_a_batchnorm_applies_the_leakyrelu_behind_it() -> None:
    found = run("numbers", "leaky", interpret=True)["leaky"]
    assert found["by"] == ["triton"] * 4
    assert found["slopes"] == [0.3] * 4
    assert min(found["zeros"]) > 0  # where the gradient is the slope's
    assert max(found["far"][::2]) < 1e-6, found
    assert max(found["far"][1::2]) < 1e-2, found  # bfloat16
    assert found["other bits"] == []


@needs_triton
def test_the_loss_its_floor_and_its_gradient_are_the_papers() -> None:
    found = run("numbers", "loss", interpret=True)["loss"]
    assert max(found["torch.float32"]) < 1e-6
    loss, floor, gradient = found["torch.bfloat16"]
    assert max(loss, floor) < 1e-6  # nothing is rounded on the way
    assert gradient < 4e-3


@needs_triton
def test_linear_layers_and_their_input_gradients() -> None:
    found = run("numbers", "products", interpret=True)["products"]
    assert found["trial"]
    assert len(found["far"]) == 16
    assert max(map(max, found["far"].values())) < 1e-6, found
    assert found["several axes"] < 1e-6


@needs_triton
@pytest.mark.long
def test_every_kernel_compiles_for_a_gpu() -> None:
    found = run("compile", interpret=False)
    names = {json.loads(key)[0] for key in found}
    assert {
        "conv_forward",
        "conv_backward",
        "conv_weights",
        "join_backward",
        "gradient",
        "row_gradients",
        "product",
    } <= names
    shares = [made["share"] for made in found.values()]  # of seven processes, as gpucheck does it
    assert set(shares) == set(range(7))
    assert max(map(shares.count, shares)) < len(shares) / 3
    for key, made in found.items():
        assert made["bytes"] > 0, key
        if json.loads(key)[0] == "product":
            assert made["wgmma"] > 0, key  # the only way to a Hopper's full speed
            assert made["shared"] <= 96 << 10, key  # two programs on a multiprocessor
        else:
            assert made["shared"] <= 48 << 10, key  # what every GPU has without asking


def test_without_a_gpu_the_layers_compute() -> None:
    block, x = CRBlock((((3, 3),),), "triton"), torch.randn(2, 2, 4, 5)
    choice = kernels.choose(block, x)
    assert choice.backend is None
    assert "triton" in choice.why
    assert block(x).shape == x.shape
