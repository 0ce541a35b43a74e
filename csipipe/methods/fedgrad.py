"""FedGrad, with a personal encoder too (FedGradPer), at a UE.

Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from csipipe.measure.figures import WIDTH
from csipipe.methods import federated
from csipipe.methods.replica import Replica, flat


class FedGrad(Replica):
    """The gradient at the global model; Adam with the mean gradient is the BTS's.

    The personal part steps by its own gradient: with the shared ones (FedSim), or before theirs is
    taken (FedAlt).
    """

    def train(self) -> tuple[Tensor, Tensor]:
        """(P,) what goes up, and (WIDTH,) sums over the mini-batches."""
        sums = torch.zeros(WIDTH, dtype=torch.float64, device=self.device)
        *before, last = self.phases
        for stepping in before:
            sums += self.gradient(stepping)
            self.step()
        sums += self.gradient(last)
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in self.shared)
        self.probe.gradients(self.parts)
        for parameter in self.shared:
            parameter.grad = None
        self.ue.step()
        return gradient, sums


prepare = partial(federated.prepare, FedGrad)
