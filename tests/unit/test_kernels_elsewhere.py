"""Kernels for other machines: they compile, and an emulated ARM computes the same numbers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from csipipe.models.kernels.llvm import machine as machines
from csipipe.models.kernels.llvm import norm as norms
from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.image import Frame, Image
from csipipe.models.kernels.llvm.machine import AARCH64, Machine
from csipipe.models.kernels.llvm.sources import CONSTANT, OF_Z, SCALE, SHIFT, SLOPE
from csipipe.models.kernels.llvm.steps import forward_taps

AVX512 = Machine("x86_64-unknown-linux-gnu", "skylake-avx512", "-prefer-256-bit", 16, 32)
IMAGE = Image(5, 21)
FORWARD = (IMAGE, "active", 7, (3, 5), 7, False, True)
WEIGHTS = (IMAGE, "active", 7, (3, 5), "normed", 7)
"""Constants of a kernel each."""


def compiled(machine: Machine, describe: machines.Describe, constants: Any) -> tuple[Any, Any]:
    """LLVM's module and the target that it is for."""
    text, _ = machines.described(machine, describe, *constants)
    compiler = machines.target(machine)
    return machines.optimised(text, compiler), compiler


@pytest.mark.parametrize(
    ("machine", "product"), [(AARCH64, "fmla\tv"), (AVX512, "vfmadd231ps"), (AVX512, "%zmm31")]
)
def test_other_machines_get_their_vectors(machine: Machine, product: str) -> None:
    for describe, constants in ((stages.convolution, FORWARD), (stages.weight_gradient, WEIGHTS)):
        module, compiler = compiled(machine, describe, constants)
        assert product in compiler.emit_assembly(module) or product == "%zmm31"
        assert len(compiler.emit_object(module)) > 1000


MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <stdint.h>
void kernel(void **table);
int main(int argc, char **argv) {
  void *table[32]; int64_t size[32], number;
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  if (!fread(&number, 8, 1, in) || !fread(table, 8, 1, in)) return 1;
  for (int n = 1; n <= number; n++) {
    if (!fread(&size[n], 8, 1, in)) return 1;
    table[n] = malloc(size[n]);
    if (!fread(table[n], size[n], 1, in)) return 1;
  }
  #pragma omp parallel num_threads(2)
  kernel(table);
  for (int n = 1; n <= number; n++) fwrite(table[n], size[n], 1, out);
  return fclose(out);
}
"""
TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64-static")


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' and '.join(TOOLS)}")
@pytest.mark.parametrize("kernel", ["convolution", "weight_gradient"])
def test_an_arm_computes_the_same(kernel: str, tmp_path: Path) -> None:
    images, outputs, threads = 11, 7, 2
    frame = Frame(IMAGE, 7, (3, 5), AARCH64.lanes)
    plain = Frame(IMAGE, 7, (1, 1), AARCH64.lanes)
    z, q = (torch.randn(images, 7, IMAGE.angles, IMAGE.delays) for _ in range(2))
    norm, weights = torch.rand(6, 7), torch.randn(outputs, 7, 3, 5)
    arrays = {"frame": torch.zeros(threads, frame.size), "taps": forward_taps(frame)}
    active = torch.nn.functional.leaky_relu(z * at(norm, SCALE) + at(norm, SHIFT), SLOPE)
    if kernel == "convolution":
        arrays |= {"z": z, "norm": norm, "weights": weights, "out z": torch.zeros_like(z)}
        arrays["sums"] = torch.zeros(images, 2, outputs, AARCH64.lanes)
        found = on_arm(stages.convolution, FORWARD, arrays, images, tmp_path)["out z"]
        wanted = torch.nn.functional.conv2d(active, weights, padding=(1, 2))
    else:
        arrays |= {"in z": z, "in norm": norm, "z": z, "q": q, "norm": norm}
        arrays["plain"] = torch.zeros(threads, plain.size)
        arrays["sums"] = torch.empty(2, 105, outputs, AARCH64.lanes)
        sums = on_arm(stages.weight_gradient, WEIGHTS, arrays, images, tmp_path)["sums"]
        arrays = {"sums": sums, "weight": torch.zeros_like(weights)}
        found = on_arm(stages.weight_total, (105, outputs), arrays, images, tmp_path)["weight"]
        dz = q * at(norm, SCALE) + z * at(norm, OF_Z) + at(norm, CONSTANT)
        leaf = torch.zeros_like(weights).requires_grad_()
        y = torch.nn.functional.conv2d(active, leaf, padding=(1, 2))
        (wanted,) = torch.autograd.grad(y, [leaf], dz)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' and '.join(TOOLS)}")
def test_an_arm_normalises_as_the_layer_does(tmp_path: Path) -> None:
    """Ten images of one lane's width: the lanes' means are the values themselves."""
    layer = torch.nn.BatchNorm2d(7)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(10, 7, 1, AARCH64.lanes) + 3
    running = {"mean": torch.randn(7), "variance": torch.rand(7)}
    layer.running_mean, layer.running_var = (t.clone() for t in running.values())
    sums = torch.stack([x[:, :, 0], torch.zeros_like(x[:, :, 0])], 1)
    arrays = running | {"sums": sums, "norm": torch.zeros(6, 7)}
    arrays |= {"scale": layer.weight.detach(), "shift": layer.bias.detach()}
    constants = (Image(1, AARCH64.lanes), 7, layer.eps, layer.momentum)
    found = on_arm(norms.of_batch, constants, arrays, 10, tmp_path)
    y = x * at(found["norm"], SCALE) + at(found["norm"], SHIFT)
    torch.testing.assert_close(y, layer(x).detach())
    torch.testing.assert_close(found["mean"], layer.running_mean)
    torch.testing.assert_close(found["variance"], layer.running_var)


def at(norm: Tensor, row: int) -> Tensor:
    return norm[row].view(1, -1, 1, 1)


def on_arm(
    describe: machines.Describe,
    constants: Any,
    arrays: dict[str, Tensor],
    rows: int,
    folder: Path,
) -> dict[str, Tensor]:
    """What two threads of a kernel leave in its arrays on an emulated ARM."""
    _, names = machines.described(AARCH64, describe, *constants)
    module, compiler = compiled(AARCH64, describe, constants)
    (folder / "kernel.o").write_bytes(compiler.emit_object(module))
    (folder / "main.c").write_text(MAIN)
    compile_ = [TOOLS[0], "-static", "-fopenmp", "-o", "program", "main.c", "kernel.o"]
    subprocess.run(compile_, cwd=folder, check=True, timeout=60)
    values = [arrays[name].contiguous().numpy() for name in names]
    with (folder / "in").open("wb") as file:
        file.write(np.array([len(values), rows]).tobytes())
        for value in values:
            file.write(np.array([value.nbytes]).tobytes() + value.tobytes())
    subprocess.run([TOOLS[1], "./program", "in", "out"], cwd=folder, check=True, timeout=60)
    data, found = (folder / "out").read_bytes(), {}
    for name, value in zip(names, values, strict=True):
        part, data = data[: value.nbytes], data[value.nbytes :]
        found[name] = torch.from_numpy(np.frombuffer(part, value.dtype).reshape(value.shape).copy())
    return found
