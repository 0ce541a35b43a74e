"""FedGrad, with a personal encoder too (FedGradPer), at a UE.

Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from csipipe.measure.figures import WIDTH
from csipipe.methods import federated
from csipipe.methods.replica import Replica, flat, split


class FedGrad(Replica):
    """The gradient at the global model, then Adam with the mean gradient.

    Every UE takes the same step from the same model, so Adam's state of the shared parts is one,
    replicated. The personal part steps by its own gradient: with the shared ones (FedSim), or
    before theirs is taken (FedAlt).
    """

    def train(self) -> tuple[Tensor, Tensor]:
        """(P,) what goes up, and (WIDTH,) sums over the mini-batches."""
        sums = torch.zeros(WIDTH, dtype=torch.float64, device=self.device)
        *before, last = self.phases
        for learning in before:
            sums += self.gradient(learning)
            self.step()
        sums += self.gradient(last)
        return flat(p.grad for p in self.shared if p.grad is not None), sums

    def apply(self, mean: Tensor) -> None:
        """Adam, with the gradient of all UEs."""
        for parameter, gradient in zip(self.shared, split(mean, list(self.shared)), strict=True):
            parameter.grad = gradient
        self.step()


prepare = partial(federated.prepare, FedGrad)
