"""A convolution of few channels on a GPU: forward, input gradient, weight gradients.

Shapes: B images, I and O channels, A angles, D delays; of U stacked layers (U, B, …), with weights
(U, O, I, KH, KW) and biases (U, O).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csipipe.models.kernels.triton import host

LARGEST = 7
"""Channels; PyTorch is good at more."""


def reason(layer: Any, x: Tensor) -> str | None:
    """Why these kernels can't compute this layer on this input; None if they can."""
    if max(layer.in_channels, layer.out_channels) > LARGEST:
        return f"they take no more than {LARGEST} channels"
    return host.reason_against(layer, x)


def forward(layer: Any, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """(B, I, A, D) → (B, O, A, D), and the input."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-3], layer.out_channels, *x.shape[-2:])
    host.forward(_tiles(x), x, layer.weight, out, bias=layer.bias)
    return out, x


def input_gradient(
    layer: Any, x: Tensor, dy: Tensor, wanted: bool = True
) -> tuple[Tensor | None, Tensor]:
    """(B, I, A, D) if it is wanted, and the gradient at the output."""
    dy = dy.contiguous()
    if not wanted:
        return None, dy
    dx = torch.empty_like(x)
    host.backward(_tiles(x), host.Gradient(dy), layer.weight, dx)
    return dx, dy


def weight_gradients(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of weight and bias, if it has one."""
    biased = layer.bias is not None
    found = host.weight_gradients(_tiles(x), host.Gradient(dy), layer.weight, x, bias=biased)
    size = layer.weight.numel() // len(found)
    weight = found[:, :size].reshape(layer.weight.shape)
    return [weight, found[:, size:].reshape(layer.bias.shape)] if biased else [weight]


def _tiles(x: Tensor) -> host.Tiles:
    groups = len(x) if x.dim() == 5 else 1
    return host.Tiles(x.shape[-4] * groups, x.shape[-2], x.shape[-1], groups)
