"""A convolution of few channels on a CPU: forward, input gradient, weight gradients.

Shapes: B images, I and O channels, A angles, D delays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.host import image_of, reason_against, runner
from csipipe.models.kernels.llvm.runner import backward_taps, forward_taps
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
    x, image = x.contiguous(), image_of(x)
    frame = runner().frame(image, layer.in_channels, layer.size)
    out = x.new_empty(len(x), layer.out_channels, *x.shape[2:])
    bias = x.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
    arrays = {"x": x, "out z": out, "weights": layer.weight, "bias": bias}
    constants = (image, "stored", layer.in_channels, layer.size, layer.out_channels, False)
    runner().run(stages.convolution, constants, len(x), arrays, frame, forward_taps(frame))
    return out, x


def input_gradient(
    layer: Conv2d, x: Tensor, dy: Tensor, wanted: bool = True
) -> tuple[Tensor | None, Tensor]:
    """(B, I, A, D) if it is wanted, and the gradient at the output."""
    dy, image = dy.contiguous(), image_of(dy)
    if not wanted:
        return None, dy
    frame = runner().frame(image, layer.out_channels, layer.size)
    dx = torch.zeros_like(x)
    constants = (image, "stored", layer.out_channels, layer.size, layer.in_channels)
    taps = backward_taps(frame, layer.in_channels)
    arrays = {"x": dy, "dx": dx, "weights": layer.weight}
    runner().run(stages.input_backward, constants, len(x), arrays, frame, taps)
    return dx, dy


def weight_gradients(layer: Conv2d, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of weight and bias, if it has one."""
    arrays = {"in x": x, "x": dy}
    weight = runner().weight_gradient(image_of(x), "stored", "stored", arrays, layer.weight, len(x))
    return [weight] if layer.bias is None else [weight, dy.sum((0, 2, 3))]
