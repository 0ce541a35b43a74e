"""One layer for several modules, whose weights are stacked.

Shapes: U modules, B rows each, I and O inputs and outputs (of images: channels), A angles, D
delays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from csipipe.models import kernels, layers
from csipipe.models.crblock import CRBlock
from csipipe.models.layers import Deferring, Pending, fused
from csipipe.models.norm import BatchNorm2d
from csipipe.settings.config import KernelsBy


class _Linear(Deferring):
    """(U, B, …, I) → (U, B, …, O), with weights (U, O, I) and biases (U, O)."""

    rows = 1

    def __init__(self, like: nn.Linear, of: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = of["weight"], of.get("bias")
        self.kernels_by: KernelsBy = getattr(like, "kernels_by", "torch")

    def forward(self, x: Tensor) -> Tensor:
        return layers.apply(self, x.flatten(1, -2)).view(*x.shape[:-1], -1)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products = kernels.products(self.kernels_by, x, weight)
        if products is not None:
            return products.linear(x, weight, bias)
        weight = weight.mT
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)

    def input_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        products = kernels.products(self.kernels_by, gradient, self.weight)
        if products is not None:
            return products.input_gradient(gradient, self.weight)
        return torch.bmm(gradient, self.weight.to(gradient.dtype))

    def weight_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.bmm(gradient.mT, x), None if self.bias is None else gradient.sum(1)


class StackedConv2d(nn.Module):
    """(U, B, I, A, D) → (U, B, O, A, D); weights (U, O, I, KH, KW), biases (U, O)."""

    pending: list[Pending] | None = None
    """None: its weights' gradients don't wait."""
    wide = False
    like: layers.Conv2d

    def __init__(self, like: layers.Conv2d, of: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["like"] = like  # no submodule: its weights aren't this one's
        self.kernels_by = like.kernels_by
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.padding, self.weight, self.bias = like.padding, of["weight"], of.get("bias")

    @property
    def shape(self) -> Hashable:
        return self.like.shape

    def fresh(self) -> StackedConv2d:
        """Two new layers of this shape, as one."""
        return cast(StackedConv2d, _stacked([self.like.fresh() for _ in range(2)]))

    def forward(self, x: Tensor) -> Tensor:
        backend = kernels.choose(self, x).backend
        if backend is not None:
            return fused(self, backend, x)
        bias = None if self.bias is None else self.bias.flatten()
        weight, groups = self.weight.flatten(0, 1), len(x)
        beside = functional.conv2d(_beside(x), weight, bias, padding=self.padding, groups=groups)
        return _apart(beside, groups)


class StackedBatchNorm2d(nn.Module):
    """(U, B, C, A, D) → the same shape; weights, biases and running statistics (U, C).

    Training or evaluation mode is that of the module that it is like.

    Attributes:
        leaky: a LeakyReLU that it applies, too; see `paired`.
    """

    affine = track_running_stats = True
    pending: list[Pending] | None = None
    """None: its weights' gradients don't wait."""
    wide = True
    like: nn.BatchNorm2d
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, like: nn.BatchNorm2d, of: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["like"] = like  # no submodule: its weights aren't this one's
        self.kernels_by: KernelsBy = getattr(like, "kernels_by", "torch")
        self.momentum, self.eps = cast(float, like.momentum), like.eps
        self.leaky: nn.LeakyReLU | None = None
        for name, tensor in of.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    @property
    def slope(self) -> float:
        """What negative outputs are multiplied by; 1 without a LeakyReLU."""
        return 1.0 if self.leaky is None else self.leaky.negative_slope

    @property
    def shape(self) -> Hashable:
        return self.like.num_features, self.slope

    def fresh(self) -> StackedBatchNorm2d:
        """Two new layers of this shape, as one."""
        like = BatchNorm2d(self.like.num_features, self.eps, self.momentum)
        fresh = cast(StackedBatchNorm2d, _stacked([like, copy.deepcopy(like)]))
        fresh.leaky = self.leaky
        return fresh

    def forward(self, x: Tensor) -> Tensor:
        self.training = self.like.training
        if self.training:
            backend = kernels.choose(self, x).backend
            if backend is not None:
                return fused(self, backend, x)
            self.num_batches_tracked.add_(1)
        beside = functional.batch_norm(
            _beside(x),
            self.running_mean.view(-1),  # views, which follow
            self.running_var.view(-1),
            self.weight.flatten(),
            self.bias.flatten(),
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        y = _apart(beside, len(x))
        return y if self.leaky is None else self.leaky(y)


class _CRBlock(nn.Module):
    """(U, B, 2, A, D) → the same shape, by layers that are grouped ones."""

    def __init__(self, like: CRBlock, of: dict[str, Tensor]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(_chain(p, of, f"paths.{n}.") for n, p in enumerate(like.paths))
        self.act, self.join = like.act, _chain(like.join, of, "join.")

    def forward(self, x: Tensor) -> Tensor:
        joined = self.join(self.act(torch.cat([path(x) for path in self.paths], dim=2)))
        out: Tensor = self.act(joined + x)
        return out


def _chain(like: nn.Module, of: dict[str, Tensor], prefix: str) -> nn.Sequential:
    """The layers of a Sequential within a layer, whose tensors' names begin with `prefix`."""
    names = {id(module): name for name, module in like.named_modules()}
    chain = []
    for layer in in_order(like):
        start = f"{prefix}{names[id(layer)]}."
        mine = {n.removeprefix(start): t for n, t in of.items() if n.startswith(start)}
        chain.append(MAKERS[type(layer)](layer, mine))
    return nn.Sequential(*paired(chain))


