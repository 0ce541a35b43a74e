"""Which UEs take part in an iteration."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from runs import small

from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods.aggregator import BtsHalf
from csipipe.methods.half import in_turns
from csipipe.methods.rank import Rank
from csipipe.methods.roster import averages, drawn, evaluated, returning
from csipipe.pipeline.schedule import Instruction, Op
from csipipe.settings.config import RunSettings, Settings, TopologySettings, TrainSettings
from csipipe.settings.tables import METHODS


def settings(ues: int, participants: int | None, seed: int = 0) -> Settings:
    return Settings(
        topology=TopologySettings(ues=ues, participants=participants),
        train=TrainSettings(seed=seed),
    )


def test_k_different_ues_in_order() -> None:
    for k in range(100):
        present = drawn(settings(20, 7), k)
        assert len(present) == 7
        assert present == sorted(set(present) & set(range(20)))


def test_by_default_all() -> None:
    assert drawn(settings(4, None), 3) == drawn(settings(4, 4), 9) == [0, 1, 2, 3]


def test_the_draw_is_a_function_of_seed_and_iteration_alone() -> None:
    ours = [drawn(settings(50, 5), k) for k in range(20)]
    assert ours == [drawn(settings(50, 5), k) for k in range(20)]
    assert ours != [drawn(settings(50, 5, seed=1), k) for k in range(20)]
    assert len({tuple(present) for present in ours}) == 20
    # a run that resumes with another release must draw the same
    assert drawn(settings(10, 3), 0) == [4, 8, 9]
    assert drawn(settings(10, 3), 1000) == [0, 5, 6]


def test_every_ue_comes_equally_often() -> None:
    """2,000 draws of 5 of 20: 500 each, with a standard deviation of 19."""
    times = Counter(ue for k in range(2000) for ue in drawn(settings(20, 5), k))
    assert len(times) == 20
    assert all(400 < n < 600 for n in times.values())


@pytest.mark.parametrize("participants", [0, -1, 5])
def test_more_than_there_are_or_none_is_refused(participants: int) -> None:
    with pytest.raises(
        ValueError, match=r"participants is -?\d; it must lie between 1 and .*ues 4"
    ):
        settings(4, participants)


def test_in_one_process_without_a_bts_nobody_is_absent() -> None:
    with pytest.raises(ValueError, match=r"participants is 2, but centralised has the rows"):
        Settings(method="centralised", topology=TopologySettings(participants=2))


def evaluating(ues: int | None, seed: int = 0) -> Settings:
    return Settings(
        topology=TopologySettings(ues=50),
        train=TrainSettings(seed=seed),
        run=RunSettings(eval_ues=ues),
    )


def test_evaluations_are_over_ues_of_their_own_draw() -> None:
    assert evaluated(evaluating(None)) == evaluated(evaluating(50)) == list(range(50))
    chosen = evaluated(evaluating(5))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 5
    assert chosen != evaluated(evaluating(5, seed=1))
    assert chosen != drawn(settings(50, 5), 0)
    # a run that resumes with another release must draw the same
    assert chosen == [18, 31, 36, 45, 49]


@pytest.mark.parametrize("ues", [0, -1, 51])
def test_evaluations_over_more_than_there_are_or_none_are_refused(ues: int) -> None:
    with pytest.raises(ValueError, match=r"eval_ues is -?\d+; it must lie between 1 and .*ues 50"):
        evaluating(ues)


def test_a_period_has_the_same_ues_and_ends_with_an_averaging() -> None:
    """E = 4, in 15 iterations of which the last 5 are the UEs' own: averaged after 4 and 8."""
    one = Settings(
        method="splitfed",
        topology=TopologySettings(ues=20, participants=5),
        train=TrainSettings(iterations=15, aggregate_every=4, personal_iterations=5),
    )
    every = [drawn(one, k) for k in range(15)]
    assert [k for k in range(15) if averages(one, k)] == [3, 7]
    assert every[0:4] == [every[0]] * 4
    assert every[4:8] == [every[4]] * 4
    assert len({tuple(present) for present in every}) == 2 + 7
    plain = Settings(topology=one.topology, train=TrainSettings(iterations=15))
    assert every[8:] == [drawn(plain, k) for k in range(8, 15)]
    behind = [returning(one, k) for k in range(15)]
    assert {k for k, ues in enumerate(behind) if ues} == {4, 8}
    assert behind[4] == sorted({*every[4]} - {*every[0]})
    assert behind[8] == sorted({*range(20)} - {*every[4]})  # all have the last mean


def test_a_period_is_the_methods_own_unless_it_is_said() -> None:
    assert Settings(method="splitfed").aggregate_every == METHODS["splitfed"].aggregates > 1
    train = TrainSettings(aggregate_every=3)
    assert Settings(method="splitfed", train=train).aggregate_every == 3
    assert Settings().aggregate_every == 1


def test_a_section_without_work_is_not_executed() -> None:
    """A peer of the benchmark would train another step in it."""
    executed: list[Any] = []
    rank = SimpleNamespace(roster=SimpleNamespace(of=list), _run=executed.append)
    work = [Instruction(Op.SEND_MEAN)]
    Rank._run_some(cast(Rank, rank), [(0, []), (1, [])])
    Rank._run_some(cast(Rank, rank), [(0, []), (1, work)])
    assert executed == [[(1, work)]]


def test_who_is_left_out_of_one_batch_is_left_out_of_a_federated_evaluation() -> None:
    ones = torch.ones(3, WIDTH, dtype=torch.float64)
    found = iter([Figures(ones, frozenset({1})), Figures(ones)])
    half = SimpleNamespace(
        settings=small("fedavgper"),
        topology=SimpleNamespace(ues=3),
        seat=SimpleNamespace(roster=SimpleNamespace(evaluated=[0, 1, 2]), batches={"test": 2}),
        exchange=SimpleNamespace(lend=lambda ues: None),
        reports=SimpleNamespace(post=lambda: None),
        gather=lambda: next(found),
    )
    figures = in_turns([BtsHalf.evaluation(cast(BtsHalf, half), "test")])
    assert figures is not None
    assert figures.left_out == {1}
    assert torch.equal(figures.sums, 2 * ones)
