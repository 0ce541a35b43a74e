"""Several modules of one make, each with weights of its own, computed as one.

Convolutions and BatchNorms become grouped ones, linear layers batched products, so that the number
of calls doesn't grow with the number of modules. The modules stay what they are: their weights,
gradients and buffers become views of the stack's, so that whoever knows a module by itself (an
optimiser, a checkpoint) needn't know that there is a stack.

Shapes: U modules, B rows each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from csipipe.models.layers import Deferring, Pending
from csipipe.models.stackedlayers import MAKERS, Place, in_order, paired


class Unstackable(ValueError):
    """Modules that can't be stacked, and why."""


class Stack:
    """Modules that are computed together, all or some of them.

    Training or evaluation mode is that of the first one.

    Args:
        modules: `Sequential`s of the same layers; the weights are theirs.

    Raises:
        Unstackable: they hold other layers than those that are known here, or differ.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self._places = [Place(same) for same in _places(modules)]
        self._pending: list[Pending] | None = None
        self._chosen: Sequence[int] = ()
        self._layers: list[nn.Module] = []
        self.take(range(len(modules)))

    def take(self, chosen: Sequence[int]) -> None:
        """From now on compute these, ascending, with the weights that they have now."""
        if self._layers and len(chosen) == len(self._chosen) == len(self.modules):
            return
        self._chosen = chosen
        self._layers = paired(place.take(chosen) for place in self._places)
        if self._pending is not None:
            self.put_off(self._pending)

    def __call__(self, x: Tensor) -> Tensor:
        """(U, B, …) → (U, B, …): each of the chosen modules its rows."""
        for layer in self._layers:
            x = layer(x)
        if self.modules[0].training:
            for place in self._places:
                place.keep_buffers()
        return x

    def put_off(self, pending: list[Pending]) -> None:
        """As `csipipe.models.put_off`, into a list of the caller's."""
        self._pending = pending
        for layer in self._layers:
            if isinstance(layer, Deferring):
                layer.pending = pending

    def hand_out(self, which: Iterable[int]) -> None:
        """Give modules their gradients, by their places among the chosen; the others get none."""
        places = list(which)
        for place in self._places:
            for name, leaf in place.leaves():
                if leaf.grad is not None:
                    views, own = leaf.grad.unbind(), place.own[name]
                    for u in places:
                        own[self._chosen[u]].grad = views[u]

    def clear(self) -> None:
        """Forget all gradients."""
        for place in self._places:
            for name, leaf in place.leaves():
                leaf.grad = None
                for u in self._chosen:
                    place.own[name][u].grad = None

    def gradients(self) -> list[Tensor]:
        """(U, …) gradients of the chosen modules' parameters, of those that have one."""
        leaves = (leaf for place in self._places for _, leaf in place.leaves())
        return [leaf.grad for leaf in leaves if leaf.grad is not None]


def check_stackable(modules: Sequence[nn.Module]) -> None:
    """Raises as `Stack`, and changes nothing."""
    _places(modules)


def _places(modules: Sequence[nn.Module]) -> list[Sequence[nn.Module]]:
    """The layers of all modules, place by place; raises as `Stack`."""
    rows = [list(in_order(module)) for module in modules]
    for layer in rows[0]:
        if type(layer) not in MAKERS:
            raise Unstackable(
                f"{_home(type(layer))}.{type(layer).__name__} can't be computed for several UEs at "
                f"once, only a Sequential of layers of {_known()} can"
            )
        if isinstance(layer, nn.BatchNorm2d) and (
            not layer.affine or not layer.track_running_stats or layer.momentum is None
        ):
            raise Unstackable("a BatchNorm2d needs weights, running statistics and a momentum")
    make = [(repr(layer), _shapes(layer)) for layer in rows[0]]
    for number, row in enumerate(rows):
        if [(repr(layer), _shapes(layer)) for layer in row] != make:
            raise Unstackable(f"the layers of module {number} aren't those of the first")
    return list(zip(*rows, strict=True))


def _home(kind: type[nn.Module]) -> str:
    """Where a layer is imported from: some of ours are called as PyTorch's are."""
    return "torch.nn" if kind.__module__.startswith("torch.nn.") else kind.__module__


def _known() -> str:
    """The layers that can be stacked, in words."""
    homes: dict[str, list[str]] = {}
    for kind in sorted(MAKERS, key=lambda kind: kind.__name__):
        homes.setdefault(_home(kind), []).append(kind.__name__)
    return ", ".join(f"{home} ({', '.join(names)})" for home, names in sorted(homes.items()))


def _shapes(layer: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()]
