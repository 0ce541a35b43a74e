"""Peers: PyTorch's torch.distributed.pipelining, ScheduleGPipe and Schedule1F1B.

Shapes are given when the stage is made, as its documentation advises for static shapes, so that
nothing is inferred at run time. The exchange with the UEs is in the loss function (`peerstage`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from csipipe import models
from csipipe.bench.peerstage import PeerStage
from csipipe.device import stage_dtype
from csipipe.methods.base import adam


class _FirstStage(nn.Module):
    """Fetches each micro-batch when its turn comes, instead of all before the first begins."""

    def __init__(self, peer: TorchStage, layers: nn.Sequential) -> None:
        super().__init__()
        self.fetch = peer.next_smashed
        self.layers = layers

    def forward(self, _: Tensor) -> Tensor:
        out: Tensor = self.layers(self.fetch())
        return out


class TorchStage(PeerStage):
    """One stage under a schedule of PyTorch's."""

    plan: type[ScheduleGPipe] | type[Schedule1F1B]

    def build(self, layers: list[nn.Module]) -> None:
        if self.device.type != "cpu" and self.backend != "nccl":
            raise ValueError(
                "torch.distributed.pipelining sends GPU tensors, which gloo can't: it needs a GPU "
                "per BTS stage; leave out torch-gpipe and torch-1f1b (--only)."
            )
        stages, start, stop = self.settings.stages, *self.parts[self.role : self.role + 2]
        mine: nn.Module = nn.Sequential(*layers[start:stop]).to(self.device).train()
        self.optimizer = adam({"tail": mine.parameters()}, self.settings.train)
        if self.first:
            mine = _FirstStage(self, mine)  # type: ignore[arg-type]
        shapes = models.tail_shapes(self.settings.model)
        stage = PipelineStage(
            mine,
            self.role,
            stages,
            self.device,
            input_args=self._example(shapes[start], needs_gradient=not self.first),
            output_args=self._example(shapes[stop], needs_gradient=True),
            group=self.group,
        )
        # losses are sums over the mini-batch's parts, so gradients aren't divided
        self.schedule = self.plan(stage, self.micro_batches, loss_fn=self.loss, scale_grads=False)
        # its schedules split a mini-batch that they are given; the real data comes from the UEs
        self.placeholder = torch.zeros(self.micro_batches, 1, device=self.device)

    def iterate(self) -> None:
        inputs = (self.placeholder,) if self.first else ()
        target = self.placeholder if self.last else None
        with self.autocast():
            self.schedule.step(*inputs, target=target, return_outputs=False)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _example(self, shape: tuple[int, ...], needs_gradient: bool) -> Tensor:
        dtype = stage_dtype(self.settings.train.precision, self.device)
        return torch.zeros(self.rows, *shape, dtype=dtype, device=self.device).requires_grad_(
            needs_gradient
        )


class GPipeStage(TorchStage):
    """All forward passes, then all backward passes."""

    plan = ScheduleGPipe


class OneForwardOneBackwardStage(TorchStage):
    """Forward and backward passes in turn."""

    plan = Schedule1F1B
