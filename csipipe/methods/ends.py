"""Encoders and heads of a rank's UEs, computed UE by UE or stacked: the same but for rounding.

Shapes: U UEs, B rows of a mini-batch, R rows per UE and micro-batch, A angles, D delays, C = c1 or
c2.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from csipipe import models
from csipipe.comm import trust
from csipipe.comm.topology import Topology
from csipipe.measure.probe import Probe
from csipipe.methods.base import adam_of_ues, set_rate
from csipipe.methods.ue import UserEquipment
from csipipe.models.stacked import Stack
from csipipe.settings.config import HeadName, ModelSettings, Settings, TrainSettings
from csipipe.settings.tables import is_own

SMALL: dict[HeadName, int] = {"linear": 2**16, "crblock": 2**12}
"""Reals of a UE's mini-batch, up to which stacking was measured to be faster on a CPU, by
model.head: one by one, a CRBlock has the fused kernels."""
FEW = 8
"""UEs of an iteration from which on they are stacked. Of the whole run, not of a rank, so that on a
CPU a placement changes no bit; with fewer, even a rank with one UE computes the same bits."""


@dataclass(frozen=True)
class Way:
    """How the UEs of a rank are computed, and why, in words."""

    stacked: bool
    why: str

    @property
    def note(self) -> str:
        """What a run says of it."""
        how = "stacked" if self.stacked else "one after the other"
        return f"UEs of a rank are computed {how} ({self.why})"


def decide(settings: Settings, topology: Topology, device: torch.device) -> Way:
    """How the UEs of every rank are computed: by the settings alone, the same everywhere.

    Raises:
        ValueError: they are to be stacked, and can't.
    """
    wanted = settings.train.stacked
    if wanted == "never":
        return Way(False, "train.stacked is never")
    reason = models.unstackable(settings.model)
    if settings.feedback_bits is not None:
        reason = "its codeword is trained for its bits (comm.scale range)"
    if wanted == "always":
        if reason is not None:
            raise ValueError(
                f"train.stacked is always, but model.name {settings.model.name} can't be stacked: "
                f"{reason}. Use train.stacked auto or never."
            )
        return Way(True, "train.stacked is always")
    hosted = (len(topology.ues_of(role)) for role in topology.ue_roles)
    if min(hosted) < 2 or settings.participants < FEW:
        return Way(False, "train.stacked auto: they are few")
    if reason is not None:
        return Way(False, reason)
    if device.type != "cpu":
        return _on_a_gpu(settings.model)
    reals = settings.train.batch_size * settings.model.reals
    if reals > SMALL[settings.model.head]:
        return Way(False, f"train.stacked auto: {reals:,} reals of each are many")
    return Way(True, f"train.stacked auto: only {reals:,} reals of each in an iteration")


def _on_a_gpu(model: ModelSettings) -> Way:
    """The same there, where many rows are stacked as well."""
    reason = models.without_kernels_stacked(model)
    if is_own(model.name):
        reason = "a model of your own"
    if reason is not None:
        return Way(False, f"train.stacked auto: on a GPU, not {reason}")
    return Way(True, "train.stacked auto: on a GPU")


def ends(ues: Sequence[UserEquipment], probe: Probe, settings: Settings, way: Way) -> Ends:
    """What computes the UEs of a rank."""
    return (Stacked if way.stacked else Singly)(ues, probe, settings.train)


class Ends(Protocol):
    """What the UEs of a rank compute with weights of their own; which of them is chosen."""

    def take(self, chosen: Sequence[int]) -> None:
        """From now on compute for these UEs, by their places on the rank, ascending."""

    def train(self, mode: bool) -> None:
        """Put their parts into training or evaluation mode."""

    def set_rate(self, lr: float) -> None:
        """Adam's rate for the next step."""

    def encode(self, h_UBAD: Tensor) -> Tensor:
        """(U, B, 2, A, D) → (U, B, C), without a graph: that is kept for `encode_backward`."""

    def heads(self, y_URC: Tensor, taking: Sequence[int]) -> Tensor:
        """(U, R, C) of the chosen UEs → (T·R, 2, A, D) of the T among them in `taking`."""

    def weight_gradients(self) -> None:
        """The heads', which were put off."""

    def encode_backward(self, dz_UBC: Tensor, taking: Sequence[int]) -> None:
        """The encoders' gradients, from those at their output."""

    def step(self, taking: Sequence[int], loss_UB: Tensor, tolerant: bool) -> dict[int, str]:
        """Adam on encoders and heads of the UEs in `taking`.

        Returns:
            Why some of them couldn't step, by place among the chosen.

        Raises:
            FloatingPointError: instead, unless `tolerant`.
        """

    def clear(self) -> None:
        """Forget all gradients."""


