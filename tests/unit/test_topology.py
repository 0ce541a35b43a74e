"""Ranks, roles and the deal of UEs: arithmetic."""

from __future__ import annotations

import pytest

from csipipe.comm.topology import Topology
from csipipe.settings.config import Placement, Settings, TopologySettings


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("ue_ranks", [1, 2, 3])
@pytest.mark.parametrize("ues", [3, 4, 10])
def test_every_ue_lives_on_one_rank_in_order(stages: int, ue_ranks: int, ues: int) -> None:
    topology = Topology(stages + ue_ranks, stages, ues)
    dealt = [ue for rank in topology.ue_roles for ue in topology.ues_of(rank)]
    assert dealt == list(range(ues))
    assert all(ue in topology.ues_of(topology.host(ue)) for ue in dealt)
    sizes = [len(topology.ues_of(rank)) for rank in topology.ue_roles]
    assert max(sizes) - min(sizes) <= 1


def test_bts_ranks_come_first() -> None:
    topology = Topology(5, 2, 3)
    assert list(topology.bts_ranks) == [0, 1]
    assert list(topology.ue_roles) == [2, 3, 4]
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


def test_a_rank_with_two_roles_is_named_by_both() -> None:
    topology = Topology(3, 2, 4, together=True)
    assert [topology.role(rank) for rank in range(3)] == [
        "BTS stage 0 and UE rank 0 (UEs 0-1)",
        "BTS stage 1 and UE rank 1 (UE 2)",
        "UE rank 2 (UE 3)",
    ]
    assert [topology.roles_of(rank) for rank in range(3)] == [[0, 2], [1, 3], [4]]
    assert [topology.rank(role) for role in range(5)] == [0, 1, 0, 1, 2]
    assert [topology.host(ue) for ue in range(4)] == [2, 2, 3, 4]
    assert topology.working([0, 3]) == {0, 1, 2}
    assert topology.working([2]) == {0, 1}
    assert Topology(4, 1, 3).working([0, 2]) == {0, 1, 3}


@pytest.mark.parametrize(
    ("world_size", "stages", "ues", "together", "message"),
    [
        (2, 2, 4, False, "--nproc_per_node=3 or more"),
        (6, 2, 3, False, "at most 5 processes"),
        (1, 2, 4, True, "--nproc_per_node=2 or more, or lower"),
        (4, 2, 3, True, "at most 3 processes"),
    ],
)
def test_impossible_topologies_name_the_remedy(
    world_size: int, stages: int, ues: int, together: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(world_size, stages, ues, together)


@pytest.mark.parametrize(
    ("method", "ranks", "placement", "stages", "decided"),
    [
        ("csilocal", 4, None, None, ("apart", 2)),
        ("csilocal", 1, None, None, ("together", 1)),
        ("csilocal", 4, "together", None, ("together", 2)),
        ("csilocal", 4, "together", 4, ("together", 4)),
        ("fedavg", 4, "together", None, ("together", 1)),
        ("centralised", 1, None, None, ("together", None)),
    ],
)
def test_placement_and_stages_follow_the_ranks(
    method: str,
    ranks: int,
    placement: Placement | None,
    stages: int | None,
    decided: tuple[str, int | None],
) -> None:
    asked = TopologySettings(placement=placement, stages=stages)
    found = Settings(method=method, topology=asked).on(ranks)
    assert (found.topology.placement, found.topology.stages) == decided
    assert found.on(ranks) == found


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [None, 1, 2, 3])
@pytest.mark.parametrize("placement", ["apart", "together", None])
def test_with_the_fewest_ranks_a_run_has_a_topology(
    placement: Placement | None, stages: int | None, processes: int
) -> None:
    """Where roles are depends on the number of ranks, so a larger number may need more."""
    settings = Settings(topology=TopologySettings(placement=placement, stages=stages, ues=4))
    fewest, most = Topology.ranks(settings, processes)
    for ranks in {max(fewest, min(processes, most)), fewest, most} - {1}:
        Topology.of(settings, ranks)


def test_ue_0_is_hosted_after_the_stages_or_with_the_first_of_them() -> None:
    hosted: tuple[tuple[Placement, int], ...] = (("apart", 2), ("together", 0))
    for placement, rank in hosted:
        place = TopologySettings(ues=4, stages=2, placement=placement)
        assert Topology.first_host(Settings(topology=place), 4) == rank
    assert Topology.first_host(Settings(method="centralised"), 1) == 0
