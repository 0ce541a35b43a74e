"""Linear and Conv2d whose weight gradients can wait.

Others wait for the gradient at a layer's input; the weight gradients are only needed at the
optimiser's step. `put_off` makes a module's layers append the latter to a list, to be computed by
`accumulate` when there is time. At once or later, the numbers per micro-batch are the same, to the
bit.

Shapes: B rows, I and O inputs and outputs (of Conv2d: channels), A angles, D delays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from csipipe.models import kernels
from csipipe.models.backward import backward
from csipipe.models.kernels import Backend
from csipipe.settings.config import KernelsBy


class Pending(ABC):
    """Weight gradients that were put off."""

    @abstractmethod
    def gradients(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Parameters and their gradients, computed now."""


class Deferring(nn.Module):
    """A module whose weight gradients can wait."""

    pending: list[Pending] | None = None
    """Where they go; None: computed at once."""
    wide = False
    """See `Fused`."""
    rows = 0
    """Which axis of the input the rows are."""


class Fused(Protocol):
    """A module that a backend computes, and whose weight gradients may wait."""

    training: bool
    pending: list[Pending] | None
    wide: bool
    """Autocast leaves its input as it is."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Splittable(Protocol):
    """A layer whose backward pass comes in two parts."""

    weight: Any
    bias: Any
    rows: int
    """Which axis of its input the rows are."""
    pending: list[Pending] | None

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Forward pass."""

    def input_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient at the input, shape of `x`."""

    def weight_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias."""


@dataclass
class LayerGradients(Pending):
    """A layer's, from its input and the gradient at its output."""

    layer: Splittable
    x: Tensor
    gradient: Tensor

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        found = self.layer.weight_gradients(self.x, self.gradient)
        for parameter, gradient in zip((self.layer.weight, self.layer.bias), found, strict=True):
            if parameter is not None and gradient is not None:
                yield parameter, gradient


class Linear(Deferring, nn.Linear):
    """(B, …, I) → (B, …, O)."""

    kernels_by: KernelsBy = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products = kernels.products(self.kernels_by, x, weight)
        if products is not None:
            return products.linear(x, weight, bias)
        return functional.linear(x, weight, bias)

    def input_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        products = kernels.products(self.kernels_by, gradient, self.weight)
        if products is not None:
            return products.input_gradient(gradient, self.weight)
        return gradient @ self.weight.to(gradient.dtype)

    def weight_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        return gradient.t() @ x, None if self.bias is None else gradient.sum(0)


class Conv2d(Deferring, nn.Conv2d):
    """Convolution with stride 1 that keeps the image's size: (B, I, A, D) → (B, O, A, D).

    Raises:
        ValueError: a kernel of even size, which can't.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        bias: bool,
        kernels_by: KernelsBy = "torch",
    ) -> None:
        if not all(size % 2 for size in kernel):
            raise ValueError(
                f"Conv2d's kernel is {tuple(kernel)}; both sizes must be odd, so that the image "
                "keeps its size. Use torch.nn.Conv2d for others."
            )
        padding = (kernel[0] // 2, kernel[1] // 2)
        super().__init__(inputs, outputs, kernel, padding=padding, bias=bias)
        self.size, self.kernels_by = kernel, kernels_by

    @property
    def shape(self) -> Hashable:
        return self.in_channels, self.out_channels, self.size, self.bias is None

    def fresh(self) -> Conv2d:
        """A new layer of this shape."""
        biased = self.bias is not None
        return Conv2d(self.in_channels, self.out_channels, self.size, biased, self.kernels_by)

    def forward(self, x: Tensor) -> Tensor:
        backend = kernels.choose(self, x).backend
        return apply(self, x) if backend is None else fused(self, backend, x)

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


class Pointwise(Conv2d):
    """A 1×1 convolution: on a CPU a product per row, five times as fast as a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, (1, 1), bias=False)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._as_product(x):
            return super().run(x, weight, bias)
        return self._product(weight.flatten(1), x)

    def input_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        if not self._as_product(gradient):
            return super().input_gradient(x, gradient)
        return self._product(self.weight.detach().to(gradient.dtype).flatten(1).t(), gradient)

    def weight_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._as_product(gradient):
            return super().weight_gradients(x, gradient)
        of_rows = torch.bmm(gradient.flatten(2), x.flatten(2).transpose(1, 2))
        return of_rows.sum(0).view_as(self.weight), None

    @staticmethod
    def _as_product(x: Tensor) -> bool:
        """Not where the layer is looked at: what is exported is a convolution."""
        return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()

    @staticmethod
    def _product(weight: Tensor, x: Tensor) -> Tensor:
        found = torch.bmm(weight.expand(len(x), *weight.shape), x.flatten(2))
        return found.view(len(x), len(weight), *x.shape[2:])


