"""K of N: only the UEs of an iteration send, are counted and change."""

from __future__ import annotations

import json
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trainedruns
from bits import assert_same
from harness import run_program, run_world
from runs import CPU, Unsplit, joined, small, split, splits, unsplit
from test_drop import NAN, spoil
from test_federated import NOISE, ByHand, state_of
from test_parity import TOLERANCE, worst_gradient
from test_run import arguments

from csipipe import methods
from csipipe.comm.ledger import COUNTED, PAPER, PHASES, UP, Kind
from csipipe.comm.world import World
from csipipe.evaluation import testset
from csipipe.evaluation.samples import measure
from csipipe.evaluation.summary import Evaluated
from csipipe.methods.cost import exchanged, shared_parts
from csipipe.methods.roster import drawn
from csipipe.pipeline.schedule import Op
from csipipe.run import initial, trained
from csipipe.settings import commandline
from csipipe.settings.config import Placement, Settings

UES, PARTICIPANTS = 5, 2


def setting(
    stages: int = 1,
    placement: Placement = "apart",
    topology: dict[str, Any] | None = None,
    **train: Any,
) -> Settings:
    place = {"ues": UES, "participants": PARTICIPANTS, "stages": stages, "placement": placement}
    return small(topology=place | (topology or {}), train=train)


@cache
def csilocal(
    stages: int, hosts: int, placement: Placement = "apart", schedule: str = "zerobubble"
) -> dict[str, Any]:
    ranks = hosts + (stages if placement == "apart" else 0)
    settings = setting(stages, placement, schedule=schedule)
    return joined(run_world(ranks, split, settings, timeout=120))


def turns(settings: Settings) -> list[list[int]]:
    return [drawn(settings, k) for k in range(settings.train.iterations)]


