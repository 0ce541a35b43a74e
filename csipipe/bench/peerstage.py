"""A BTS stage of a peer: somebody else's pipeline between our UE ranks.

The UE ranks of the peers are ours, so that only what is between them differs. At the first stage
a hook takes the gradient of the smashed data as soon as it is computed. At the last stage the
exchange is the loss function, which waits for the UEs inside each micro-batch: in both libraries,
that is the public way to compute a loss elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from csipipe import models
from csipipe.bench import plain
from csipipe.bench.candidates import Layers
from csipipe.comm.groups import bts_group
from csipipe.comm.ledger import Kind
from csipipe.measure.clock import Clock
from csipipe.measure.figures import Figures
from csipipe.methods.base import set_rate
from csipipe.methods.csilocal import cut_tail
from csipipe.methods.half import Half
from csipipe.methods.seat import Seat
from csipipe.pipeline.schedule import Plan
from csipipe.settings.config import Settings


@dataclass(frozen=True)
class Choice:
    """What a benchmark decides about a candidate's tail.

    Attributes:
        layers: ours or plain.
        parts: first layer of every stage, then the number of layers; None: as
            topology.partition says.
    """

    layers: Layers
    parts: list[int] | None


def tail_of(settings: Settings, layers: Layers) -> list[nn.Module]:
    """The decoder tail with those layers, from the same initial weights."""
    build = plain.build_tail if layers == "plain" else models.build_tail
    return build(settings.model, settings.train.seed)


class PeerStage(Half):
    """One stage of the tail; `build` and `iterate` are the peer's.

    Args:
        engine: `csipipe.pipeline.engine`.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, seat: Seat, role: int, engine: ModuleType, choice: Choice) -> None:
        super().__init__(seat, role)
        settings, topology, world, device = self.settings, self.topology, self.world, self.device
        timeout, wire = settings.run.timeout, self.wire
        up, down = models.widths(settings.model)
        self.group = bts_group(world, topology.stages, device, timeout)
        engine.open_subworld(self.group, timeout)
        self.parts = choice.parts or self._cut()
        self.micro_batches = settings.train.micro_batches
        self.rows = wire.rows * topology.ues
        self.first, self.last = role == 0, role == topology.last_stage
        if self.first:
            self.smashed = wire.link(Kind.SMASHED, up)
            self.smashed_gradient = wire.link(Kind.SMASHED_GRADIENT, up)
        if self.last:
            self.output = wire.link(Kind.OUTPUT, down)
            self.output_gradient = wire.link(Kind.OUTPUT_GRADIENT, down)
        self._received = self._returned = self._scored = 0
        layers = tail_of(settings, choice.layers)
        if self.first:
            layers[0].register_forward_pre_hook(self._take_input)
        self.build(layers)

    def build(self, layers: list[nn.Module]) -> None:
        """Make the peer's pipeline of the tail's layers, and `optimizer`."""
        raise NotImplementedError

    def iterate(self) -> None:
        """Forward and backward passes of all micro-batches, and Adam's step."""
        raise NotImplementedError

    def begin(self, iteration: int) -> None:
        if self.first:
            self.reports.post()
            self.smashed.post()
        if self.last:
            self.output_gradient.post()
        self._received = self._returned = self._scored = 0
        set_rate(self.optimizer, self.settings.train.lr_at(iteration))

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """The peer has a schedule of its own."""
        self.iterate()

    def end(self) -> Figures | None:
        """At the first stage the UEs' figures."""
        if self.last:
            self.output.finish()
        if not self.first:
            return None
        self.smashed_gradient.finish()
        return Figures(self.reports.receive(0).clone())

    def next_smashed(self) -> Tensor:
        """Smashed data of the next micro-batch, (rows, c1)."""
        z = self.smashed.receive(self._received)
        self._received += 1
        return z

    def loss(self, output: Tensor, _: object = None) -> Tensor:
        """A scalar whose gradient with respect to `output` is the heads'."""
        self.output.send(self._scored, output)
        gradient = self.output_gradient.receive(self._scored)
        self._scored += 1
        return (output * gradient).sum()

    def _take_input(self, _: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        z = arguments[0].detach().requires_grad_()
        z.register_hook(self._return_gradient)  # type: ignore[no-untyped-call]
        return (z,)

    def _return_gradient(self, gradient: Tensor) -> None:
        self.smashed_gradient.send(self._returned, gradient)
        self._returned += 1

    def _cut(self) -> list[int]:
        parts = cut_tail(self.settings)
        assert parts is not None  # measured: ours measures, and the peers get its cuts
        return parts

    @property
    def backend(self) -> str:
        """Backend of the BTS's group."""
        return str(dist.get_backend(self.group))
