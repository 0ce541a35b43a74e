"""CSILocal (Algorithm 1): the UE half and the BTS half of one iteration, side by side.

Each UE encodes its mini-batch and sends smashed data z; the BTS runs the tail over micro-batches
that hold rows of every UE, ordered by UE number; heads compute the loss and send the gradient at
their input back the same way. Only z, the tail's output and the two gradients cross, and figures
(losses) to rank 0.

Shapes: M micro-batches, U UEs of this rank, R rows per UE and micro-batch, B = M·R rows per UE,
A angles, D delays, C = c1 or c2.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models, schedule
from csipipe.config import Settings
from csipipe.figures import WIDTH, Figures
from csipipe.methods.base import Part, adam, padded, set_rate
from csipipe.methods.half import Half
from csipipe.methods.ue import UserEquipment, losses
from csipipe.schedule import Op
from csipipe.topology import Topology
from csipipe.wire import Channel, Kind, connect_stages
from csipipe.world import World


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
        self.agree_on_batches({"holdout": max(len(ue.holdout) for ue in ues), "test": len(test)})

    def train_iteration(self, iteration: int) -> None:
        """Lines 3 and 8–10 of Algorithm 1."""
        self.start(iteration)
        size = self.settings.train.batch_size
        for ue in self.ues:
            ue.train(True)
            set_rate(ue.optimizer, self.settings.train.lr_at(iteration))
        self.output.post()
        self.smashed_gradient.post()
        batch = _UeBatch(self, [ue.draw(size) for ue in self.ues], [size] * len(self.ues))
        batch.execute(schedule.ue_training(self.wire.micro_batches))
        self._report(batch.sums)

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
        ahead: list[_UeBatch] = []
        with torch.no_grad():
            for start in range(0, self.batches[part] * size, size):
                batch = _UeBatch(
                    self,
                    [padded(h, start, size) for h in rows],
                    [min(size, max(0, len(h) - start)) for h in rows],
                )
                batch.execute(schedule.ue_encoding(self.wire.micro_batches))
                ahead.append(batch)
                if len(ahead) > 1:
                    sums += self._decode(ahead.pop(0))
                    self.smashed.finish()
            for batch in ahead:
                sums += self._decode(batch)
        self.wire.ledger.phase = "training"
        self._report(sums)

    def _decode(self, batch: _UeBatch) -> Tensor:
        self.output.post()
        batch.execute(schedule.ue_decoding(self.wire.micro_batches))
        return batch.sums

    def save_weights(self, folder: Path) -> None:
        for ue in self.ues:
            checkpoint.save(
                checkpoint.ue_file(folder, ue.number),
                {"encoder": ue.encoder.state_dict(), "head": ue.head.state_dict()},
            )

    def _report(self, sums: Tensor) -> None:
        """Send this rank's figures to rank 0; waits for what was sent in this iteration."""
        self.reports.send(0, sums.cpu())
        for channel in (self.smashed, self.output_gradient, self.reports):
            channel.finish()


class _UeBatch:
    """One mini-batch of every UE of a rank on its way through a schedule.

    Args:
        h_UBAD: a (B, 2, A, D) mini-batch per UE.
        valid: rows of each UE that count in `sums`; the rest is padding.
    """

    def __init__(self, half: UeHalf, h_UBAD: list[Tensor], valid: list[int]) -> None:
        self.half = half
        self.h_UBAD = h_UBAD
        self.valid = valid
        self.rows = half.wire.rows
        self.sums = torch.zeros(len(h_UBAD), WIDTH, dtype=torch.float64, device=half.device)
        self.z_UBC: list[Tensor] = []
        self.z_MRC: list[Tensor] = []
        self.y: dict[int, Tensor] = {}
        self.dy: dict[int, Tensor] = {}
        self.dz: dict[int, Tensor] = {}

    def execute(self, plan: schedule.Plan) -> None:
        """Execute the UE rank's instructions."""
        for instruction in plan:
            if instruction.micro_batch is None:
                _WHOLE[instruction.op](self)
            else:
                _PER_MICRO_BATCH[instruction.op](self, instruction.micro_batch)

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
        first = m * self.rows
        gradients = []
        for u, ue in enumerate(self.half.ues):
            y = self.y[m][u * self.rows : (u + 1) * self.rows]
            y = y.detach().requires_grad_(torch.is_grad_enabled())
            with self.half.autocast():
                h_hat = ue.head(y)
            h = self.h_UBAD[u][first : first + self.rows]
            loss, sums = losses(h_hat, h, min(self.rows, max(0, self.valid[u] - first)))
            self.sums[u] += sums
            if torch.is_grad_enabled():
                # a UE's loss is the mean over its whole mini-batch
                torch.autograd.backward(loss.sum() / len(self.h_UBAD[u]))
                assert y.grad is not None
                gradients.append(y.grad)
        if gradients:
            self.dy[m] = torch.cat(gradients)

    def send_backward(self, m: int) -> None:
        self.half.output_gradient.send(m, self.dy.pop(m))

    def receive_backward(self, m: int) -> None:
        self.dz[m] = self.half.smashed_gradient.receive(m)

    def encode_backward(self) -> None:
        dz_MRC = torch.stack([self.dz[m] for m in range(len(self.dz))])
        for u, z in enumerate(self.z_UBC):
            rows = slice(u * self.rows, (u + 1) * self.rows)
            torch.autograd.backward(z, dz_MRC[:, rows].flatten(0, 1).to(z.dtype))

    def step(self) -> None:
        for ue in self.half.ues:
            ue.step()


