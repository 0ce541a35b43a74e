"""Triton's kernels compiled by all processors, into the cache that the other steps read.

One process compiles what it launches, one kernel after the other: a minute, before each of the
other steps could begin to measure.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import zlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from csipipe.gpucheck.findings import Step
from csipipe.models import kernels
from csipipe.models.crblock import SLOPE, CRBlock
from csipipe.models.layers import Conv2d
from csipipe.models.norm import BatchNorm2d
from csipipe.models.stacked import Stack
from csipipe.settings.config import CRNET_KERNELS

_LONGEST = 60.0
"""Seconds that are waited for them."""
_ROWS = 16
"""As few rows as have the code of many: Triton compiles anew for a size that 16 doesn't divide."""


def run(step: Step) -> None:
    """Compile them, where there is a GPU and Triton."""
    if step.tiny or find_spec("triton") is None:
        step.add("kernels", "none: they are compiled for a GPU, by Triton")
        return
    workers = max(1, (os.cpu_count() or 2) - 1)
    shares = [(number, workers) for number in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        wait = min(_LONGEST, step.left - 2)
        try:
            found = pool.map_async(compile_share, shares).get(wait)
        except multiprocessing.TimeoutError:  # the steps that need the rest compile it
            step.add("kernels compiled", f"not all within {wait:.0f} s")
            return
    step.add("kernels compiled", f"{sum(found)} launches by {workers} processes")


def compile_share(share: tuple[int, int]) -> int:
    """One process's share of the kernels; how many launches it let pass.

    Args:
        share: its number among so many processes.
    """
    number, processes = share
    jit: Any = importlib.import_module("triton.runtime").JITFunction
    launch, mine = jit.run, itertools.count()

    def only(self: Any, *args: Any, **options: Any) -> Any:
        if belongs(self.fn.__name__, options, processes) != number:
            return None  # what the others would compute is left out
        next(mine)
        return launch(self, *args, **options)

    jit.run = only
    try:
        launch_all(torch.device("cuda"), 32)
        torch.cuda.synchronize()
    finally:
        jit.run = launch
    return next(mine)


def belongs(name: str, options: dict[str, Any], processes: int) -> int:
    """Which of so many processes compiles a kernel with these constants, for all types."""
    constants = sorted((k, str(v)) for k, v in options.items() if isinstance(v, int | float))
    return zlib.crc32(repr((name, constants)).encode()) % processes


def launch_all(device: torch.device, size: int) -> None:
    """Launch every kernel of the default model on few images of `size` angles and delays."""
    loss, product = (
        importlib.import_module(f"csipipe.models.kernels.triton.{name}")
        for name in ("loss", "product")
    )
    pair = Stack([nn.Sequential(BatchNorm2d(2), nn.LeakyReLU(SLOPE)).to(device)])
    modules = CRBlock(CRNET_KERNELS), Conv2d(2, 2, (3, 3), True), BatchNorm2d(2)
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.zeros(_ROWS, 2, size, size, device=device)
        leaf = images.to(dtype).requires_grad_()
        torch.autograd.backward(loss.loss_and_floor(leaf, images)[0].sum())
        x = leaf.detach()
        for module in (*(module.to(device) for module in modules), *pair._layers):
            backend: Any = kernels._load("triton", type(module).__name__)
            stacked = x[None] if module in pair._layers else x
            for training in (True, False) if isinstance(module, CRBlock) else (True,):
                y, saved = backend.forward(module, stacked, training)
                _, rest = backend.input_gradient(module, saved, y)
                backend.weight_gradients(module, saved, rest)
    for terms, tile in itertools.product((256, 2048), product.TILES):
        x, weight = (torch.zeros(2, rows, terms, device=device) for rows in (_ROWS, 96))
        y = product.linear(x, weight, torch.zeros(2, 96, device=device), tile)
        product.input_gradient(y, weight, tile)
