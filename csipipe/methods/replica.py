"""The whole model at one UE of a federated method: encoder, tail and head, and their Adam.

Shared parts are averaged over UEs, personal ones stay at the UE with their Adam state; which
parts are shared is the only difference of a method …per (Pillutla et al., *Federated Learning with
Partial Model Personalization*, ICML 2022). Shapes: B rows, A angles, D delays, P scalars of the
shared parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.comm import trust
from csipipe.device import autocast
from csipipe.measure.probe import Probe
from csipipe.methods.base import freeze, group, learning, set_rate, shared_tensors
from csipipe.methods.objective import Objective
from csipipe.methods.state import AdamMoments, Unit
from csipipe.methods.ue import UserEquipment, losses
from csipipe.settings.config import Settings


class Replica:
    """One UE's model, unsplit, on its own rows; a method says how it is trained.

    Attributes:
        shared, personal: the model's parameters that learn, by where they live.
        probe: shows gradients and reconstructions, on request.
        agreed: the shared parameters as all UEs have them, or as this one last knew them; and in a
            model with BatchNorm its running statistics.
    """

    def __init__(self, ue: UserEquipment, settings: Settings, device: torch.device) -> None:
        self.ue = ue
        self.settings = settings
        self.device = device
        self.objective = Objective.of(settings, device)
        self.probe = Probe()
        self.tail = nn.Sequential(*models.build_tail(settings.model, settings.train.seed))
        self.tail.to(device)
        models.belong(self.tail, ue.number)
        ue.optimizer.add_param_group(group("tail", self.tail.parameters(), settings.train))
        self.parts = {"encoder": ue.encoder, "tail": self.tail, "head": ue.head}
        freeze(self.parts, settings.train.frozen)
        free = {n: p for n, p in self.parts.items() if n not in settings.train.frozen}
        names = settings.spec.shared
        common = [part for name, part in free.items() if name in names]
        self.shared = learning(common)
        self.agreed = [Agreed(tensors) for tensors in shared_tensors(common)]
        self.personal = learning(part for name, part in free.items() if name not in names)

    def train(self) -> tuple[Tensor, Tensor]:
        """(P,) what goes up, and (WIDTH,) sums over the mini-batches; raises as `step`."""
        raise NotImplementedError

    @property
    def phases(self) -> list[list[nn.Parameter]]:
        """Parameters that step together: all (FedSim), or personal, then shared ones (FedAlt)."""
        if self.settings.train.personalisation == "fedalt" and self.personal:
            return [self.personal, self.shared]
        return [self.personal + self.shared]

    def start(self, iteration: int) -> None:
        """Training mode, and the iteration's learning rate."""
        for name, part in self.parts.items():
            part.train(name not in self.settings.train.frozen)
        set_rate(self.ue.optimizer, self.settings.train.lr_at(iteration))

    def gradient(self, stepping: Iterable[nn.Parameter]) -> Tensor:
        """Put the gradient of a fresh mini-batch's mean loss into `.grad` of `stepping` alone.

        Returns:
            (WIDTH,) sums of the mini-batch's figures.
        """
        for parameter in self.personal + self.shared:
            parameter.requires_grad_(False)
        for parameter in stepping:
            parameter.requires_grad_()
        h_BAD = self.ue.batch(self.ue.draw(self.settings.train.batch_size))
        loss_B, sums = self._losses(h_BAD)
        trust.check_loss(f"UE {self.ue.number}", loss_B, nn.ModuleDict(self.parts))
        torch.autograd.backward(loss_B.mean())
        return sums

    def step(self) -> None:
        """Adam on the parameters that have a gradient; raises as `UserEquipment.step`."""
        self.probe.gradients(self.parts)
        trust.check_gradients(f"UE {self.ue.number}'s tail", self.tail.named_parameters())
        self.ue.step()

    def figures(self, h_BAD: Tensor) -> Tensor:
        """(WIDTH,) sums over rows, BatchNorm by running statistics."""
        for part in self.parts.values():
            part.eval()
        with torch.no_grad():
            return self._losses(h_BAD)[1]

    def unit(self, more: Mapping[str, nn.Module]) -> Unit:
        """What a checkpoint holds of this UE.

        Args:
            more: modules without parameters, by name.
        """

        def loaded() -> None:
            for one in self.agreed:
                one.refresh()

        parts: dict[str, nn.Module] = {**self.parts, **more}
        return Unit(parts, AdamMoments(self.ue.optimizer), self.ue.generator, loaded)

    def _losses(self, h_BAD: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.settings.train.precision, self.device):
            h_hat = self.ue.head(self.tail(self.ue.encoder(h_BAD)))
        if not torch.is_grad_enabled():
            self.probe.reconstructed(self.ue.number, h_BAD, h_hat)
        return losses(self.objective, h_hat, h_BAD, len(h_BAD))


class Agreed:
    """Tensors of a replica as one vector, which all UEs change by the mean of their changes.

    What crosses is the change since the last exchange, as many scalars as the tensors have. The
    mean of the changed tensors is the same; but bf16 keeps 8 bits, and small changes would be
    lost in rounding if a weight were sent whole.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.value = flat(tensors)

    def change(self) -> Tensor:
        """(scalars,): how far this UE's tensors have moved since the last exchange."""
        return flat(self.tensors) - self.value

    def apply(self, mean_change: Tensor) -> None:
        """Move to what all UEs agree on."""
        self.value += mean_change
        self.show(self.value)

    def lend(self, missed: Tensor) -> Tensor:
        """Let the tensors have what was missed, too; returns them as they were, for `show`."""
        own = flat(self.tensors)
        own = self.value if torch.equal(own, self.value) else own  # then no copy of them is kept
        self.show(own + missed)
        return own

    def show(self, vector: Tensor) -> None:
        """Let the tensors be `vector`, whatever is agreed on."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, split(vector, self.tensors), strict=True):
                tensor.copy_(value)

    def refresh(self) -> None:
        """Take the tensors, as they are between two iterations, as the agreed values."""
        self.value.copy_(flat(self.tensors))

    def parts(self) -> list[Tensor]:
        """The agreed value of each tensor."""
        return split(self.value, self.tensors)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """(scalars,): a copy of some tensors, one after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def split(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of a vector that `flat` made, of the shapes of `like`."""
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]
