"""Adam's state of a stage under DeepSpeed's ZeRO-1, parameter by parameter. No DeepSpeed import.

ZeRO keeps one flat fp32 copy of the stage's parameters and passes that to Adam. A stage is one
rank, so nothing is split; each parameter knows its place in the flat vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_VECTORS = ("exp_avg", "exp_avg_sq")


class ZeroMoments:
    """`csipipe.methods.state.Moments` of a `DeepSpeedZeroOptimizer`."""

    def __init__(self, optimizer: Any) -> None:
        self._flat: list[Tensor] = optimizer.single_partition_of_fp32_groups
        self._state: dict[Tensor, dict[str, Tensor]] = optimizer.optimizer.state

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """As `Moments.read`; the vectors are views."""
        state = self._state.get(self._owner(parameter), {})
        if not state:
            return {}
        views = {key: self._view(state[key], parameter) for key in _VECTORS}
        return {"step": state["step"].clone(), **views}  # one step for all parameters

    def write(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """As `Moments.write`; also updates the fp32 copy of the parameter."""
        flat = self._owner(parameter)
        with torch.no_grad():
            self._view(flat, parameter).copy_(parameter)
            if not state:
                self._state.pop(flat, None)
                return
            if not self._state.get(flat):
                self._state[flat] = {key: torch.zeros_like(flat) for key in _VECTORS}
            self._state[flat]["step"] = state["step"].to(flat.device, copy=True)
            for key in _VECTORS:
                self._view(self._state[flat][key], parameter).copy_(state[key])

    def _owner(self, parameter: nn.Parameter) -> Tensor:
        place: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        group: int = place.param_group_index
        return self._flat[group]

    @staticmethod
    def _view(flat: Tensor, parameter: nn.Parameter) -> Tensor:
        place: Any = parameter._hp_mapping.get_hp_fragment_address()  # type: ignore[attr-defined]
        view: Tensor = flat.detach().narrow(0, place.start, place.numel).view_as(parameter)
        return view
