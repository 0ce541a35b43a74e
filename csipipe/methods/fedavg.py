"""FedAvg and FedProx, each with a personal encoder too (…Per): what a UE does.

Shapes: P scalars of the shared parts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from csipipe.measure.figures import WIDTH
from csipipe.methods import federated
from csipipe.methods.aggregator import BtsHalf
from csipipe.methods.replica import Replica
from csipipe.methods.seat import Seat
from csipipe.methods.ue import UserEquipment
from csipipe.settings.config import Settings


class FedAvg(Replica):
    """Local Adam steps, then the mean of the models; Adam's moments stay at the UE.

    Source: McMahan et al., AISTATS 2017.
    """

    mu = 0.0
    """Weight of the proximal term."""

    def train(self) -> tuple[Tensor, Tensor]:
        """(P,) what goes up, and (WIDTH,) sums over the mini-batches."""
        sums = torch.zeros(WIDTH, dtype=torch.float64, device=self.device)
        for stepping in self.phases:
            for _ in range(self.settings.train.local_steps):
                sums += self.gradient(stepping)
                self._pull()
                self.step()
        return self.agreed[0].change(), sums

    def _pull(self) -> None:
        """The proximal term, towards the global model."""
        if self.mu:
            for parameter, value in zip(self.shared, self.agreed[0].parts(), strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - value, alpha=self.mu)


class FedProx(FedAvg):
    """FedAvg with μ·(θ − θ_global) added to the gradient of the shared parts.

    Source: Li et al., MLSys 2020.
    """

    def __init__(self, ue: UserEquipment, settings: Settings, device: torch.device) -> None:
        super().__init__(ue, settings, device)
        self.mu = settings.train.mu


class _Aggregator(BtsHalf):
    """FedProx's BTS, which averages, and says where FedProx computes what FedAvg does."""

    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        if seat.settings.train.local_steps == 1:
            seat.notes.append(
                "FedProx with train.local_steps 1 is FedAvg: its term is zero in the first local "
                "step; 2 or more tell them apart"
            )


prepare_fedavg = partial(federated.prepare, FedAvg)
prepare_fedprox = partial(federated.prepare, FedProx, bts=_Aggregator)
