"""CSILocal (Algorithm 1) on a UE rank: encoders, heads, losses.

Shapes: as in `csipipe.methods.csilocal_bts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from csipipe.comm.channel import Ports
from csipipe.comm.ledger import Kind
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH
from csipipe.methods.base import EvalRows, padded, set_rate
from csipipe.methods.half import Seat, UeSide
from csipipe.methods.roster import AGREED, Roster, keep_buffers
from csipipe.methods.state import Unit, ue_name
from csipipe.methods.ue import UserEquipment
from csipipe.methods.uestage import UeStage
from csipipe.pipeline import schedule


class UeHalf(UeSide):
    """The UEs of one rank; arguments as `UeSide`."""

    def __init__(self, seat: Seat, ues: list[UserEquipment], test: Tensor) -> None:
        super().__init__(seat, ues, test)
        model, train = self.settings.model, self.settings.train
        self.ports = Ports(
            forward_out=self.wire.link(Kind.SMASHED, model.c1),
            forward_in=self.wire.link(Kind.OUTPUT, model.c2),
            backward_out=self.wire.link(Kind.OUTPUT_GRADIENT, model.c2),
            backward_in=self.wire.link(Kind.SMASHED_GRADIENT, model.c1),
        )
        self.stage = UeStage(
            ues,
            self.ports,
            train.micro_batches,
            train.precision,
            self.clock,
            self.probe,
            self.tolerant,
            calls={op: partial(self._hear, kind) for op, kind in AGREED.items()},
        )
        self.roster = Roster(self.wire) if self.tolerant else None
        self.agree_on_batches({"holdout": max(len(ue.holdout) for ue in ues), "test": len(test)})

    def train_iteration(self, iteration: int) -> None:
        """Lines 3 and 8–10 of Algorithm 1."""
        self.start(iteration)
        self.clock.begin("compute", "draw mini-batches")
        train = self.settings.train
        for ue in self.ues:
            ue.train(True)
            set_rate(ue.optimizer, train.lr_at(iteration))
        self.stage.post()
        self.stage.load([ue.draw(train.batch_size) for ue in self.ues])
        if self.roster is None:
            self.stage.execute(schedule.ue_training(train.micro_batches))
        else:
            self._train_without_bad_ues(self.roster)
        self.clock.begin("send", "finish sending")
        self._report(self.stage.sums())
        self.clock.stop()

    def _train_without_bad_ues(self, roster: Roster) -> None:
        """A UE that is left out stays as it was, including BatchNorm's statistics."""
        restore = [keep_buffers([ue.encoder, ue.head]) for ue in self.ues]

        def undo() -> None:
            for ue in self.ues:
                ue.optimizer.zero_grad()
            self.stage.post()

        roster.train(schedule.ue_attempts(self.wire.micro_batches), self.stage.execute, undo)
        self.leave_out(self.stage.faults)
        for u in self.stage.idle:
            self.ues[u].optimizer.zero_grad()
            restore[u]()

    def _hear(self, kind: Kind) -> None:
        """Learn which UEs take part."""
        assert self.roster is not None
        self.roster.agree(kind)
        out = self.roster.out
        self.stage.taking = [u for u, ue in enumerate(self.ues) if ue.number not in out]

    def evaluate(self, part: EvalRows) -> None:
        """Forward passes only, over whole batches; rows of the padding don't count.

        A batch is encoded and sent before the previous one comes back.
        """
        size = self.settings.train.batch_size
        rows = [self.test if part == "test" else ue.holdout for ue in self.ues]
        sums = torch.zeros(len(self.ues), WIDTH, dtype=torch.float64, device=self.device)
        self.wire.ledger.phase = "evaluation"
        for ue in self.ues:
            ue.train(False)
        self.ports.forward_in.post()  # before any send: the BTS keeps few messages in flight
        with torch.no_grad():
            for k in range(self.batches[part] + 1):
                if k < self.batches[part]:
                    start = k * size
                    self.stage.load(
                        [padded(h, start, size) for h in rows],
                        [min(size, max(0, len(h) - start)) for h in rows],
                    )
                    self._evaluate(schedule.ue_encoding)
                if k:
                    self._evaluate(schedule.ue_decoding)
                    sums += self.stage.sums()
                    if k < self.batches[part]:
                        self.ports.forward_in.post()
                        self.ports.forward_out.finish()
        self.wire.ledger.phase = "training"
        self._report(sums)

    def _evaluate(self, plan: Callable[[int], schedule.Plan]) -> None:
        self.stage.execute(plan(self.wire.micro_batches), Clock())

    def units(self) -> dict[str, Unit]:
        return {ue_name(ue.number): ue.unit() for ue in self.ues}

    def _report(self, sums: Tensor) -> None:
        """Send this rank's figures to rank 0; waits for what was sent in this iteration."""
        self.reports.send(0, sums.cpu())
        for channel in (self.ports.forward_out, self.ports.backward_out, self.reports):
            channel.finish()
