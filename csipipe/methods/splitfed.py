"""SplitFed: CSILocal, with encoders and heads averaged over the UEs every E iterations.

An iteration is CSILocal's. Every E-th one is followed by a federated one without local steps, whose
aggregator is the first stage (`csipipe.methods.exchange`): every UE of the iteration sends by how
much its encoder and head have changed since the last averaging, and receives the mean. BatchNorm's
running statistics are averaged likewise; Adam's moments stay at the UE. After the last averaging
every UE goes on by itself.

Source: Thapa et al., *SplitFed: When Federated Learning Meets Split Learning*, AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from csipipe.comm.topology import Topology
from csipipe.methods import csilocal, csilocal_bts, csilocal_ue
from csipipe.methods.base import EvalRows, shared_tensors
from csipipe.methods.common import MEANS, MISSED, some_are_absent
from csipipe.methods.cost import averagings, exchanged_parts
from csipipe.methods.exchange import BtsExchange, UeExchange
from csipipe.methods.half import Evaluation
from csipipe.methods.replica import Agreed
from csipipe.methods.seat import Seat
from csipipe.methods.state import BTS, NoMoments, Unit, ue_name
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline import rounds
from csipipe.pipeline.schedule import Attempts, Instruction, Op
from csipipe.settings.config import Settings


def _plans(settings: Settings, topology: Topology) -> list[Attempts[Instruction]]:
    hosted = [topology.ues_of(role) for role in topology.ue_roles]
    plans, absent = csilocal.plans(settings, topology), some_are_absent(settings)
    return rounds.with_averaging(plans, topology.stages, hosted, absent)


def _note(settings: Settings) -> str:
    times, every = averagings(settings), settings.aggregate_every
    if not times:
        return f"nothing is averaged: {every} iterations between averagings are more than there are"
    own = settings.train.iterations - settings.aggregated
    what = " and ".join(exchanged_parts(settings))
    after = f"; in the last {own:,} every UE is on its own" if own else ""
    return f"{what} are averaged after every {every} iterations, {times:,} times{after}"


class UeHalf(csilocal_ue.UeHalf):
    """Some of the UEs; arguments as CSILocal's."""

    def __init__(self, seat: Seat, *arguments: Any, **named: Any) -> None:
        super().__init__(seat, *arguments, **named)
        names = exchanged_parts(self.settings)
        shared = {ue.number: shared_tensors(ue.parts[name] for name in names) for ue in self.ues}
        self.exchange = UeExchange(self, {ue: [*map(Agreed, of)] for ue, of in shared.items()})
        own = {**self.exchange.each, Op.SEND_UPDATE: self._send}
        self.each = {**self.each, **own}
        self.always |= {*own}
        self._behind = False
        """Whether UEs are receiving what they missed."""

    def begin(self, iteration: int) -> None:
        self.exchange.give_back()
        super().begin(iteration)

    def open(self, plan: list[Instruction]) -> None:
        super().open(plan)
        ops, roster = {i.op for i in plan}, self.seat.roster
        if Op.RECEIVE_MISSED in ops:
            self.exchange.post(MISSED, roster.behind)
            self._behind = True
        if Op.RECEIVE_MEAN in ops:
            self.exchange.post(MEANS, roster.present)

    def close(self) -> None:
        super().close()
        if self._behind and (places := self._places(self.seat.roster.present)):
            self.ends.take(places)  # they may have other weights than when the iteration began
            self._keep()
        self._behind = False

    def unrecordable(self) -> str | None:
        return "encoders and heads are averaged between iterations"

    def _send(self, ue: int) -> None:
        self.exchange.send(ue, self.exchange.agreed[ue][0].change())

    def evaluation(self, part: EvalRows) -> Evaluation:
        """As CSILocal's; UEs that are behind have what they missed."""
        if some_are_absent(self.settings):
            yield  # a BTS on this rank lends it
            evaluated = self.seat.roster.evaluated
            self.exchange.borrow(ue.number for ue in self.ues if ue.number in evaluated)
        figures = yield from super().evaluation(part)
        self.exchange.give_back()
        return figures

    def lend(self) -> None:
        self.exchange.borrow(ue.number for ue in self.ues)

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        self.exchange.give_back()

    def units(self) -> dict[str, Unit]:
        """With what was agreed on last: between two averagings a UE's parts are elsewhere."""
        self.exchange.give_back()
        return {ue_name(ue.number): self._unit(ue) for ue in self.ues}

    def _unit(self, ue: UserEquipment) -> Unit:
        unit, agreed = ue.unit(), self.exchange.agreed[ue.number]

        def begun() -> None:
            for one in agreed:
                one.refresh()

        more = {"agreed": _Kept(agreed), **self.exchange.feedback(ue.number)}
        return replace(unit, modules={**unit.modules, **more}, begun=begun)


class BtsHalf(csilocal_bts.BtsHalf):
    """One stage of the tail, the first one with the aggregator; arguments as CSILocal's."""

    def __init__(self, seat: Seat, *arguments: Any, **named: Any) -> None:
        super().__init__(seat, *arguments, **named)
        seat.notes.append(_note(self.settings))
        self.exchange = BtsExchange(self) if self.role == 0 else None
        if self.exchange is not None:
            self.whole = {**self.whole, **self.exchange.whole, Op.SEND_MEAN: self._send_mean}
            self.each = {**self.each, **self.exchange.each}

    def begin(self, iteration: int) -> None:
        super().begin(iteration)
        if self.exchange is not None:
            self.exchange.begin()

    def close(self) -> None:
        super().close()
        if self.exchange is not None:
            self.exchange.finish()

    def _send_mean(self) -> None:
        """A UE that was left out of the iteration sends its update all the same; counted once."""
        assert self.exchange is not None
        self.exchange.whole[Op.SEND_MEAN]()
        self.seat.count(ue for ue in self.exchange.faults if ue not in self.idle)

    def evaluation(self, part: EvalRows) -> Evaluation:
        """As CSILocal's; UEs that are behind are lent what they missed."""
        if some_are_absent(self.settings):
            if self.exchange is not None:
                self.exchange.lend(self.seat.roster.evaluated)
            yield  # for the UEs of this rank
        return (yield from super().evaluation(part))

    def lend(self) -> None:
        if self.exchange is not None:
            self.exchange.lend(range(self.topology.ues))

    def units(self) -> dict[str, Unit]:
        """The layers of this stage, and what the aggregator keeps."""
        exchange, found = self.exchange, super().units()
        if exchange is not None and (parts := exchange.units()):
            own = Unit(parts, NoMoments(), loaded=exchange.loaded, begun=exchange.begun)
            found[BTS] = own
        return found


class _Kept(nn.Module):
    """What was agreed on, in a checkpoint."""

    def __init__(self, agreed: Sequence[Agreed]) -> None:
        super().__init__()
        for name, one in zip(("values", "statistics"), agreed, strict=False):
            self.register_buffer(name, one.value)


prepare = partial(csilocal.prepare, stage=BtsHalf, end=UeHalf, iteration=_plans)
