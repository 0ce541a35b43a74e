"""One rank's share of a split method: a BTS stage, a host of UEs, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from csipipe.comm import handshake
from csipipe.comm.collectives import largest, merged
from csipipe.comm.ledger import Kind, Ledger
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.measure.figures import Figures
from csipipe.methods import recorded
from csipipe.methods.base import Builder, EvalRows, batches_of
from csipipe.methods.half import Half, in_turns
from csipipe.methods.seat import Seat
from csipipe.methods.state import Unit
from csipipe.models import count_parts
from csipipe.pipeline import order
from csipipe.pipeline.schedule import Attempts, Instruction, Op
from csipipe.settings.config import Settings
from csipipe.settings.tables import is_own

Role = Callable[[Seat, int], Half]
"""Makes a half once the ranks have met; `PrepareRole` does what a rank can do for it before."""
PrepareRole = Callable[[Settings, Topology, int, torch.device], Role]
_APART = 20
"""Iterations from one that is computed without the recording, to show its gradients, to the next:
without it, it takes three times as long."""
Plans = Callable[[Settings, Topology], list[Attempts[Instruction]]]
"""An iteration, for every role of the run."""


def prepare(
    prepare_role: PrepareRole,
    plans: Plans,
    settings: Settings,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Builder:
    """As `csipipe.methods.prepare`, for a method with a BTS."""
    settings = settings.on(world_size)
    topology = Topology.of(settings, world_size)
    roles = {r: prepare_role(settings, topology, r, device) for r in topology.roles_of(rank)}
    ordered = plans(settings, topology)

    def build(world: World) -> Rank:
        found = Rank(settings, topology, world, device)
        found.take([make(found, role) for role, make in roles.items()], ordered)
        return found

    return build


class Rank(Seat):
    """Its roles, and the order in which they work: a `csipipe.methods.base.Worker`.

    Attributes:
        halves: its roles, once it has taken them on; the stage first.
    """

    def __init__(
        self, settings: Settings, topology: Topology, world: World, device: torch.device
    ) -> None:
        super().__init__(settings, topology, world, device)
        self.parameters = count_parts(settings.model)
        self.halves: list[Half] = []
        self._recorded: recorded.Recorded | None = None
        self._ahead = False
        """Whether the next iteration has been launched."""
        self._steps = 0

    def take(self, halves: Sequence[Half], plans: Sequence[Attempts[Instruction]]) -> None:
        """Take on its roles, and agree with the other ranks; collective.

        Args:
            plans: of every role of the run.
        """
        self.halves = list(halves)
        wires = [half.wire for half in halves]
        self._decisions = wires[0].announcements(Kind.DECISION, 0, 1)
        sections = zip(*((p.once, p.attempt, p.end, p.before, p.after) for p in plans), strict=True)
        self._order = Attempts(*(self._mine(section) for section in sections))
        if Instruction(Op.ROLL_CALL) in plans[0].attempt:
            self.roster.connect(wires[0])
        self.world.ready("parts")  # building them may take longer than a wait in an iteration
        handshake.compare_messages(self.world, wires)
        found = [half.evaluated() for half in halves]
        rows = {part: max(one[part] for one in found) for part in found[0]}
        batches = [batches_of(n, self.settings.train.batch_size) for n in rows.values()]
        self.batches = dict(zip(rows, largest(batches), strict=True))
        self._decide_on_recording()

    def _decide_on_recording(self) -> None:
        """Whether iterations become a CUDA graph (ValueError: they are to and can't)."""
        wanted = self.settings.train.cuda_graph
        if wanted == "never" or (wanted == "auto" and self.device.type != "cuda"):
            return
        reason = self._unrecordable()
        if wanted == "auto" and reason is None and is_own(self.settings.model.name):
            reason = "a model of your own may decide in Python; always tries it"
        if reason is None:
            recorded.on_a_stream()
            self.record(recorded.record)
            self.notes.append(f"iterations are one CUDA graph (train.cuda_graph is {wanted})")
        elif wanted == "always":
            raise ValueError(
                f"train.cuda_graph is always, but {reason}. Use train.cuda_graph auto or never."
            )
        else:
            self.notes.append(f"iterations are no CUDA graph (train.cuda_graph auto): {reason}")

    def _unrecordable(self) -> str | None:
        if self.device.type != "cuda":
            return "this rank computes on a CPU"
        if self.world.size > 1:
            return f"{self.world.size} processes train together, and one can be recorded"
        if self.settings.run.profile:
            return "run.profile looks into iterations"
        reasons = (half.unrecordable() for half in self.halves)
        return next((reason for reason in reasons if reason is not None), None)

    def record(self, by: recorded.Recorder) -> None:
        """From now on record an iteration, `by` that, and replay it."""
        self.probe.apart = _APART
        ledgers = [half.wire.ledger for half in self.halves]
        self._recorded = recorded.Recorded(self._state, ledgers, by, self.device)

    def _state(self) -> list[Tensor]:
        """BatchNorm's statistics, and what is drawn for an iteration."""
        modules = (m for unit in self.units().values() for m in unit.modules.values())
        buffers = (buffer for module in modules for buffer in module.buffers())
        return [*buffers, *(t for half in self.halves for t in half.drawn())]

    def _mine(self, plans: Sequence[Sequence[Instruction]]) -> list[order.Part]:
        roles = self.topology.roles_of(self.world.rank)
        if len(roles) == 1:
            return [(roles[0], list(plans[roles[0]]))]
        hosts = [self.topology.rank(role) for role in range(len(plans))]
        return order.of_rank(order.merge(plans, self.topology.stages, hosts), roles)

    @property
    def has_holdout(self) -> bool:
        return self.batches["holdout"] > 0

    def train_iteration(self, iteration: int) -> Figures | None:
        """One iteration; figures of the UEs' batches on rank 0."""
        self.world.doing = f"{self.topology.role(self.world.rank)}, iteration {iteration + 1}"
        self._draw(iteration)
        for half in self.halves:
            half.begin(iteration)
        if not self._ahead:
            self._launch(iteration, self.probe.gradients_wanted)
        self._ahead = self.probe.unseen and self._recorded is not None and self._recorded.replays
        if self._ahead:
            self._launch(iteration + 1, as_it_is=False)
        if self._recorded is not None:
            self.clock.begin("compute", "iteration")
            self._recorded.settle(self._compute)
        figures = None
        for half in reversed(self.halves):  # UEs report before the first stage gathers
            figures = half.end()
        if self.roster.averages:
            self._run_some(self._order.after)
        self.clock.stop()
        self._keep_pace()
        return figures

    def _launch(self, iteration: int, as_it_is: bool) -> None:
        """Begin an iteration on a device that replays it; else it is over afterwards."""
        for half in self.halves:
            half.draw(iteration)
        if self._recorded is None:
            self._compute()
        else:
            self.clock.begin("compute", "launch")
            self._recorded.launch(self._compute, as_it_is)
        for half in self.halves:
            half.fetch()

    def _compute(self) -> None:
        """What of an iteration happens where it is computed."""
        for half in self.halves:
            half.load()
        if self.roster.behind:
            self._run_some(self._order.before)
        self.roster.train(self._order, self._run, self._undo)
        for half in self.halves:
            half.add_up()

    def _run(self, parts: Sequence[order.Part]) -> None:
        """Execute a section of the iteration."""
        of_role = {half.role: half for half in self.halves}
        for role, half in of_role.items():
            half.open([i for other, part in parts if other == role for i in part])
        for role, part in parts:
            of_role[role].execute(part)
        for half in self.halves:
            half.close()

    def _run_some(self, parts: Sequence[order.Part]) -> None:
        """Execute a section that is cut by UE, as far as it concerns UEs that take part."""
        some = [(role, mine) for role, part in parts if (mine := self.roster.of(part))]
        if some:  # most methods do all of it in one section
            self._run(some)

    def _draw(self, iteration: int | None) -> None:
        """The UEs of an iteration, or of an evaluation, are present."""
        self.roster.draw(iteration)
        for half in self.halves:
            half.wire.lay(self.roster.present)
            half.wire.rounding.iteration = iteration

    def _undo(self) -> None:
        for half in self.halves:
            half.undo()

    def evaluate(self, part: EvalRows) -> Figures | None:
        """Figures on `part`, on rank 0."""
        assert not self._ahead, "probe.unseen"
        self._draw(None)
        with torch.no_grad():
            figures = in_turns(half.evaluation(part) for half in reversed(self.halves))
        self._keep_pace()
        return figures

    def _keep_pace(self) -> None:
        """A rank whose UEs are all absent waits for rank 0 here: in its next transfer it would wait
        for longer than `run.timeout`.
        """
        present, topology, world = self.roster.present, self.topology, self.world
        if len(present) == topology.ues:
            return
        self._steps += 1
        done = f"done/{self._steps}"
        if world.rank == 0:
            world.store.set(done, "")
            # who waited for the one before has reported since
            world.store.delete_key(f"done/{self._steps - 1}")
        elif world.rank not in topology.working(present):
            world.read(done, 0, "the others to be done", math.inf)

    def agree(self, decision: bool) -> bool:
        """Rank 0's decision, on every rank."""
        if self.world.rank == 0:
            self._decisions.send(0, torch.tensor([float(decision)], dtype=torch.float64))
            self._decisions.finish()
            return decision
        self._decisions.post()
        return bool(self._decisions.receive(0).item())

    def save_weights(self, folder: Path) -> None:
        for half in self.halves:
            half.lend()
        for half in self.halves:
            half.hand_over()
        for half in self.halves:
            half.save_weights(folder)

    def units(self) -> dict[str, Unit]:
        return {name: unit for half in self.halves for name, unit in half.units().items()}

    def exchanged(self) -> Ledger:
        counted = [Ledger(self.topology.ues), Ledger(self.topology.ues)]
        for half in self.halves:
            counted[self.topology.is_bts(half.role)] = half.wire.ledger
        return merged(*counted)

    def restore_ledger(self, ledger: Ledger) -> None:
        """Each side gets all counts once: hosts their UEs', the first stage those of all UEs."""
        for half in self.halves:
            counts = half.wire.ledger.counts
            if half.role == 0:
                counts.copy_(ledger.counts)
            elif not self.topology.is_bts(half.role):
                ues = self.topology.ues_of(half.role)
                counts[:, :, ues.start : ues.stop] = ledger.counts[:, :, ues.start : ues.stop]