def apply(layer: Splittable, x: Tensor) -> Tensor:
    """A layer's output, its weight gradients now or later."""
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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Splittable
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        layer: Splittable = ctx.layer
        weight = bias = None
        if any(ctx.needs_input_grad[1:3]):
            weight, bias = layer.weight_gradients(x, gradient)
        if layer.pending is not None:
            layer.pending.append(LayerGradients(layer, x, gradient))
        first = layer.input_gradient(x, gradient) if ctx.needs_input_grad[0] else None
        return first, weight, bias, None


@dataclass
class FusedGradients(Pending):
    """A module's, by the backend that computes it."""

    module: Fused
    backend: Backend
    saved: Any
    rest: Any

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        found = self.backend.weight_gradients(self.module, self.saved, self.rest)
        yield from zip(self.module.parameters(), found, strict=True)


def fused(module: Fused, backend: Backend, x: Tensor) -> Tensor:
    """A module's output, computed by a backend."""
    x = x if module.wide else kernels.computed(x)
    if not torch.is_grad_enabled():
        return backend.forward(module, x, module.training)[0]
    # as in `apply`: out of autograd's sight where they wait
    seen = () if module.pending is not None else tuple(module.parameters())
    y: Tensor = _Fused.apply(x, module, backend, *seen)  # type: ignore[no-untyped-call]
    return y


class _Fused(torch.autograd.Function):
    """A module by a backend, its backward pass cut in two."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Fused, backend: Backend, *parameters: Tensor
    ) -> Tensor:
        y, ctx.saved = backend.forward(module, x, module.training)
        ctx.module, ctx.backend = module, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        module, backend, saved = ctx.module, ctx.backend, ctx.saved
        del ctx.saved  # as large as the activations
        dx, rest = backend.input_gradient(module, saved, gradients[0], ctx.needs_input_grad[0])
        wanted = ctx.needs_input_grad[3:]
        found: list[Tensor | None] = [None] * len(wanted)
        if module.pending is not None:
            module.pending.append(FusedGradients(module, backend, saved, rest))
        elif any(wanted):
            of_all = backend.weight_gradients(module, saved, rest)
            found = [g if wants else None for g, wants in zip(of_all, wanted, strict=True)]
        return (dx, None, None, *found)


def put_off(modules: Iterable[nn.Module]) -> list[Pending]:
    """From here on the layers of `modules` append their weight gradients to the returned list."""
    pending: list[Pending] = []
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, Deferring):
                layer.pending = pending
    return pending


def accumulate(pending: Iterable[Pending]) -> None:
    """Add postponed gradients to those of the weights, calling the parameters' hooks."""
    sums: dict[Tensor, Tensor] = {}
    add_up(pending, sums)
    hand_over(sums)


@torch.no_grad()
def add_up(pending: Iterable[Pending], sums: dict[Tensor, Tensor]) -> None:
    """Add postponed gradients to sums by parameter, those of a micro-batch in one operation.

    A parameter's are added one after the other, in the order of the entries. Frozen ones get none.
    """
    found: dict[Tensor, Tensor] = {}
    for entry in pending:
        for parameter, gradient in entry.gradients():
            if not parameter.requires_grad:
                continue
            if parameter in found:
                _add(found, sums)
            found[parameter] = gradient.to(parameter.dtype)
    _add(found, sums)


def _add(found: dict[Tensor, Tensor], sums: dict[Tensor, Tensor]) -> None:
    """Add one gradient per parameter, and forget them."""
    again = [parameter for parameter in found if parameter in sums]
    if again:
        torch._foreach_add_([sums[p] for p in again], [found.pop(p) for p in again])
    sums |= found
    found.clear()


def hand_over(sums: dict[Tensor, Tensor]) -> None:
    """Add sums to the gradients of their weights, calling the parameters' hooks; empties them."""
    if sums:
        parameters, gradients = list(sums), list(sums.values())
        sums.clear()
        backward(parameters, gradients)


def joined(pending: Iterable[Pending]) -> list[Pending]:
    """The entries of each layer as one, over all their rows: one large product instead of many.

    What isn't a single layer's stays as it is.
    """
    whole: list[Pending] = []
    of_layer: dict[Splittable, list[LayerGradients]] = {}
    for entry in pending:
        if isinstance(entry, LayerGradients):
            of_layer.setdefault(entry.layer, []).append(entry)
        else:
            whole.append(entry)
    for layer, entries in of_layer.items():
        x = torch.cat([entry.x for entry in entries], layer.rows)
        gradient = torch.cat([entry.gradient for entry in entries], layer.rows)
        whole.append(LayerGradients(layer, x, gradient))
    return whole
