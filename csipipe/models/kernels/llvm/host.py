"""Whether kernels run here, and those that a process has."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor, nn

from csipipe.models.kernels.llvm.image import Image
from csipipe.models.kernels.llvm.machine import Library, this_machine


def reason_against(module: nn.Module, x: Tensor) -> str | None:
    """Why kernels can't compute a module on an input; None if they can."""
    if x.device.type != "cpu":
        return f"they are for CPUs, and the input is on {x.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "they compute in float32, and autocast is on"
    for tensor in (x, *module.parameters()):
        if tensor.dtype != torch.float32:
            return f"they compute in float32, and there is {tensor.dtype}"
    if not x.numel():
        return "there are no rows"
    return _library_or_reason()[1]


def library() -> Library:
    """This machine's kernels."""
    found = _library_or_reason()[0]
    assert found is not None
    return found


def image_of(x: Tensor) -> Image:
    """Size of the images in (B, C, A, D)."""
    return Image(x.shape[2], x.shape[3])


@functools.cache
def _library_or_reason() -> tuple[Library | None, str | None]:
    machine = this_machine()
    if machine is None:
        return None, f"no vectors of this machine ({platform.machine()}) are known"
    return Library(machine), None
