"""What CSILocal's UE rank does at each instruction, with one mini-batch of every UE.

Shapes: as in `csipipe.methods.csilocal_bts`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csipipe import models
from csipipe.comm.ledger import Kind
from csipipe.measure.clock import Clock
from csipipe.measure.figures import row_sums
from csipipe.measure.metrics import floor_loss, paper_loss
from csipipe.pipeline import schedule
from csipipe.pipeline.schedule import Op

if TYPE_CHECKING:
    from csipipe.methods.csilocal_ue import UeHalf


class UeBatch:
    """One mini-batch of every UE of a rank on its way through a schedule.

    Args:
        h_UBAD: a (B, 2, A, D) mini-batch per UE.
        valid: rows of each UE that count in `sums`; the rest is padding.

    Attributes:
        taking: places on this rank of the UEs that take part.
        idle: places of those that take no step.
    """

    def __init__(self, half: UeHalf, h_UBAD: list[Tensor], valid: list[int]) -> None:
        self.half = half
        self.h_UBAD = torch.stack(h_UBAD)
        self.valid = valid
        self.rows = half.wire.rows
        self.z_UBC: list[Tensor] = []
        self.z_MRC: list[Tensor] = []
        self.y: dict[int, Tensor] = {}
        self.dy: dict[int, Tensor] = {}
        self.dz: dict[int, Tensor] = {}
        self.loss_UB = self.h_UBAD.new_zeros(self.h_UBAD.shape[:2])
        self.taking = list(range(len(h_UBAD)))
        self.idle: set[int] = set()

    def execute(self, plan: schedule.Plan, clock: Clock) -> None:
        """Execute the UE rank's instructions."""
        whole = {
            Op.ENCODE: self.encode,
            Op.WEIGHTS: self.weight_gradients,
            Op.ENCODE_BACKWARD: self.encode_backward,
            Op.ROLL_CALL: lambda: self.agree(Kind.ROLL_CALL),
            Op.VERDICT: lambda: self.agree(Kind.VERDICT),
            Op.STEP: self.step,
        }
        per_micro_batch = {
            Op.SEND_FORWARD: self.send_forward,
            Op.RECEIVE_FORWARD: self.receive_forward,
            Op.HEAD: self.head,
            Op.SEND_BACKWARD: self.send_backward,
            Op.RECEIVE_BACKWARD: self.receive_backward,
        }
        schedule.execute(plan, whole, per_micro_batch, clock)

    def sums(self) -> Tensor:
        """(UEs, WIDTH) figures of the rows that count; NaN for a UE that took no step."""
        floor_UB = floor_loss(self.h_UBAD.flatten(0, 1)).view_as(self.loss_UB)
        parts = zip(self.loss_UB, floor_UB, self.valid, strict=True)
        sums = torch.stack([row_sums(loss[:n], floor[:n]) for loss, floor, n in parts])
        if self.idle:
            sums[list(self.idle)] = math.nan
        return sums

    def agree(self, kind: Kind) -> None:
        """Hear which UEs take part."""
        assert self.half.roster is not None
        self.half.roster.agree(kind)
        out = self.half.roster.out
        self.taking = [u for u, ue in enumerate(self.half.ues) if ue.number not in out]

    def encode(self) -> None:
        half = self.half
        with half.autocast():
            self.z_UBC = [ue.encoder(h) for ue, h in zip(half.ues, self.h_UBAD, strict=True)]
        # rows of a micro-batch, UE by UE
        by_ue = torch.stack(self.z_UBC).detach()
        by_ue = by_ue.view(len(half.ues), half.wire.micro_batches, self.rows, -1)
        self.z_MRC = list(by_ue.transpose(0, 1).flatten(1, 2))

    def send_forward(self, m: int) -> None:
        self.half.smashed.send(m, self.z_MRC[m])

    def receive_forward(self, m: int) -> None:
        self.y[m] = self.half.output.receive(m)

    def head(self, m: int) -> None:
        """Reconstruction and loss of micro-batch `m`, and the gradient at the heads' input."""
        part = slice(m * self.rows, (m + 1) * self.rows)
        training = torch.is_grad_enabled()
        y = self.y.pop(m).detach().requires_grad_(training)
        if not self.taking:
            self.dy[m] = torch.zeros_like(y)
            return
        y_URC = torch.split(y, self.rows)
        with self.half.autocast():
            h_hats = [self.half.ues[u].head(y_URC[u]) for u in self.taking]
        # what has no weights goes for all UEs at once
        everyone = len(self.taking) == len(self.half.ues)
        some: slice | list[int] = slice(None) if everyone else self.taking
        loss = paper_loss(torch.cat(h_hats).float(), self.h_UBAD[some, part].flatten(0, 1))
        self.loss_UB[some, part] = loss.detach().view(len(h_hats), -1)
        if not training:
            self.show(m, h_hats)
        if training:
            # a UE's loss is the mean over its whole mini-batch
            torch.autograd.backward(loss.sum() / self.h_UBAD.shape[1])
            assert y.grad is not None
            self.dy[m] = y.grad

    def send_backward(self, m: int) -> None:
        self.half.output_gradient.send(m, self.dy.pop(m))

    def weight_gradients(self) -> None:
        models.accumulate(models.joined(self.half.pending))
        self.half.pending.clear()

    def receive_backward(self, m: int) -> None:
        self.dz[m] = self.half.smashed_gradient.receive(m)

    def encode_backward(self) -> None:
        dz_MRC = torch.stack([self.dz[m] for m in range(len(self.dz))])
        dz_UBC = [rows.flatten(0, 1) for rows in torch.split(dz_MRC, self.rows, dim=1)]
        z_UBC = self.z_UBC
        torch.autograd.backward(
            [z_UBC[u] for u in self.taking],
            [dz_UBC[u].to(z_UBC[u].dtype) for u in self.taking],
        )

    def show(self, m: int, h_hats: list[Tensor]) -> None:
        """Let reconstructions of micro-batch `m` be looked at."""
        first = m * self.rows
        for ue, h, h_hat, n in zip(self.half.ues, self.h_UBAD, h_hats, self.valid, strict=True):
            counted = min(self.rows, max(0, n - first))
            self.half.probe.reconstructed(ue.number, h[first : first + counted], h_hat[:counted])

    def step(self) -> None:
        self.idle = set(range(len(self.half.ues))) - set(self.taking)
        for u in self.taking:
            ue = self.half.ues[u]
            self.half.probe.gradients({"encoder": ue.encoder, "head": ue.head})
            try:
                ue.check_loss(self.loss_UB[u])
                ue.step()
            except FloatingPointError as error:
                if not self.half.tolerant:
                    raise
                self.half.leave_out({ue.number: str(error)})
                self.idle.add(u)