def paired(chain: Iterable[nn.Module]) -> list[nn.Module]:
    """Layers that follow each other, each BatchNorm with the LeakyReLU directly behind it.

    A GPU's kernels apply both at once; by itself the LeakyReLU reads and writes all there is again.
    """
    found: list[nn.Module] = []
    for layer in chain:
        before = found[-1] if found else None
        if (
            isinstance(layer, nn.LeakyReLU)
            and isinstance(before, StackedBatchNorm2d)
            and before.leaky is None
        ):
            before.leaky = layer
        else:
            found.append(layer)
    return found


def _beside(x: Tensor) -> Tensor:
    """(U, B, C, A, D) → (B, U·C, A, D): copied only where it doesn't lie like that."""
    return x.transpose(0, 1).flatten(1, 2)


def _apart(x: Tensor, modules: int) -> Tensor:
    """(B, U·C, A, D) → (U, B, C, A, D), a view."""
    return x.view(len(x), modules, -1, *x.shape[2:]).transpose(0, 1)


def _same_for_all(like: nn.Module, of: dict[str, Tensor]) -> nn.Module:
    return like


def _flatten(like: nn.Flatten, of: dict[str, Tensor]) -> nn.Module:
    last = like.end_dim
    return nn.Flatten(like.start_dim + 1, last if last < 0 else last + 1)


def _unflatten(like: Any, of: dict[str, Tensor]) -> nn.Module:
    return nn.Unflatten(like.dim + 1, like.unflattened_size)


MAKERS: dict[type[nn.Module], Callable[[Any, dict[str, Tensor]], nn.Module]] = {
    layers.Linear: _Linear,
    nn.Linear: _Linear,
    layers.Conv2d: StackedConv2d,
    layers.Pointwise: StackedConv2d,
    CRBlock: _CRBlock,
    BatchNorm2d: StackedBatchNorm2d,
    nn.BatchNorm2d: StackedBatchNorm2d,
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.LeakyReLU: _same_for_all,
    nn.Hardsigmoid: _same_for_all,
    nn.Sigmoid: _same_for_all,
}
"""How a layer becomes one for several modules, given theirs stacked."""


class Place:
    """One layer of all modules.

    Attributes:
        own: each module's parameters and buffers, by name; views of the stacked ones.
    """

    def __init__(self, same: Sequence[nn.Module]) -> None:
        self.like = same[0]
        self.own: dict[str, list[Tensor]] = {}
        self._all: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._copied: Tensor | None = None
        tensors = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in same]
        for name in tensors[0]:
            own = [of_one[name] for of_one in tensors]
            self._all[name] = torch.stack([tensor.detach() for tensor in own])
            self.own[name] = own
            for tensor, view in zip(own, self._all[name].unbind(), strict=True):
                tensor.data = view

    def take(self, chosen: Sequence[int]) -> nn.Module:
        """The layer of the chosen modules: without copying where they lie side by side."""
        first, end = chosen[0], chosen[-1] + 1
        beside = list(chosen) == list(range(first, end))
        device = next(iter(self._all.values())).device if self._all else None
        self._copied = None if beside else torch.tensor(chosen, device=device)
        self._now = {}
        for name, of_all in self._all.items():
            some = of_all[first:end] if beside else of_all[self._copied]
            like = self.own[name][0]
            is_weight = isinstance(like, nn.Parameter)
            self._now[name] = nn.Parameter(some, like.requires_grad) if is_weight else some
        return MAKERS[type(self.like)](self.like, self._now)

    def leaves(self) -> list[tuple[str, Tensor]]:
        """The parameters that are computed with, by name."""
        return [(name, tensor) for name, tensor in self._now.items() if tensor.requires_grad]

    def keep_buffers(self) -> None:
        """Write back the buffers that were copied."""
        if self._copied is not None:
            for name, tensor in self._now.items():
                if not isinstance(self.own[name][0], nn.Parameter):
                    self._all[name][self._copied] = tensor


def _stacked(same: Sequence[nn.Module]) -> nn.Module:
    """One layer for several of one make."""
    return Place(same).take(range(len(same)))


def in_order(module: nn.Module) -> Iterable[nn.Module]:
    """The layers of nested `Sequential`s."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from in_order(child)
    else:
        yield module
