"""Ranks, roles and the deal of UEs: arithmetic."""

from __future__ import annotations

import pytest

from csipipe.comm.topology import Topology


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("ue_ranks", [1, 2, 3])
@pytest.mark.parametrize("ues", [3, 4, 10])
def test_every_ue_lives_on_one_rank_in_order(stages: int, ue_ranks: int, ues: int) -> None:
    topology = Topology(stages + ue_ranks, stages, ues)
    dealt = [ue for rank in topology.ue_ranks for ue in topology.ues_of(rank)]
    assert dealt == list(range(ues))
    assert all(ue in topology.ues_of(topology.host(ue)) for ue in dealt)
    sizes = [len(topology.ues_of(rank)) for rank in topology.ue_ranks]
    assert max(sizes) - min(sizes) <= 1


def test_bts_ranks_come_first() -> None:
    topology = Topology(5, 2, 3)
    assert list(topology.bts_ranks) == [0, 1]
    assert list(topology.ue_ranks) == [2, 3, 4]
    assert topology.last_stage == 1
    assert [topology.is_bts(rank) for rank in range(5)] == [True, True, False, False, False]


def test_roles_are_named_for_people() -> None:
    topology = Topology(4, 2, 4)
    assert [topology.role(rank) for rank in range(4)] == [
        "BTS stage 0",
        "BTS stage 1",
        "UE rank 2 (UEs 0-1)",
        "UE rank 3 (UEs 2-3)",
    ]
    assert Topology(2, 1, 1).role(1) == "UE rank 1 (UE 0)"


@pytest.mark.parametrize(
    ("world_size", "stages", "ues", "message"),
    [
        (2, 2, 4, "--nproc_per_node=3 or more"),
        (6, 2, 3, "at most 5 processes"),
        (4, 0, 4, "must be at least 1"),
        (4, 2, 0, "must be at least 1"),
    ],
)
def test_impossible_topologies_name_the_remedy(
    world_size: int, stages: int, ues: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(world_size, stages, ues)
