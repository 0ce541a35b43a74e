"""Profiled runs of real processes: every rank's ranges, one clock, nothing else changed."""

from __future__ import annotations

import gzip
import itertools
import json
import resource
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from harness import Ended, Program, run_program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import arguments

from csipipe.comm.topology import Topology

ROLES = ["BTS stage 0", "BTS stage 1", "UE rank 2 (UEs 0-1)", "UE rank 3 (UEs 2-3)"]
QUICK = {"train__iterations": "8", "run__profile_iterations": "2", "run__eval_every": "8"}


def unpacked(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as source:
        return list(json.load(source)["traceEvents"])


def ranges(file: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Begin and end of every named range, by role and name, from the merged trace."""
    events = unpacked(file)
    roles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            times = (event["ts"], event["ts"] + event["dur"])
            mine = found.setdefault(roles[event["pid"]], defaultdict(list))
            mine[event["name"]].append(times)
    return {
        role: {name: sorted(times) for name, times in mine.items()} for role, mine in found.items()
    }


def trained(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "weights").iterdir()}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = run_program(4, arguments(folder, run__profile="true", **QUICK))
    assert [rank.code for rank in ended] == [0] * 4, [rank.err for rank in ended]
    return folder, ended


def test_every_rank_has_its_instructions_by_name(profiled: tuple[Path, list[Ended]]) -> None:
    found = ranges(profiled[0] / "profile" / "all-ranks.json.gz")
    assert list(found) == ROLES
    stage, ue = set(found[ROLES[0]]), set(found[ROLES[2]])
    both = {f"{way} {d} {m}" for way in ("send", "receive") for d in ("forward", "backward")
            for m in range(4)}  # fmt: skip
    mine = {f"{what} {m}" for what in ("forward", "backward", "weight gradients") for m in range(4)}
    assert both | mine | {"step"} <= stage
    assert {f"wait for {role}" for role in ROLES[1:]} <= stage
    assert both | {f"head {m}" for m in range(4)} <= ue
    assert {"encode", "weight gradients", "encode backward", "step"} <= ue
    assert {f"wait for {role}" for role in ROLES[:2]} <= ue
    for role in ROLES:
        names = [name for name in found[role] if name.startswith("ProfilerStep")]
        assert names == ["ProfilerStep#6", "ProfilerStep#7"]
        assert len(found[role]["step"]) == 2


def test_nothing_arrives_before_it_was_sent(profiled: tuple[Path, list[Ended]]) -> None:
    """Ranks stand in one order in time, so their clocks are aligned."""
    found = ranges(profiled[0] / "profile" / "all-ranks.json.gz")
    ring = [ROLES[0], ROLES[1], ROLES[2], ROLES[0]]
    for way, senders in (("forward", ring), ("backward", ring[::-1])):
        for sender, receiver in itertools.pairwise(senders):
            for m in range(4):
                sent = found[sender][f"send {way} {m}"]
                arrived = found[receiver][f"receive {way} {m}"]
                assert len(sent) == len(arrived) == 2
                for (begin, _), (_, end) in zip(sent, arrived, strict=True):
                    assert begin < end, (way, sender, receiver, m)


def test_each_rank_has_a_trace_for_tensorboard(profiled: tuple[Path, list[Ended]]) -> None:
    folder, ended = profiled
    names = sorted(file.name for file in (folder / "profile").iterdir())
    assert names == [
        "all-ranks.json.gz",
        "bts-stage-0.pt.trace.json.gz",
        "bts-stage-1.pt.trace.json.gz",
        "ue-rank-2-ues-0-1.pt.trace.json.gz",
        "ue-rank-3-ues-2-3.pt.trace.json.gz",
    ]
    assert EventAccumulator(str(folder)).Reload().Images("timeline")
    assert (folder / "timeline.svg").exists()
    said = [line for line in ended[0].err.splitlines() if "profile" in line]
    assert len(said) == 2
    assert all("profile" not in rank.err + rank.out for rank in ended[1:])


def test_a_profiled_run_learns_the_same(profiled: tuple[Path, list[Ended]], tmp_path: Path) -> None:
    run_program(4, arguments(tmp_path / "run", **QUICK))
    assert trained(profiled[0]) == trained(tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()
    assert not (tmp_path / "run" / "timeline.png").exists()


def test_a_rank_with_two_roles_has_the_ranges_of_both(tmp_path: Path) -> None:
    folder, both = tmp_path / "run", [Topology(2, 2, 4, together=True).role(r) for r in range(2)]
    chosen = arguments(folder, run__profile="true", topology__placement="together", **QUICK)
    ended = run_program(2, chosen)
    assert [rank.code for rank in ended] == [0] * 2, [rank.err for rank in ended]
    found = ranges(folder / "profile" / "all-ranks.json.gz")
    assert list(found) == both
    for role in both:
        assert {f"{what} 0" for what in ("forward", "backward", "head")} <= set(found[role])
        assert {"encode", "encode backward", "step"} <= set(found[role])
        assert len(found[role]["step"]) == 4  # of each role, in two iterations
    assert sorted(path.name for path in (folder / "ranks").iterdir()) == [
        "bts-stage-0-and-ue-rank-0-ues-0-1",
        "bts-stage-1-and-ue-rank-1-ues-2-3",
    ]
    for role in both:
        for name in role.split(" and "):  # a line each, left of the rank's row
            assert name in (folder / "timeline.svg").read_text()


@pytest.mark.long
def test_a_federated_method_has_ranges_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = run_program(3, arguments(folder, method="fedavg", run__profile="true", **QUICK))
    assert [rank.code for rank in ended] == [0] * 3, [rank.err for rank in ended]
    found = ranges(folder / "profile" / "all-ranks.json.gz")
    bts, ues = found["BTS stage 0"], found["UE rank 2 (UEs 2-3)"]
    for ue in range(4):
        assert {f"wait for UE {ue}", f"aggregate UE {ue}"} <= set(bts)
    for ue in (2, 3):
        assert {f"local step of UE {ue}", f"upload of UE {ue}"} <= set(ues)
        assert {f"wait for the mean, UE {ue}", f"apply the mean at UE {ue}"} <= set(ues)
    assert "local step of UE 1" not in ues
    assert (folder / "timeline.png").exists()


@pytest.mark.long
def test_a_disk_that_fills_up_costs_the_profile_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    chosen = arguments(
        folder, run__profile="true", train__iterations="30", run__profile_iterations="20"
    )
    with Program(4, chosen) as program:
        program.wait_for("takes up to", timeout=180)
        pid = program.ranks[3].pid
        assert pid is not None
        # no file of this rank may grow beyond 20 kB, as if there were no more room
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        program.wait_for("can't be written", timeout=180)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        ended = program.join()
    assert [rank.code for rank in ended] == [0] * 4
    (line,) = [line for line in ended[0].err.splitlines() if "can't be written" in line]
    assert f"{ROLES[3]}: " in line
    assert "training continues" in line
    names = {file.name for file in (folder / "profile").iterdir()}
    assert names == {
        "bts-stage-0.pt.trace.json.gz",
        "bts-stage-1.pt.trace.json.gz",
        "ue-rank-2-ues-0-1.pt.trace.json.gz",
    }
    assert (folder / "timeline.png").exists()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
