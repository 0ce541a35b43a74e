"""What CSILocal's UE rank does at each instruction, with mini-batches of all its UEs.

The counterpart of `csipipe.pipeline.engine.TailStage`: it doesn't know who its neighbours are.
Shapes: as in `csipipe.methods.csilocal_bts`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from csipipe import models
from csipipe.comm.channel import Ports
from csipipe.device import autocast, computable
from csipipe.measure.figures import row_sums
from csipipe.measure.probe import Probe
from csipipe.methods.ends import Ends
from csipipe.methods.objective import Objective
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline.schedule import Op
from csipipe.settings.config import Precision


@dataclass(frozen=True)
class _Batch:
    """A (U, B, 2, A, D) mini-batch of every UE, how many rows of each count, (U, B) figures."""

    h_UBAD: Tensor
    valid: Sequence[int] | None
    loss_UB: Tensor
    floor_UB: Tensor
    sgcs_UB: Tensor


class UeStage:
    """Encoders and heads of this rank's UEs: the two ends of the pipeline.

    Args:
        ues: those of this rank, ascending.
        ends: computes their encoders and heads.
        ports: where messages come from and go to; forward comes in from the last BTS stage, and
            goes out to the first.
        micro_batches: micro-batches per iteration.
        objective: what is minimised and reported.
        tolerant: a UE that can't step is left out; otherwise that is an error.
        calls: what this rank does at instructions that don't belong to the stage.

    Attributes:
        ues: those of the latest mini-batch, ascending.
        taking: indices among them of the UEs that aren't left out.
        idle: indices of those that took no step.
        faults: why UEs could not step in this iteration, by number.
    """

    def __init__(
        self,
        ues: Sequence[UserEquipment],
        ends: Ends,
        ports: Ports,
        micro_batches: int,
        precision: Precision,
        objective: Objective,
        probe: Probe,
        tolerant: bool,
        calls: Mapping[Op, Callable[[], None]],
    ) -> None:
        self.everyone = self.ues = ues
        self.ends = ends
        self.ports = ports
        self.micro_batches = micro_batches
        self.precision = precision
        self.objective = objective
        self.probe = probe
        self.tolerant = tolerant
        self.calls = calls
        self.taking = list(range(len(ues)))
        self.idle: set[int] = set()
        self.faults: dict[int, str] = {}
        # the last one is encoded, the first one reconstructed
        self._batches: deque[_Batch] = deque()
        self._z_MRC: list[Tensor] = []
        self._y: dict[int, Tensor] = {}
        self._dy: dict[int, Tensor] = {}
        self._dz: dict[int, Tensor] = {}

    def take(self, places: Sequence[int]) -> None:
        """Mini-batches of these UEs follow; `places`: theirs among the rank's, ascending."""
        self.ues = [self.everyone[at] for at in places]
        self.taking = list(range(len(places)))
        self.idle, self.faults = set(), {}
        if places:
            self.ends.take(places)

    def load(self, h_UBAD: Tensor, valid: Sequence[int] | None = None) -> None:
        """Add a (U, B, 2, A, D) mini-batch of every UE; `sums` removes it.

        Args:
            valid: rows of each UE that are counted in `sums`, the rest is padding; None: all.
        """
        zeros = h_UBAD.new_zeros(3, *h_UBAD.shape[:2])
        self._batches.append(_Batch(h_UBAD, valid, *zeros))

    def post(self, backward: bool) -> None:
        """Post the receives of an iteration; `backward`: gradients come back to the encoders."""
        self.ports.forward_in.post()
        if backward:
            self.ports.backward_in.post()

    def sums(self) -> Tensor:
        """(UEs, WIDTH) figures of the oldest mini-batch; NaN for a UE that took no step."""
        batch = self._batches.popleft()
        loss_UB, counted_UB = batch.loss_UB, None
        if batch.valid is not None:
            valid = torch.tensor(batch.valid, device=loss_UB.device)
            counted_UB = torch.arange(loss_UB.shape[1], device=valid.device) < valid[:, None]
        sums = row_sums(loss_UB, batch.floor_UB, batch.sgcs_UB, counted_UB)
        if self.idle:
            sums[list(self.idle)] = math.nan
        return sums

    def _encode(self) -> None:
        batch = self._batches[-1]
        with self._autocast():
            by_ue = self.ends.encode(batch.h_UBAD)
        # rows of a micro-batch, UE by UE
        by_ue = by_ue.view(len(self.ues), self.micro_batches, self._rows(batch), -1)
        self._z_MRC = list(by_ue.transpose(0, 1).flatten(1, 2))

    def _send_forward(self, m: int) -> None:
        self.ports.forward_out.send(m, self._z_MRC[m])

    def _receive_forward(self, m: int) -> None:
        self._y[m] = self.ports.forward_in.receive(m)

    def _head(self, m: int) -> None:
        """Reconstruction and loss of micro-batch `m`, and the gradient at the heads' input."""
        batch = self._batches[0]
        rows = self._rows(batch)
        part = slice(m * rows, (m + 1) * rows)
        training = torch.is_grad_enabled()
        y = computable(self._y.pop(m)).detach().requires_grad_(training)
        if not self.taking:
            self._dy[m] = torch.zeros_like(y)
            return
        with self._autocast():
            h_hat = self.ends.heads(y.view(len(self.ues), rows, -1), self.taking)
        # what has no weights is done for all UEs at once
        everyone = len(self.taking) == len(self.ues)
        some: slice | list[int] = slice(None) if everyone else self.taking
        of = self.objective(h_hat, batch.h_UBAD[some, part])
        batch.loss_UB[some, part] = of.loss.view(len(self.taking), -1)
        batch.floor_UB[some, part] = of.floor.view(len(self.taking), -1)
        if of.sgcs is not None:
            batch.sgcs_UB[some, part] = of.sgcs.view(len(self.taking), -1)
        if not training:
            self._show(batch, m, h_hat)
            return
        # a UE's loss is the mean over its whole mini-batch
        share = torch.full_like(of.minimised, 1 / batch.h_UBAD.shape[1])
        models.backward([of.minimised], [share])
        assert y.grad is not None
        self._dy[m] = self._of_taking(y.grad, rows)

    def _send_backward(self, m: int) -> None:
        self.ports.backward_out.send(m, self._dy.pop(m))

    def _receive_backward(self, m: int) -> None:
        self._dz[m] = self.ports.backward_in.receive(m)

    def _encode_backward(self) -> None:
        shape = len(self.ues), self._rows(self._batches[-1]), -1
        of_each = [self._dz[m].view(shape) for m in range(self.micro_batches)]
        self.ends.encode_backward(torch.cat(of_each, dim=1), self.taking)

    def _step(self) -> None:
        self.idle = set(range(len(self.ues))) - set(self.taking)
        faults = self.ends.step(self.taking, self._batches[0].loss_UB, self.tolerant)
        self.idle |= set(faults)
        self.faults |= {self.ues[u].number: fault for u, fault in faults.items()}

    def _of_taking(self, rows_of_all: Tensor, rows: int) -> Tensor:
        """The same with zeros for UEs that are left out, whose own may be anything."""
        for u in set(range(len(self.ues))) - set(self.taking):
            rows_of_all[u * rows : (u + 1) * rows] = 0
        return rows_of_all

    def _show(self, batch: _Batch, m: int, h_hat: Tensor) -> None:
        """Show reconstructions of micro-batch `m` to the probe."""
        rows = self._rows(batch)
        first, valid = m * rows, batch.valid or [batch.h_UBAD.shape[1]] * len(self.ues)
        shown = zip(self.ues, batch.h_UBAD, torch.split(h_hat, rows), valid, strict=True)
        for ue, h, reconstructed, n in shown:
            counted = min(rows, max(0, n - first))
            self.probe.reconstructed(ue.number, h[first : first + counted], reconstructed[:counted])

    def _rows(self, batch: _Batch) -> int:
        """Rows of a UE in a micro-batch."""
        return batch.h_UBAD.shape[1] // self.micro_batches

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.precision, self._batches[0].h_UBAD.device)

    @property
    def whole(self) -> dict[Op, Callable[[], None]]:
        """What the UEs do at instructions on the whole mini-batch."""
        return {
            Op.ENCODE: self._encode,
            Op.WEIGHTS: self.ends.weight_gradients,
            Op.ENCODE_BACKWARD: self._encode_backward,
            Op.STEP: self._step,
            **self.calls,
        }

    @property
    def each(self) -> dict[Op, Callable[[int], None]]:
        """What they do at instructions on one micro-batch."""
        return {
            Op.SEND_FORWARD: self._send_forward,
            Op.RECEIVE_FORWARD: self._receive_forward,
            Op.HEAD: self._head,
            Op.SEND_BACKWARD: self._send_backward,
            Op.RECEIVE_BACKWARD: self._receive_backward,
        }
