"""Random layers, such as dropout, that draw the same numbers wherever and whenever they run.

Every forward pass in training starts PyTorch's generator from what the layer is (the seed, its UE
or its place in the tail) and how often it has run; that count is a buffer, so it is saved, resumed
and undone like BatchNorm's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

COUNT = "forward_passes"
"""Name of the buffer."""


class Reseed:
    """Starts the generator anew before each forward pass in training."""

    def __init__(self, key: tuple[int, ...]) -> None:
        self.key = key

    def __call__(self, layer: nn.Module, inputs: Any) -> None:
        if layer.training:
            count: Tensor = getattr(layer, COUNT)
            sequence = np.random.SeedSequence((*self.key, int(count)))
            torch.manual_seed(int(sequence.generate_state(1)[0]))
            count += 1


def reseed(layer: nn.Module, key: tuple[int, ...]) -> None:
    """From here on `layer` draws what the numbers in `key` and its count say."""
    layer.register_buffer(COUNT, torch.zeros((), dtype=torch.int64))
    layer.register_forward_pre_hook(Reseed(key))


def draws(layer: nn.Module) -> bool:
    """Whether a layer, or one within it, draws random numbers."""
    hooks = (hook for part in layer.modules() for hook in part._forward_pre_hooks.values())
    return any(isinstance(hook, Reseed) for hook in hooks)


def belong(layers: Iterable[nn.Module], ue: int) -> None:
    """Let these layers draw other numbers than another UE's."""
    for layer in layers:
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, Reseed):
                hook.key = (*hook.key, ue)


def watched(layer: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """A layer's output, and whether it drew random numbers for it.

    Raises:
        ValueError: as `Watch`, which only looks where there are no values: it loads PyTorch's
            compiler, for three seconds of CPU. With values, PyTorch's generator shows it.
    """
    if x.is_meta:
        with Watch() as watch:
            return layer(x), watch.drawn
    before = torch.get_rng_state()
    return layer(x), not torch.equal(before, torch.get_rng_state())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's has no types
    """Notes whether what runs in its context draws random numbers.

    Raises:
        ValueError: something draws from a generator of its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn = True
            if any(isinstance(value, torch.Generator) for value in (*args, *values.values())):
                raise ValueError(
                    "a layer draws from a generator of its own, which no checkpoint would hold; "
                    "let it draw from PyTorch's (leave generator= out)"
                )
        return func(*args, **values)