def test_it_is_the_unsplit_model_of_those_ues() -> None:
    found, wanted = csilocal(1, 1), unsplit(setting())
    assert worst_gradient(found, wanted) <= TOLERANCE
    for ours, theirs, present in zip(
        found["losses"], wanted["losses"], turns(setting()), strict=True
    ):
        assert [ue for ue, loss in enumerate(ours) if loss] == present
        assert ours == pytest.approx(theirs, rel=TOLERANCE)
    for a, b in zip(found["evaluations"], wanted["evaluations"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    files = found["files"]
    for ue in range(UES):  # an encoder's BatchNorm counts the iterations of its UE
        [seen] = [t for n, t in files[f"ue-{ue}.safetensors"].items() if "tracked" in n]
        assert seen == sum(ue in present for present in turns(setting()))


@pytest.mark.parametrize(
    ("stages", "hosts", "placement", "schedule"),
    [
        (2, 5, "apart", "1f1b"),  # with one UE each: most of them have nothing to do
        (2, 2, "together", "zerobubble"),
        pytest.param(1, 3, "apart", "gpipe", marks=pytest.mark.long),
        pytest.param(1, 1, "together", "1f1b", marks=pytest.mark.long),
        pytest.param(2, 5, "together", "gpipe", marks=pytest.mark.long),
        pytest.param(2, 2, "apart", "zerobubble", marks=pytest.mark.long),
    ],
)
def test_placement_and_schedule_change_no_bit(
    stages: int, hosts: int, placement: Placement, schedule: str
) -> None:
    other = csilocal(stages, hosts, placement, schedule)
    assert_same(csilocal(1, 1), other, "losses", "parameters", "evaluations", "ledger")


def test_who_takes_no_part_is_not_counted() -> None:
    settings, ledger = setting(), csilocal(1, 1)["ledger"]
    training = ledger[PHASES.index("training")]
    for kind, width in (
        (Kind.SMASHED, settings.model.c1),
        (Kind.OUTPUT, 16),
        (Kind.OUTPUT_GRADIENT, 16),
        (Kind.SMASHED_GRADIENT, settings.model.c1),
    ):
        for ue in range(UES):
            times = sum(ue in present for present in turns(settings))
            scalars = times * settings.train.batch_size * width
            assert training[COUNTED.index(kind), ue].tolist() == [scalars, 4 * scalars]


def spoiled(world: World, settings: Settings, bad: int) -> dict[str, Any]:
    """One rank, with a UE whose gradients are bad whenever it takes part."""
    builder = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = builder(world)
    spoil(worker, {bad: ("output_gradient", list(range(100)))}, NAN)
    losses = [worker.train_iteration(k) for k in range(settings.train.iterations)]
    world.leave()
    return {
        "losses": [f.loss_per_ue for f in losses if f is not None],
        "dropped": worker.dropped,
    }


def test_of_those_who_take_part_a_bad_one_is_dropped() -> None:
    """What is left is the unsplit model of the others; each UE has a rank to itself."""
    settings = setting(1, topology={"ues": 3}, iterations=6, on_bad_ue="drop")
    present = turns(settings)
    bad = present[0][0]
    found = run_world(4, spoiled, settings, bad)[0]
    assert found["dropped"] == [sum(ue == bad and ue in p for p in present) for ue in range(3)]
    assert 0 < found["dropped"][bad] < 6
    wanted = Unsplit(settings, *methods.load(settings, range(3), CPU), CPU, shared=False)
    wanted.without = frozenset([bad])
    for k, losses in enumerate(found["losses"]):
        assert losses == pytest.approx(wanted.train_iteration(k).loss_per_ue, rel=TOLERANCE)


def slowly(world: World, settings: Settings) -> list[bool]:
    """One rank of a run whose stage takes 1.2 s for an iteration; which are still noted as done."""
    builder = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(1.0)
    worker: Any = builder(world)
    if world.rank == 0:
        [stage] = worker.halves
        forward = stage.each[Op.FORWARD]

        def slow(m: int) -> None:
            time.sleep(0.3)
            forward(m)

        stage.each[Op.FORWARD] = slow
    for k in range(settings.train.iterations):
        worker.train_iteration(k)
    worker.exchanged()
    world.leave()
    return [world.store.check([f"done/{k + 1}"]) for k in range(settings.train.iterations)]


@pytest.mark.parametrize("on_bad_ue", ["stop", "drop"])
def test_a_rank_without_work_waits_for_nobody_for_long(on_bad_ue: str) -> None:
    """An iteration takes longer than the time-out; most ranks have none, in one or in several."""
    settings = setting(topology={"ues": 4, "participants": 1}, iterations=3, on_bad_ue=on_bad_ue)
    assert settings.train.micro_batches * 0.3 > 1.0
    assert turns(settings) == [[0], [3], [2]]
    assert run_world(5, slowly, settings)[0] == [False, False, True]


def federated(method: str, placement: Placement = "apart", **train: Any) -> Settings:
    """Three iterations of 2 of 5 UEs; two local steps where there are any."""
    steps = 1 if "grad" in method else 2
    train = {"iterations": 3, "local_steps": steps, "mu": 2.0, "lr": 3e-3} | train
    place = {"stages": None, "ues": UES, "participants": PARTICIPANTS, "placement": placement}
    return small(method, topology=place, train=train)


RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedproxper": {},
    "fedgrad": {},
    "fedgradper": {"personalisation": "fedalt"},
}


@cache
def some(ranks: int, placement: Placement = "apart") -> dict[str, dict[str, Any]]:
    runs = {method: federated(method, placement, **train) for method, train in RUNS.items()}
    found = run_world(ranks, splits, runs)
    return {name: joined([rank[name] for rank in found]) for name in runs}


class SomeByHand(ByHand):
    """What the UEs have in common is one state, which only those of an iteration load and move."""

    def __init__(self, settings: Settings) -> None:
        self.k = 0
        super().__init__(settings)
        for net in self.nets:  # as it would take part
            self.load(net)

    def load(self, net: Any) -> None:
        net.load_state_dict(net.state_dict() | self.common)

    def iteration(self, lr: float) -> None:
        whole = (self.ues, self.nets, self.moments)
        if not self.k:
            self.common = {n: t.clone() for n, t in self.start.items() if n in self.shared}
            self.steps: dict[str, Any] = {}
        present = drawn(self.settings, self.k)
        self.ues = [whole[0][ue] for ue in present]
        self.nets = [whole[1][ue] for ue in present]
        self.moments = [whole[2][ue] for ue in present]
        for net, moments in zip(self.nets, self.moments, strict=True):
            self.load(net)
            if "grad" in self.settings.method:  # Adam's state is the BTS's
                moments.update(self.steps)
        super().iteration(lr)
        self.common = {
            n: t.clone() for n, t in self.nets[0].state_dict().items() if n in self.shared
        }
        self.steps = {n: m for n, m in self.moments[0].items() if n in self.shared}
        self.ues, self.nets, self.moments = whole
        self.k += 1


@pytest.mark.parametrize("name", RUNS)
def test_federated_ues_take_turns_as_worked_out_by_hand(name: str) -> None:
    wanted = SomeByHand(federated(name, **RUNS[name]))
    for ue, net in enumerate(wanted.nets):
        state = state_of(some(3)[name], ue)
        for part in "012":
            hand = {
                k: v
                for k, v in net.state_dict().items()
                if k[0] == part and k not in NOISE and "tracked" not in k
            }
            difference, moved = (
                torch.cat([(a[key].double() - b[key]).flatten() for key in hand]).norm()
                for a, b in ((state, hand), (hand, wanted.start))
            )
            assert difference <= 1e-3 * moved, (ue, part)


@pytest.mark.parametrize(("ranks", "placement"), [(6, "apart"), (1, "together"), (3, "together")])
def test_federated_placement_changes_no_bit(ranks: int, placement: Placement) -> None:
    for name, one in some(ranks, placement).items():
        assert_same(one, some(3)[name], "losses", "evaluations", "parameters", "files", "ledger")


def test_who_is_back_receives_what_it_missed_and_the_others_nothing() -> None:
    for name, run in some(3).items():
        settings = federated(name, **RUNS[name])
        present = turns(settings)
        [training, evaluation] = run["ledger"]
        counts = {kind: training[COUNTED.index(kind), :, 0] for kind in COUNTED}
        d, _ = shared_parts(settings)
        for ue in range(UES):
            there = [ue in p for p in present]
            back = sum(now and not before for before, now in pairwise(there))
            assert counts[Kind.UPDATE][ue] == counts[Kind.MEAN_UPDATE][ue] == d * sum(there)
            assert counts[Kind.MISSED][ue] == d * back
        assert counts[Kind.MISSED_STATISTICS].sum() > 0
        paper = {
            way: sum(int(counts[k].sum()) for k in PAPER if (k in UP) == (way == "up"))
            for way in ("up", "down")
        }
        assert paper == exchanged(settings)
        # lent for two evaluations
        assert evaluation[COUNTED.index(Kind.MISSED), :, 0].tolist() == [2 * d] * UES


def test_bf16_loses_nothing_of_what_was_missed() -> None:
    """What rounding left a UE without is made up for when it is back."""
    runs = {p: federated("fedavg", precision=p, iterations=8) for p in ("fp32", "bf16")}
    ranks = run_world(2, splits, runs)
    fine, coarse = (joined([rank[p] for rank in ranks])["losses"] for p in runs)
    for a, b in zip(fine, coarse, strict=True):
        assert b == pytest.approx(a, rel=3e-2)


PERIODS = {"train__aggregate_every": "2", "train__personal_iterations": "0"}


FREEZING = {**PERIODS, "model__name": "frozenmodel:build", "model__c2": "null"}


@pytest.mark.parametrize(
    ("method", "more"), [("fedgradper", {}), ("splitfed", PERIODS), ("splitfed", FREEZING)]
)
def test_weights_and_checkpoints_have_what_all_have_in_common(
    method: str, more: dict[str, str], tmp_path: Path
) -> None:
    """Of a UE too that took no part in the last iteration."""
    some = {"topology__participants": "2", "data__holdout": "0.1", **more}
    given = arguments(tmp_path, method=method, **some)
    [ended] = run_program(1, given)
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    settings = commandline.read(given)
    assert summary["exchanged"]["scalars"] == exchanged(settings)
    torch.set_num_threads(1)
    rows = testset.load(settings)
    for weights in (trained.LAST, "6"):
        run = trained.read(tmp_path, weights=weights)
        found = Evaluated(run, measure(run.models(), rows, "fp32", CPU)).mean()
        assert found["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)


def beginning(world: World, settings: Settings) -> dict[str, dict[str, Any]]:
    """State of a run's parts that begins with the weights of another."""
    builder = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker = builder(world)
    source = initial.read(settings)
    assert source is not None
    source.give(worker)
    found = {
        name: {k: t.clone() for k, t in u.state().items()} for name, u in worker.units().items()
    }
    world.leave()
    return found


def test_the_bts_begins_with_the_weights_that_the_ues_take(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    settings = federated("fedgrad", "together", init=str(tmp_path / "run"))
    [parts] = run_world(1, beginning, settings)
    state, theirs = parts["bts"], parts["ue-3"]
    names = [name for name in state if name.startswith(("encoder.", "tail.", "head."))]
    assert_same({name: state[name] for name in names}, {name: theirs[name] for name in names})
    values = torch.cat(
        [state[name].flatten() for name in names if name.endswith(("weight", "bias"))]
    )
    known = state["values.known_NP"]
    assert known.shape == (UES, len(values))
    assert all(torch.equal(row.sort().values, values.sort().values) for row in known)
