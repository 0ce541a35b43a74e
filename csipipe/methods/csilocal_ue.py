"""CSILocal (Algorithm 1) on a UE rank: encoders, heads, losses.

Shapes: as in `csipipe.methods.csilocal_bts`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from csipipe import models
from csipipe.comm.channel import Ports
from csipipe.comm.ledger import Kind
from csipipe.device import download, host_buffer
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH
from csipipe.methods.base import EvalRows, padded
from csipipe.methods.ends import Way, ends
from csipipe.methods.half import Evaluation, UeSide
from csipipe.methods.objective import Objective
from csipipe.methods.roster import AGREED, keep_buffers
from csipipe.methods.seat import Seat
from csipipe.methods.state import Unit, ue_name
from csipipe.methods.ue import DRAWN, UserEquipment, mini_batches
from csipipe.methods.uestage import UeStage
from csipipe.pipeline import schedule
from csipipe.pipeline.schedule import Instruction, Op, Plan


class UeHalf(UeSide):
    """Some of the UEs; other arguments as `UeSide`.

    Args:
        way: how they are computed.

    Attributes:
        always: what is executed even if none of the UEs takes part.
    """

    def __init__(
        self, seat: Seat, role: int, ues: list[UserEquipment], test: Tensor, way: Way
    ) -> None:
        super().__init__(seat, role, ues, test)
        (up, down), train = models.widths(self.settings.model), self.settings.train
        self.ports = Ports(
            forward_out=self.wire.link(Kind.SMASHED, up),
            forward_in=self.wire.link(Kind.OUTPUT, down),
            backward_out=self.wire.link(Kind.OUTPUT_GRADIENT, down),
            backward_in=self.wire.link(Kind.SMASHED_GRADIENT, up),
        )
        self.ends = ends(ues, self.probe, self.settings, way)
        self.stage = UeStage(
            ues,
            self.ends,
            self.ports,
            train.micro_batches,
            train.precision,
            Objective.of(self.settings, self.device),
            self.probe,
            self.tolerant,
            calls={op: partial(self._hear, kind) for op, kind in AGREED.items()},
        )
        self.whole, self.each = self.stage.whole, self.stage.each
        self.always: set[Op] = set()
        self._restore: list[dict[str, Callable[[], None]]] = []
        # these two stay where they are, so that an iteration can be recorded
        shape = len(ues), DRAWN, train.batch_size
        self._drawn = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self._sums = torch.zeros(len(ues), WIDTH, dtype=torch.float64, device=self.device)
        self._fetched: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def evaluated(self) -> dict[EvalRows, int]:
        ues = [self.ues[at] for at in self._places(self.seat.roster.evaluated)]
        return {"holdout": max((len(ue.holdout) for ue in ues), default=0), "test": len(self.test)}

    def begin(self, iteration: int) -> None:
        self.stage.take(self._places(self.seat.roster.present))

    def draw(self, iteration: int) -> None:
        """Lines 3 and 8–10 of Algorithm 1 follow."""
        self.clock.begin("compute", "draw mini-batches")
        train, ues = self.settings.train, self.stage.ues
        if ues:
            shape = len(ues), *self._drawn.shape[1:]
            # pinned: from other memory, a copy waits until the device has done all before it
            drawn = host_buffer(shape, self._drawn.dtype, self.device)
            torch.stack([ue.draw(train.batch_size) for ue in ues], out=drawn)
            self._drawn[: len(ues)].copy_(drawn, non_blocking=True)
        self.ends.set_rate(train.lr_at(iteration))

    def drawn(self) -> list[Tensor]:
        return [self._drawn]

    def load(self) -> None:
        if ues := self.stage.ues:
            self.stage.load(mini_batches(ues, self._drawn[: len(ues)]))
        self.ends.train(True)
        self._keep()

    def _keep(self) -> None:
        """Note what the UEs' buffers are, to go back to."""
        if self.tolerant:
            places = self._places(self.seat.roster.present)
            self._restore = [
                {name: keep_buffers([part]) for name, part in self.ues[u].parts.items()}
                for u in places
            ]

    def _places(self, present: Sequence[int]) -> list[int]:
        """Where the UEs that are present stand among those of this role."""
        hosted = self.topology.ues_of(self.role)
        return [ue - hosted.start for ue in present if ue in hosted]

    def open(self, plan: list[Instruction]) -> None:
        if any(i.op is Op.RECEIVE_FORWARD for i in plan) and self.stage.ues:
            self.stage.post(backward=any(i.op is Op.RECEIVE_BACKWARD for i in plan))

    def execute(self, plan: Plan, clock: Clock | None = None) -> None:
        """Where none of its UEs takes part, a role does only what is always done."""
        super().execute(plan if self.stage.ues else [i for i in plan if i.op in self.always], clock)

    def undo(self) -> None:
        self.ends.clear()
        for restore in self._restore:  # the encoders' pass isn't repeated
            restore["head"]()
        if places := self._places(self.seat.roster.present):
            self.ends.take(places)

    def add_up(self) -> None:
        if len(self.stage.ues) < len(self.ues):
            self._sums.zero_()
            if self.stage.ues:
                self._sums[self._places(self.seat.roster.present)] = self.stage.sums()
        else:
            self._sums.copy_(self.stage.sums())

    def fetch(self) -> None:
        self._fetched.append(download(self._sums))

    def end(self) -> None:
        """A UE that is left out stays as it was, including BatchNorm's statistics."""
        self.seat.leave_out(self.stage.faults)
        for u in self.stage.idle:
            for restore in self._restore[u].values():
                restore()
        self.clock.begin("send", "finish sending")
        # of all UEs, so that a rank without any in this iteration doesn't hurry ahead
        sums, wait = self._fetched.popleft()
        wait()
        self._report(sums)

    def unrecordable(self) -> str | None:
        if self.tolerant:
            return "train.on_bad_ue drop decides within an iteration who takes part"
        if self.settings.participants < self.topology.ues:
            return "other UEs take part in every iteration"
        if any(models.draws(ue.parts) for ue in self.ues):
            return "a layer draws random numbers"
        return self.wire.unrecordable()

    def _hear(self, kind: Kind) -> None:
        """Learn which UEs take part."""
        roster = self.seat.roster
        roster.agree(kind)
        ues = self.stage.ues
        self.stage.taking = [u for u, ue in enumerate(ues) if ue.number not in roster.out]

    def evaluation(self, part: EvalRows) -> Evaluation:
        """Forward passes only, over whole batches; rows of the padding don't count.

        A batch is encoded and sent before the previous one comes back.
        """
        size, batches = self.settings.train.batch_size, self.seat.batches[part]
        micro_batches = self.wire.micro_batches
        places = self._places(self.seat.roster.present)
        rows = [self.test if part == "test" else self.ues[at].holdout for at in places]
        sums = torch.zeros(len(self.ues), WIDTH, dtype=torch.float64, device=self.device)
        self.wire.ledger.phase = "evaluation"
        self.stage.take(places)
        self.ends.train(False)
        if places:
            self.ports.forward_in.post()  # before any send: the BTS keeps few messages in flight
        for k in range(batches + 1):
            # not after the next batch was sent: who takes it may wait for this rank's stage
            self.ports.forward_out.finish()
            if k < batches:
                start = k * size
                if places:
                    self.stage.load(
                        torch.stack([padded(h, start, size) for h in rows]),
                        [min(size, max(0, len(h) - start)) for h in rows],
                    )
                self.execute(schedule.ue_encoding(micro_batches), Clock())
            if k:
                self.execute(schedule.ue_decoding(micro_batches), Clock())
                if places:
                    sums[places] += self.stage.sums()
            if places and 0 < k < batches:
                self.ports.forward_in.post()
            if k < batches:
                yield
        self.wire.ledger.phase = "training"
        self._report(sums)
        return None

    def units(self) -> dict[str, Unit]:
        return {ue_name(ue.number): ue.unit() for ue in self.ues}

    def _report(self, sums: Tensor) -> None:
        """Send figures to the first stage; wait for what was sent in this iteration."""
        self.ports.forward_out.finish()
        self.ports.backward_out.finish()
        self.report(sums)