class _Both:
    """What the two ways share."""

    def __init__(self, ues: Sequence[UserEquipment], probe: Probe, train: TrainSettings) -> None:
        self.everyone = ues
        self.ues = ues
        self.probe = probe
        self._pending: list[models.Pending] = []
        # one for all: its parameters are the UEs' own, each with moments and steps of its own
        self._optimizer = adam_of_ues(
            {
                "encoder": [p for ue in ues for p in ue.encoder.parameters()],
                "head": [p for ue in ues for p in ue.head.parameters()],
            },
            train,
        )
        for ue in ues:
            ue.optimizer = self._optimizer

    def take(self, chosen: Sequence[int]) -> None:
        self.ues = [self.everyone[u] for u in chosen]

    def set_rate(self, lr: float) -> None:
        set_rate(self._optimizer, lr)

    def weight_gradients(self) -> None:
        models.accumulate(models.joined(self._pending))
        self._pending.clear()

    def clear(self) -> None:
        self._optimizer.zero_grad()

    def _step(
        self, taking: Sequence[int], suspects: Container[int], loss_UB: Tensor, tolerant: bool
    ) -> dict[int, str]:
        """As `Ends.step`; `suspects` may have a loss or gradients that aren't finite."""
        faults = {}
        for u in taking:
            ue = self.ues[u]
            self.probe.gradients({"encoder": ue.encoder, "head": ue.head})
            if u in suspects:
                try:
                    ue.check(loss_UB[u])
                except FloatingPointError as error:
                    if not tolerant:
                        raise
                    faults[u] = str(error)
                    ue.parts.zero_grad()
        self._optimizer.step()
        self.clear()
        return faults


class Singly(_Both):
    """One UE after the other."""

    def __init__(self, ues: Sequence[UserEquipment], probe: Probe, train: TrainSettings) -> None:
        super().__init__(ues, probe, train)
        self._pending = models.put_off(ue.head for ue in ues if "head" not in ue.frozen)
        self._z_UBC: list[Tensor] = []

    def train(self, mode: bool) -> None:
        for ue in self.ues:
            ue.train(mode)

    def encode(self, h_UBAD: Tensor) -> Tensor:
        self._z_UBC = [ue.encoder(h) for ue, h in zip(self.ues, h_UBAD, strict=True)]
        return torch.stack(self._z_UBC).detach()

    def heads(self, y_URC: Tensor, taking: Sequence[int]) -> Tensor:
        y_RC = y_URC.unbind()
        return torch.cat([self.ues[u].head(y_RC[u]) for u in taking])

    def encode_backward(self, dz_UBC: Tensor, taking: Sequence[int]) -> None:
        z_UBC = self._z_UBC
        if not taking:
            return
        models.backward([z_UBC[u] for u in taking], [dz_UBC[u].to(z_UBC[u].dtype) for u in taking])

    def step(self, taking: Sequence[int], loss_UB: Tensor, tolerant: bool) -> dict[int, str]:
        return self._step(taking, set(taking), loss_UB, tolerant)


class Stacked(_Both):
    """All at once; a UE that is left out is computed all the same, and nothing of it is changed."""

    def __init__(self, ues: Sequence[UserEquipment], probe: Probe, train: TrainSettings) -> None:
        super().__init__(ues, probe, train)
        self._encoders = Stack([ue.encoder for ue in ues])
        self._heads = Stack([ue.head for ue in ues])
        if "head" not in train.frozen:
            self._heads.put_off(self._pending)
        self._z_UBC: Tensor | None = None

    def take(self, chosen: Sequence[int]) -> None:
        super().take(chosen)
        self._encoders.take(chosen)
        self._heads.take(chosen)

    def train(self, mode: bool) -> None:
        self.everyone[0].train(mode)

    def encode(self, h_UBAD: Tensor) -> Tensor:
        self._z_UBC = self._encoders(h_UBAD)
        return self._z_UBC.detach()

    def heads(self, y_URC: Tensor, taking: Sequence[int]) -> Tensor:
        h_hat = self._heads(y_URC)
        some = h_hat if len(taking) == len(h_hat) else h_hat[list(taking)]
        return some.flatten(0, 1)

    def encode_backward(self, dz_UBC: Tensor, taking: Sequence[int]) -> None:
        z_UBC, self._z_UBC = self._z_UBC, None
        assert z_UBC is not None
        models.backward([z_UBC], [dz_UBC.to(z_UBC.dtype)])

    def step(self, taking: Sequence[int], loss_UB: Tensor, tolerant: bool) -> dict[int, str]:
        if not taking:
            self.clear()
            return {}
        gradients = [*self._encoders.gradients(), *self._heads.gradients()]
        sound = trust.each_finite([*gradients, loss_UB])
        self._encoders.hand_out(taking)
        self._heads.hand_out(taking)
        suspects = {u for u in taking if not sound[u]}
        return self._step(taking, suspects, loss_UB, tolerant)

    def clear(self) -> None:
        self._encoders.clear()
        self._heads.clear()
