"""What a checkpoint holds of a UE or of a layer of the tail, wherever it is hosted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from csipipe.settings.tables import PARTS

PARTS_OF_A_UNIT = (*PARTS, "layer")
"""Names of modules that hold weights; others are what a codec remembers, or a mean."""
MEAN = "mean"
"""Name of the module that holds the mean of the weights, where one is kept."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Moments(Protocol):
    """Adam's state, parameter by parameter."""

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """`step`, `exp_avg`, `exp_avg_sq`; empty before the parameter's first step."""

    def write(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Set what `read` returned; empty: as before the first step."""


class AdamMoments:
    """The state of a `torch.optim.Adam`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return dict(self._optimizer.state.get(parameter, {}))

    def write(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        if state:
            self._optimizer.state[parameter] = {
                key: tensor.to(parameter.device, copy=True) for key, tensor in state.items()
            }
        else:
            self._optimizer.state.pop(parameter, None)


class NoMoments:
    """Of modules that nothing optimises."""

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {}

    def write(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        assert not state, "nothing was read"


@dataclass(frozen=True)
class Unit:
    """A UE's or a tail layer's state: modules with their buffers, Adam's moments, its draws.

    Attributes:
        modules: by the name of the part.
        moments: Adam's state of their parameters.
        generator: which draws the mini-batches.
        loaded: called after `load` and `begin`, for what follows from the rest.
        begun: called after `begin`, for what else starts with the weights.
    """

    modules: dict[str, nn.Module]
    moments: Moments
    generator: torch.Generator | None = None
    loaded: Callable[[], None] = field(default=lambda: None)
    begun: Callable[[], None] = field(default=lambda: None)

    def state(self) -> dict[str, Tensor]:
        """Tensors by `<part>.<name>`, `adam.<part>.<name>.<moment>` and `draws`; not copied."""
        found: dict[str, Tensor] = {}
        for part, module in self.modules.items():
            found |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        for name, parameter in self._parameters().items():
            moments = self.moments.read(parameter)
            found |= {f"adam.{name}.{key}": tensor for key, tensor in moments.items()}
        if self.generator is not None:
            found["draws"] = self.generator.get_state()
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Set everything from what `state` returned.

        Raises:
            ValueError: tensors are missing, left over or of other shapes.
        """
        left = set(state)

        def take(name: str, shape: torch.Size) -> Tensor:
            if name not in left:
                raise ValueError(f"{name} is missing")
            left.remove(name)
            if state[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)} instead of {tuple(shape)}"
                )
            return state[name]

        for part, module in self.modules.items():
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    tensor.copy_(take(f"{part}.{name}", tensor.shape))
        for name, parameter in self._parameters().items():
            keys = [key for key in _MOMENTS if f"adam.{name}.{key}" in left]
            shapes = {"step": torch.Size()}
            self.moments.write(
                parameter,
                {key: take(f"adam.{name}.{key}", shapes.get(key, parameter.shape)) for key in keys},
            )
        if self.generator is not None:
            self.generator.set_state(take("draws", self.generator.get_state().shape))
        if left:
            raise ValueError(f"{min(left)} belongs to no part of this run")
        self.loaded()

    def begin(self, state: dict[str, Tensor]) -> None:
        """Start from weights, `<part>.<name>`, and nothing else of `state`; no moments, own draws.

        Raises:
            ValueError: one is missing, or of another shape.
        """
        for part, module in self.modules.items():
            if part not in PARTS_OF_A_UNIT:
                continue
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    found = state.get(f"{part}.{name}")
                    if found is None or found.shape != tensor.shape:
                        there = "missing" if found is None else f"of shape {tuple(found.shape)}"
                        raise ValueError(
                            f"{part}.{name} is {there}; expected shape {tuple(tensor.shape)}"
                        )
                    tensor.copy_(found)
        for parameter in self._parameters().values():
            self.moments.write(parameter, {})
        self.loaded()
        self.begun()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }


def layer_units(layers: Iterable[nn.Module], first: int, moments: Moments) -> dict[str, Unit]:
    """A unit for each layer of the tail that has a state; `first` is the first one's number."""
    return {
        layer_name(number): Unit({"layer": layer}, moments)
        for number, layer in enumerate(layers, first)
        if layer.state_dict()
    }


BTS = "bts"
"""What a checkpoint holds of the BTS besides the tail. Of a federated method it may have what all
UEs have in common, where a UE's own part may be behind."""
_UE, _LAYER = "ue-", "tail-"


def ue_name(ue: int) -> str:
    """A UE's part of a checkpoint."""
    return f"{_UE}{ue}"


def layer_name(layer: int) -> str:
    """A tail layer's part of a checkpoint."""
    return f"{_LAYER}{layer}"


def mean_name(name: str) -> str:
    """Under which a mean keeps a tensor: PyTorch wants no dots."""
    return name.replace(".", "/")


def meant(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A unit's state with the means of its weights, where it has them, instead of the weights."""
    means = {k.removeprefix(f"{MEAN}."): v for k, v in state.items() if k.startswith(f"{MEAN}.")}
    return state | {name.replace("/", "."): tensor for name, tensor in means.items()}


def whose(name: str) -> tuple[int | None, int | None]:
    """The UE, or the tail layer, whose part of a checkpoint has this name; neither: another's."""
    if name.startswith(_UE):
        return int(name.removeprefix(_UE)), None
    return None, int(name.removeprefix(_LAYER)) if name.startswith(_LAYER) else None