_WHOLE = {
    Op.ENCODE: _UeBatch.encode,
    Op.ENCODE_BACKWARD: _UeBatch.encode_backward,
    Op.STEP: _UeBatch.step,
}
_PER_MICRO_BATCH = {
    Op.SEND_FORWARD: _UeBatch.send_forward,
    Op.RECEIVE_FORWARD: _UeBatch.receive_forward,
    Op.HEAD: _UeBatch.head,
    Op.SEND_BACKWARD: _UeBatch.send_backward,
    Op.RECEIVE_BACKWARD: _UeBatch.receive_backward,
}


class BtsHalf(Half):
    """One stage of the tail on a BTS rank; rank 0 also gathers the figures.

    Args:
        deepspeed: DeepSpeed's settings, without batch keys.
        engine: `csipipe.pipeline.engine`, which UE ranks never import.
    """

    def __init__(
        self,
        settings: Settings,
        topology: Topology,
        world: World,
        device: torch.device,
        deepspeed: dict[str, object],
        engine: ModuleType,
    ) -> None:
        super().__init__(settings, topology, world, device)
        train, timeout = settings.train, settings.run.timeout
        engine.open_subworld(world.bts_group(topology.stages, device, timeout), timeout)
        tail = models.build_tail(settings.model, train.seed)
        module = engine.TailModule(tail, topology.stages, settings.topology.partition)
        self.layers = nn.ModuleList(module.forward_funcs)
        self.parts = module.parts
        self.stage = engine.TailStage(
            module,
            adam(module.parameters(), train),
            deepspeed,
            rows=self.wire.rows * topology.ues,
            micro_batches=train.micro_batches,
            ports=engine.Ports(**self._ports(world, timeout)),
        )
        self.agree_on_batches({"holdout": 0, "test": 0})

    def train_iteration(self, iteration: int) -> Figures | None:
        """Lines 4–7 and 11 of Algorithm 1."""
        self.start(iteration)
        if self.rank == 0:
            self.reports.post()
        plan = schedule.TRAINING[self.settings.train.schedule](self.wire.micro_batches)
        set_rate(self.stage.optimizer, self.settings.train.lr_at(iteration))
        self.stage.train_iteration(plan)
        return self._figures()

    def evaluate(self, part: Part) -> Figures | None:
        """Forward passes only."""
        if self.rank == 0:
            self.reports.post()
        self.wire.ledger.phase = "evaluation"
        for _ in range(self.batches[part]):
            self.stage.evaluate_iteration(schedule.stage_evaluation(self.wire.micro_batches))
        self.wire.ledger.phase = "training"
        return self._figures()

    def save_weights(self, folder: Path) -> None:
        """Rank 0 writes the whole tail; the other stages send it their layers."""
        mine = checkpoint.flatten(self.layers)
        if self.rank:
            channel = self.wire.weights(self.rank, len(mine))
            channel.send(0, mine)
            channel.finish()
            return
        tail = nn.ModuleList(models.build_tail(self.settings.model, 0))
        flat = [mine]
        for stage in self.topology.bts_ranks[1:]:
            layers = tail[self.parts[stage] : self.parts[stage + 1]]
            channel = self.wire.weights(stage, len(checkpoint.flatten(layers)))
            channel.post()
            flat.append(channel.receive(0))
        state = checkpoint.unflatten(torch.cat(flat), tail)
        checkpoint.save(checkpoint.tail_file(folder), {"tail": state})

    def _figures(self) -> Figures | None:
        return Figures(self.reports.receive(0).clone()) if self.rank == 0 else None

    def _ports(self, world: World, timeout: float) -> dict[str, Channel]:
        """Channels to the neighbours, which are UEs at the two ends.

        Forward and backward have a group of their own: NCCL executes what two ranks exchange in
        one order, and the two directions have none between them.
        """
        model, wire, rank = self.settings.model, self.wire, self.rank
        topology, shapes = self.topology, models.tail_shapes(self.settings.model)
        groups = [world.bts_group(topology.stages, self.device, timeout) for _ in range(2)]
        for group in groups:
            connect_stages(rank, topology.stages, self.device, group)

        def near(kind: Kind, stage: int, layer: int, group: int) -> Channel:
            return wire.neighbour(kind, stage, shapes[layer], groups[group])

        start, stop = self.parts[rank], self.parts[rank + 1]
        first, last = rank == 0, rank == topology.last_stage
        return {
            "forward_in": wire.link(Kind.SMASHED, model.c1)
            if first
            else near(Kind.ACTIVATION, rank - 1, start, 0),
            "backward_out": wire.link(Kind.SMASHED_GRADIENT, model.c1)
            if first
            else near(Kind.ACTIVATION_GRADIENT, rank - 1, start, 1),
            "forward_out": wire.link(Kind.OUTPUT, model.c2)
            if last
            else near(Kind.ACTIVATION, rank + 1, stop, 0),
            "backward_in": wire.link(Kind.OUTPUT_GRADIENT, model.c2)
            if last
            else near(Kind.ACTIVATION_GRADIENT, rank + 1, stop, 1),
        }
