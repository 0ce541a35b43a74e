"""A convolution of few channels on a CPU: forward, input gradient, weight gradients.

Shapes: B images, I and O channels, A angles, D delays.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from csipipe.models.kernels.llvm import stages, steps
from csipipe.models.kernels.llvm.host import image_of, library, reason_against
from csipipe.models.kernels.llvm.image import Image, Size
from csipipe.models.kernels.llvm.program import Program
from csipipe.models.layers import Conv2d

LARGEST = 16
"""Channels; PyTorch is good at more."""


def reason(layer: Conv2d, x: Tensor) -> str | None:
    """Why these kernels can't compute this layer on this input; None if they can."""
    if max(layer.in_channels, layer.out_channels) > LARGEST:
        return f"they take no more than {LARGEST} channels"
    return reason_against(layer, x)


def forward(layer: Conv2d, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """(B, I, A, D) → (B, O, A, D), and the input."""
    x = x.contiguous()
    out = x.new_empty(len(x), layer.out_channels, *x.shape[2:])
    bias = x.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
    program = _forward(image_of(x), layer.in_channels, layer.size, layer.out_channels)
    program.run(len(x), {"x": x, "out z": out, "weights": layer.weight, "bias": bias})
    return out, x


def input_gradient(
    layer: Conv2d, x: Tensor, dy: Tensor, wanted: bool = True
) -> tuple[Tensor | None, Tensor]:
    """(B, I, A, D) if it is wanted, and the gradient at the output."""
    dy = dy.contiguous()
    if not wanted:
        return None, dy
    dx = torch.zeros_like(x)
    program = _input_gradient(image_of(x), layer.in_channels, layer.size, layer.out_channels)
    program.run(len(x), {"x": dy, "dx": dx, "weights": layer.weight})
    return dx, dy


def weight_gradients(layer: Conv2d, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of weight and bias, if it has one."""
    shape = layer.in_channels, layer.size, layer.out_channels
    weight = torch.empty_like(layer.weight)
    arrays = {"in x": x, "x": dy, "weight": weight, "sums": steps.weight_sums(len(x), *shape)}
    _weight_gradient(image_of(x), *shape).run(len(x), arrays)
    return [weight] if layer.bias is None else [weight, dy.sum((0, 2, 3))]


@functools.cache
def _forward(image: Image, inputs: int, size: Size, outputs: int) -> Program:
    arrays = {name: name for name in ("x", "out z", "weights", "bias")}
    return Program(
        library(), [steps.forward(image, "stored", inputs, size, outputs, True, False, arrays)]
    )


@functools.cache
def _input_gradient(image: Image, inputs: int, size: Size, outputs: int) -> Program:
    arrays = {name: name for name in ("x", "dx", "weights")}
    describe = stages.input_backward
    return Program(
        library(), [steps.back(describe, image, "stored", outputs, size, inputs, arrays)]
    )


@functools.cache
def _weight_gradient(image: Image, inputs: int, size: Size, outputs: int) -> Program:
    arrays = {name: name for name in ("in x", "x", "sums")}
    return Program(
        library(),
        steps.weight_gradient(image, "stored", inputs, size, "stored", outputs, arrays, "weight"),
    )
