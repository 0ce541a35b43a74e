"""CSILocal (Algorithm 1) on a UE rank: encoders, heads, losses.

Shapes: as in `csipipe.methods.csilocal_bts`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from csipipe import checkpoint, models
from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH
from csipipe.methods.base import Part, padded, set_rate
from csipipe.methods.half import Half
from csipipe.methods.roster import Roster, keep_buffers
from csipipe.methods.state import Unit, ue_name
from csipipe.methods.ue import UserEquipment
from csipipe.methods.uestage import UeBatch
from csipipe.pipeline import schedule
from csipipe.settings.config import Settings


class UeHalf(Half):
    """The UEs of one rank.

    Args:
        ues: this rank's UEs, ascending.
        test: (B, 2, A, D) the common test set.
    """

    def __init__(
        self,
        settings: Settings,
        topology: Topology,
        world: World,
        device: torch.device,
        ues: list[UserEquipment],
        test: Tensor,
    ) -> None:
        super().__init__(settings, topology, world, device)
        model = settings.model
        self.ues = ues
        self.test = test
        self.smashed = self.wire.link(Kind.SMASHED, model.c1)
        self.output = self.wire.link(Kind.OUTPUT, model.c2)
        self.output_gradient = self.wire.link(Kind.OUTPUT_GRADIENT, model.c2)
        self.smashed_gradient = self.wire.link(Kind.SMASHED_GRADIENT, model.c1)
        self.pending = models.put_off(ue.head for ue in ues)
        self.roster = Roster(self.wire) if self.tolerant else None
        self.agree_on_batches({"holdout": max(len(ue.holdout) for ue in ues), "test": len(test)})

    def train_iteration(self, iteration: int) -> None:
        """Lines 3 and 8–10 of Algorithm 1."""
        self.start(iteration)
        self.clock.begin("compute", "draw mini-batches")
        size = self.settings.train.batch_size
        for ue in self.ues:
            ue.train(True)
            set_rate(ue.optimizer, self.settings.train.lr_at(iteration))
        self._post()
        batch = UeBatch(self, [ue.draw(size) for ue in self.ues], [size] * len(self.ues))
        if self.roster is None:
            batch.execute(schedule.ue_training(self.wire.micro_batches), self.clock)
        else:
            self._train_without_bad_ues(self.roster, batch)
        self.clock.begin("send", "finish sending")
        self._report(batch.sums())
        self.clock.stop()

    def _post(self) -> None:
        self.output.post()
        self.smashed_gradient.post()

    def _train_without_bad_ues(self, roster: Roster, batch: UeBatch) -> None:
        """A UE that is left out stays as it was, BatchNorm's statistics included."""
        restore = [keep_buffers([ue.encoder, ue.head]) for ue in self.ues]

        def undo() -> None:
            for ue in self.ues:
                ue.optimizer.zero_grad()
            self._post()

        plan = schedule.ue_attempts(self.wire.micro_batches)
        roster.train(plan, lambda part: batch.execute(part, self.clock), undo)
        for u in batch.idle:
            self.ues[u].optimizer.zero_grad()
            restore[u]()

    def evaluate(self, part: Part) -> None:
        """Forward passes only, over whole batches; rows of the padding don't count.

        A batch is encoded and sent before the one ahead of it comes back.
        """
        size = self.settings.train.batch_size
        rows = [self.test if part == "test" else ue.holdout for ue in self.ues]
        sums = torch.zeros(len(self.ues), WIDTH, dtype=torch.float64, device=self.device)
        self.wire.ledger.phase = "evaluation"
        for ue in self.ues:
            ue.train(False)
        ahead: list[UeBatch] = []
        self.output.post()  # before anything is sent: the BTS keeps few messages under way
        with torch.no_grad():
            for start in range(0, self.batches[part] * size, size):
                batch = UeBatch(
                    self,
                    [padded(h, start, size) for h in rows],
                    [min(size, max(0, len(h) - start)) for h in rows],
                )
                batch.execute(schedule.ue_encoding(self.wire.micro_batches), Clock())
                ahead.append(batch)
                if len(ahead) > 1:
                    sums += self._decode(ahead.pop(0))
                    self.output.post()
                    self.smashed.finish()
            for batch in ahead:
                sums += self._decode(batch)
        self.wire.ledger.phase = "training"
        self._report(sums)

    def _decode(self, batch: UeBatch) -> Tensor:
        batch.execute(schedule.ue_decoding(self.wire.micro_batches), Clock())
        return batch.sums()

    def save_weights(self, folder: Path) -> None:
        for ue in self.ues:
            checkpoint.save(
                checkpoint.ue_file(folder, ue.number),
                {"encoder": ue.encoder.state_dict(), "head": ue.head.state_dict()},
            )

    def units(self) -> dict[str, Unit]:
        return {ue_name(ue.number): ue.unit() for ue in self.ues}

    def _report(self, sums: Tensor) -> None:
        """Send this rank's figures to rank 0; waits for what was sent in this iteration."""
        self.reports.send(0, sums.cpu())
        for channel in (self.smashed, self.output_gradient, self.reports):
            channel.finish()
