"""FedGrad, with a personal encoder too (FedGradPer), at a UE and at the BTS.

Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from csipipe.comm import trust
from csipipe.measure.figures import WIDTH
from csipipe.methods import aggregator, federated
from csipipe.methods.base import adam, set_rate
from csipipe.methods.replica import Replica, flat, split
from csipipe.methods.seat import Seat
from csipipe.methods.state import AdamMoments


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


class BtsHalf(aggregator.BtsHalf):
    """Adam with the mean gradient, on shared parts that the BTS keeps."""

    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        self.parts = self.exchange.parts
        parameters = {name: part.parameters() for name, part in self.parts.items()}
        self.optimizer = adam(parameters, self.settings.train)
        self.moments = AdamMoments(self.optimizer)

    def begin(self, iteration: int) -> None:
        super().begin(iteration)
        set_rate(self.optimizer, self.settings.train.lr_at(iteration))

    def step(self, mean: Tensor) -> Tensor:
        """As `aggregator.BtsHalf.step`.

        Raises:
            FloatingPointError: the mean isn't finite; nothing was changed.
        """
        agreed = self.exchange.commons[0].agreed
        for parameter, gradient in zip(agreed.tensors, split(mean, agreed.tensors), strict=True):
            parameter.grad = gradient
        parts = nn.ModuleDict(self.parts)
        trust.check_gradients("the mean over UEs of", parts.named_parameters())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return agreed.change()


prepare = partial(federated.prepare, FedGrad, bts=BtsHalf)
