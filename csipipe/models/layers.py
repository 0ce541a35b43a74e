"""Linear and Conv2d whose weight gradients can wait.

Others wait for the gradient at a layer's input; the weight gradients are only needed at the
optimiser's step. `put_off` makes a module's layers append the latter to a list, to be computed by
`accumulate` when there is time. At once or later, the numbers per micro-batch are the same, to the
bit.

Shapes: B rows, I and O inputs and outputs (of Conv2d: channels), A angles, D delays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Pending:
    """A postponed weight gradient: the layer, its input and the gradient at its output."""

    layer: Linear | Conv2d
    x: Tensor
    gradient: Tensor


class Linear(nn.Linear):
    """(B, I) → (B, O)."""

    pending: list[Pending] | None = None
    """Where weight gradients go; None: computed at once."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, I) → (B, O)."""
        return _apply(self, x)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Forward pass."""
        return functional.linear(x, weight, bias)

    def input_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient at the input, shape of `x`."""
        return gradient @ self.weight.to(gradient.dtype)

    def weight_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias."""
        return gradient.t() @ x, None if self.bias is None else gradient.sum(0)


class Conv2d(nn.Conv2d):
    """Convolution with stride 1 that keeps the image's size: (B, I, A, D) → (B, O, A, D)."""

    pending: list[Pending] | None = None
    """As `Linear.pending`."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], bias: bool) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2)
        super().__init__(inputs, outputs, kernel, padding=padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, A, D) → (B, O, A, D)."""
        return _apply(self, x)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, weight, bias, padding=self.padding)

    def input_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        weight = self.weight.to(gradient.dtype)
        if gradient.device.type == "cpu":
            # the same sum as a forward convolution with the kernel turned by 180°: oneDNN has no
            # fast way back through so few channels and takes two to four times as long
            turned = weight.flip(2, 3).transpose(0, 1).contiguous()
            dx: Tensor = functional.conv2d(gradient, turned, padding=self.padding)
            return dx
        return self._backward(x, gradient, weight, (True, False, False))[0]

    def weight_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.weight.to(gradient.dtype)
        wanted = (False, True, self.bias is not None)
        _, dw, db = self._backward(x, gradient, weight, wanted)
        return dw, db

    def _backward(
        self, x: Tensor, gradient: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [self.out_channels] if wanted[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            wanted,
        )
        return found


def _apply(layer: Linear | Conv2d, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return layer.run(x, layer.weight, layer.bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight, bias = layer.weight, layer.bias
    if layer.pending is not None:
        assert x.requires_grad, "a weight gradient can wait only where the input has one"
        # hidden from autograd, which calls a parameter's hooks even for a gradient left out
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    y: Tensor = _Layer.apply(x, weight, bias, layer)  # type: ignore[no-untyped-call]
    return y


class _Layer(torch.autograd.Function):
    """A layer whose backward pass is split in two."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Linear | Conv2d
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        layer: Linear | Conv2d = ctx.layer
        weight = bias = None
        if ctx.needs_input_grad[1]:
            weight, bias = layer.weight_gradients(x, gradient)
        if layer.pending is not None:
            layer.pending.append(Pending(layer, x, gradient))
        first = layer.input_gradient(x, gradient) if ctx.needs_input_grad[0] else None
        return first, weight, bias, None


def put_off(modules: Iterable[nn.Module]) -> list[Pending]:
    """From here on the layers of `modules` append their weight gradients to the returned list."""
    pending: list[Pending] = []
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, Linear | Conv2d):
                layer.pending = pending
    return pending


def accumulate(pending: Iterable[Pending]) -> None:
    """Add postponed gradients to those of the weights, calling the parameters' hooks."""
    for entry in pending:
        gradients = entry.layer.weight_gradients(entry.x, entry.gradient)
        for parameter, gradient in zip(
            (entry.layer.weight, entry.layer.bias), gradients, strict=True
        ):
            if parameter is not None and gradient is not None:
                torch.autograd.backward(parameter, gradient.to(parameter.dtype))


def joined(pending: Iterable[Pending]) -> list[Pending]:
    """The entries of each layer joined over all their rows: one large product instead of many."""
    of_layer: dict[Linear | Conv2d, list[Pending]] = {}
    for entry in pending:
        of_layer.setdefault(entry.layer, []).append(entry)
    return [
        Pending(layer, torch.cat([e.x for e in entries]), torch.cat([e.gradient for e in entries]))
        for layer, entries in of_layer.items()
    ]
