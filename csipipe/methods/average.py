"""The mean of a run's weights over its last iterations: evaluated and saved instead of the last.

Steps are taken with the weights themselves. The mean is exponential: after each iteration it moves
towards them by 1 - decay, at first by more, so that it forgets where it began. BatchNorm's running
statistics are averaged likewise, counters aren't. The mean is part of each UE's and each layer's
state, so it depends on no placement and is resumed to the bit.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from csipipe.comm.ledger import Ledger
from csipipe.measure.figures import Figures
from csipipe.methods.base import EvalRows, Worker
from csipipe.methods.state import MEAN, PARTS_OF_A_UNIT, Unit, mean_name


class Mean(nn.Module):
    """That of the tensors of some modules, as buffers that a checkpoint holds.

    Args:
        modules: by the name of the part.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self._modules_of = {n: m for n, m in modules.items() if n in PARTS_OF_A_UNIT}
        for name, tensor in self._now().items():
            self.register_buffer(mean_name(name), tensor.clone())

    def begin(self) -> None:
        """The modules were set from outside: the mean is what they are."""
        for mean, tensor in self._pairs():
            mean.copy_(tensor)

    def move(self, decay: float) -> None:
        """The modules have taken a step."""
        for mean, tensor in self._pairs():
            mean.lerp_(tensor, 1 - decay)

    def swap(self) -> None:
        """Exchange the mean and the modules' own values; twice: everything is as before."""
        for mean, tensor in self._pairs():
            own = tensor.clone()
            tensor.copy_(mean)
            mean.copy_(own)

    def _now(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor.detach()
            for part, module in self._modules_of.items()
            for name, tensor in module.state_dict().items()
            if tensor.is_floating_point()
        }

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, tensor in self._now().items():
            yield self.get_buffer(mean_name(name)), tensor


class Averaged:
    """A worker whose weights are averaged: a `csipipe.methods.base.Worker` around another.

    Args:
        decay: of the mean, in (0, 1).
    """

    def __init__(self, worker: Worker, decay: float) -> None:
        self.worker = worker
        self.decay = decay
        self.parameters, self.device = worker.parameters, worker.device
        self.clock, self.probe = worker.clock, worker.probe
        self.notes = [*worker.notes, f"the mean of the weights is evaluated (decay {decay})"]
        self._means = {name: Mean(unit.modules) for name, unit in worker.units().items()}

    def train_iteration(self, iteration: int) -> Figures | None:
        """As the worker's."""
        self.probe.unseen = False  # the mean sees the weights of every iteration
        figures = self.worker.train_iteration(iteration)
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for mean in self._means.values():
            mean.move(decay)
        return figures

    def evaluate(self, part: EvalRows) -> Figures | None:
        """Of the mean."""
        with self._shown():
            return self.worker.evaluate(part)

    def save_weights(self, folder: Path) -> None:
        """The mean."""
        with self._shown():
            self.worker.save_weights(folder)

    def units(self) -> dict[str, Unit]:
        """With the mean; what is loaded without one begins it."""
        return {name: self._unit(name, unit) for name, unit in self.worker.units().items()}

    def _unit(self, name: str, unit: Unit) -> Unit:
        mean = self._means[name]

        def begun() -> None:
            unit.begun()
            mean.begin()

        return replace(unit, modules={**unit.modules, MEAN: mean}, begun=begun)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """The worker has the mean."""
        for mean in self._means.values():
            mean.swap()
        try:
            yield
        finally:
            for mean in self._means.values():
                mean.swap()

    def agree(self, decision: bool) -> bool:
        return self.worker.agree(decision)

    def exchanged(self) -> Ledger:
        return self.worker.exchanged()

    def restore_ledger(self, ledger: Ledger) -> None:
        self.worker.restore_ledger(ledger)

    @property
    def has_holdout(self) -> bool:
        return self.worker.has_holdout

    @property
    def dropped(self) -> list[int]:
        return self.worker.dropped

    @dropped.setter
    def dropped(self, counts: list[int]) -> None:
        self.worker.dropped = counts
