"""A convolution of few channels on a GPU: forward, input gradient, weight gradients.

Shapes: B images, I and O channels, A angles, D delays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csipipe.models.kernels.triton import host
from csipipe.models.layers import Conv2d

LARGEST = 7
"""Channels; PyTorch is good at more."""


def reason(layer: Conv2d, x: Tensor) -> str | None:
    """Why these kernels can't compute this layer on this input; None if they can."""
    if max(layer.in_channels, layer.out_channels) > LARGEST:
        return f"they take no more than {LARGEST} channels"
    return host.reason_against(layer, x)


def forward(layer: Conv2d, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """(B, I, A, D) → (B, O, A, D), and the input."""
    x = x.contiguous()
    out = x.new_empty(len(x), layer.out_channels, *x.shape[2:])
    host.forward(_tiles(x), x, layer.weight, out, bias=layer.bias)
    return out, x


def input_gradient(layer: Conv2d, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(B, I, A, D), and the gradient at the output."""
    dy, dx = dy.contiguous(), torch.empty_like(x)
    host.backward(_tiles(x), host.Gradient(dy), layer.weight, dx)
    return dx, dy


def weight_gradients(layer: Conv2d, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of weight and bias, if it has one."""
    biased = layer.bias is not None
    (found,) = host.weight_gradients(_tiles(x), host.Gradient(dy), layer.weight, x, bias=biased)
    weight, bias = found[: layer.weight.numel()], found[layer.weight.numel() :]
    return [weight.view_as(layer.weight), *([bias] if biased else [])]


def _tiles(x: Tensor) -> host.Tiles:
    return host.Tiles(len(x), *x.shape[2:])
