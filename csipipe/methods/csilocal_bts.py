"""CSILocal (Algorithm 1): the BTS half of one iteration; `csilocal_ue` has the UE half.

Each UE encodes its mini-batch and sends smashed data z; the BTS runs the tail over micro-batches
that hold rows of every UE that takes part, ordered by UE number; heads compute the loss and send
the gradient at their input back the same way. Only z, the tail's output and the two gradients
cross, and figures (losses) to rank 0.

Shapes: M micro-batches, U UEs of this rank, R rows per UE and micro-batch, B = M·R rows per UE,
A angles, D delays, C = c1 or c2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from csipipe import checkpoint, models
from csipipe.comm.channel import Channel, Ports
from csipipe.comm.groups import bts_group, connect_stages, detours
from csipipe.comm.ledger import Kind
from csipipe.comm.world import World
from csipipe.device import stage_dtype
from csipipe.measure.figures import Figures
from csipipe.methods.base import EvalRows, adam, set_rate
from csipipe.methods.ends import Way
from csipipe.methods.half import Evaluation, Half
from csipipe.methods.roster import keep_buffers
from csipipe.methods.seat import Seat
from csipipe.methods.state import AdamMoments, Moments, Unit, layer_units
from csipipe.pipeline import balance, schedule
from csipipe.pipeline.schedule import Instruction, Op
from csipipe.pipeline.zero import ZeroMoments


class BtsHalf(Half):
    """One stage of the tail; the first also gathers the figures.

    Args:
        deepspeed: DeepSpeed's settings, without batch keys.
        engine: `csipipe.pipeline.engine`, which UE ranks never import.
        way: how the UEs are computed, for the notes.
        cuts: first layer of every stage, then the number of layers; None: measured now.

    Attributes:
        idle: at the first stage, UEs of the iteration that were left out of it.
    """

    def __init__(
        self,
        seat: Seat,
        role: int,
        deepspeed: dict[str, object],
        engine: ModuleType,
        way: Way,
        cuts: list[int] | None,
    ) -> None:
        super().__init__(seat, role)
        settings, topology, world, device = self.settings, self.topology, self.world, self.device
        train, timeout = settings.train, settings.run.timeout
        group = bts_group(world, topology.stages, device, timeout)
        engine.open_subworld(group, timeout)
        tail = models.build_tail(settings.model, train.seed)
        with self.autocast():
            seat.notes += models.kernels_notes(settings.model, device)
        if uncut := models.whole_backward(tail) if train.schedule == "zerobubble" else []:
            seat.notes.append(
                f"train.schedule zerobubble: {', '.join(uncut)} in the tail can't put off weight "
                "gradients, which are computed with the backward pass; Linear and Conv2d of "
                "csipipe.models.layers can."
            )
        seat.notes.append(way.note)
        module = engine.TailModule(tail, self._measure(tail) if cuts is None else cuts)
        self.layers = nn.ModuleList(module.forward_funcs)
        self.parts = module.parts
        self.ports = self._ports(world, timeout)
        self.ports.forward_in.tolerant = self.ports.backward_in.tolerant = self.tolerant
        self.stage = engine.TailStage(
            module,
            adam({"tail": module.parameters()}, train),
            deepspeed,
            rows=self.wire.rows * settings.participants,
            micro_batches=train.micro_batches,
            ports=self.ports,
            clock=self.clock,
            calls={Op.ROLL_CALL: self._call_the_roll, Op.VERDICT: self._judge},
            frozen="tail" in train.frozen,
        )
        self.whole, self.each = self.stage.whole, self.stage.each
        layers = {f"tail_layer_{n}": x for n, x in enumerate(self.layers, self.parts[role])}
        self.stage.before_step = partial(self.probe.gradients, {"tail": self.layers, **layers})
        self.idle: list[int] = []
        self._restore: Callable[[], None] | None = None
        optimizer = self.stage.optimizer
        plain = isinstance(optimizer, torch.optim.Adam)
        self.moments: Moments = AdamMoments(optimizer) if plain else ZeroMoments(optimizer)
        if train.micro_batches < topology.stages:
            seat.notes.append(
                f"train.micro_batches {train.micro_batches} is less than the number of stages, "
                f"{topology.stages}: some stages always wait; more micro-batches fill the pipeline."
            )
        seat.notes += detours(topology.stages, device, group)

    def begin(self, iteration: int) -> None:
        """Lines 4–7 and 11 of Algorithm 1 follow."""
        self.idle = []
        self.clock.begin("compute", "prepare")
        if self.role == 0:
            self.reports.post()
        self._restore = keep_buffers(self.layers) if self.tolerant else None

    def draw(self, iteration: int) -> None:
        set_rate(self.stage.optimizer, self.settings.train.lr_at(iteration))

    def open(self, plan: list[Instruction]) -> None:
        self.stage.open(plan)

    def close(self) -> None:
        self.stage.finish()

    def undo(self) -> None:
        assert self._restore is not None
        self.stage.clear()
        self._restore()

    def unrecordable(self) -> str | None:
        if not isinstance(self.moments, AdamMoments):
            return "ZeRO decides within a step what it sends"
        return "a layer draws random numbers" if any(map(models.draws, self.layers)) else None

    def end(self) -> Figures | None:
        self.stage.taking = None
        self.clock.begin("wait", "wait for figures")
        figures = self._figures()
        if figures is not None and self.tolerant:
            self._count_idle(figures)
        return figures

    def _count_idle(self, figures: Figures) -> None:
        """At the first stage: count UEs of the iteration that report no rows."""
        reported = figures.sums[:, 0].tolist()
        self.idle = idle = [ue for ue in self.seat.roster.present if not reported[ue]]
        self.seat.leave_out(
            dict.fromkeys(idle, "a gradient was bad; see the rank that received it")
        )
        self.seat.count(idle)

    def _call_the_roll(self) -> None:
        """All smashed data of the iteration have arrived; none has been used yet."""
        out, rows = self._agree(Kind.ROLL_CALL, self.ports.forward_in), self.wire.rows
        taking = [at for at, ue in enumerate(self.seat.roster.present) if ue not in out]
        places = [torch.arange(at * rows, (at + 1) * rows) for at in taking]
        self.stage.taking = torch.cat(places).to(self.device) if out else None

    def _judge(self) -> None:
        """All gradients of the iteration have arrived; no weight has been changed yet."""
        self._agree(Kind.VERDICT, self.ports.backward_in)

    def _agree(self, kind: Kind, channel: Channel) -> Collection[int]:
        """UEs that are left out, those among them that sent something bad through `channel`."""
        roster = self.seat.roster
        roster.agree(kind, self._found(channel, roster.out))
        return roster.out

    def _found(self, channel: Channel, out: Collection[int]) -> Collection[int]:
        """UEs that sent something bad here, except those that are left out already."""
        new = {ue: fault for ue, fault in channel.bad.items() if ue not in out}
        channel.bad.clear()
        self.seat.leave_out(new, out)
        return new

    def evaluation(self, part: EvalRows) -> Evaluation:
        """Forward passes only."""
        if self.role == 0:
            self.reports.post()
        self.wire.ledger.phase = "evaluation"
        for _ in range(self.seat.batches[part]):
            self.stage.evaluate_iteration(schedule.stage_evaluation(self.wire.micro_batches))
            yield
        self.wire.ledger.phase = "training"
        return self._figures(self._found(self.ports.forward_in, ()))

    def hand_over(self) -> None:
        """The other stages send the first one their layers."""
        if self.role:
            mine = checkpoint.flatten(self.layers)
            channel = self.wire.weights(self.role, len(mine))
            channel.send(0, mine)
            channel.finish()

    def save_weights(self, folder: Path) -> None:
        """The first stage writes the whole tail."""
        if self.role:
            return
        tail = nn.ModuleList(models.build_tail(self.settings.model, 0))
        flat = [checkpoint.flatten(self.layers)]
        for stage in self.topology.bts_ranks[1:]:
            layers = tail[self.parts[stage] : self.parts[stage + 1]]
            channel = self.wire.weights(stage, len(checkpoint.flatten(layers)))
            channel.post()
            flat.append(channel.receive(0))
        state = checkpoint.unflatten(torch.cat(flat), tail)
        checkpoint.save(checkpoint.tail_file(folder), {"tail": state})

    def units(self) -> dict[str, Unit]:
        """The layers of this stage."""
        return layer_units(self.layers, self.parts[self.role], self.moments)

    def _measure(self, tail: list[nn.Module]) -> list[int]:
        """Cuts by the layers' time on rank 0, which decides for all stages."""
        cuts = ""
        if self.role == 0:
            rows = self.wire.rows * self.settings.participants
            settings, precision = self.settings, self.settings.train.precision
            file = settings.topology.profile
            seconds = balance.profile(settings.model, rows, precision, self.device, file)
            parts = balance.cut(seconds, tail, self.topology.stages)
            self.seat.notes.append(balance.report(seconds, parts))
            cuts = json.dumps(parts)
        return [int(layer) for layer in json.loads(self.world.shared("cuts", cuts))]

    def _figures(self, without: Collection[int] = ()) -> Figures | None:
        return self.gather(without) if self.role == 0 else None

    def _ports(self, world: World, timeout: float) -> Ports:
        """Channels to the neighbours, which are UEs at the two ends.

        Forward and backward have a group each: NCCL executes the transfers between two ranks in one
        order, and there is no common order for the two directions.
        """
        wire, stage, topology = self.wire, self.role, self.topology
        model = self.settings.model
        shapes, (up, down) = models.tail_shapes(model), models.widths(model)
        dtype = stage_dtype(self.settings.train.precision, self.device)
        groups = [bts_group(world, topology.stages, self.device, timeout) for _ in range(2)]
        for group, backward in zip(groups, (False, True), strict=True):
            connect_stages(stage, topology.stages, self.device, group, backward)

        def near(kind: Kind, other: int, layer: int, group: int) -> Channel:
            return wire.neighbour(kind, other, shapes[layer], dtype, groups[group], timeout)

        start, stop = self.parts[stage], self.parts[stage + 1]
        first, last = stage == 0, stage == topology.last_stage
        return Ports(
            forward_in=wire.link(Kind.SMASHED, up)
            if first
            else near(Kind.ACTIVATION, stage - 1, start, 0),
            backward_out=wire.link(Kind.SMASHED_GRADIENT, up)
            if first
            else near(Kind.ACTIVATION_GRADIENT, stage - 1, start, 1),
            forward_out=wire.link(Kind.OUTPUT, down)
            if last
            else near(Kind.ACTIVATION, stage + 1, stop, 0),
            backward_in=wire.link(Kind.OUTPUT_GRADIENT, down)
            if last
            else near(Kind.ACTIVATION_GRADIENT, stage + 1, stop, 1),
        )
