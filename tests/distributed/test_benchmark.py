"""Candidates for real: all do the same arithmetic, and one that fails fails alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT, ForkedRank
from runs import small

from csipipe.bench import candidates, growth, race, table
from csipipe.bench.conductor import Conductor
from csipipe.reports import table1
from csipipe.settings.config import Settings


def quiet(line: str) -> None:
    """Takes what a race says."""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread of a tiny model only waits for its turn on a busy machine."""
    monkeypatch.setattr(candidates, "cores", lambda: 1)


def tiny() -> Settings:
    return small(topology={"ues": 2}, model={"c1": 8, "c2": 8}, train={"batch_size": 4})


def line_up(*names: str, layers: tuple[candidates.Layers, ...] = ("ours",)) -> race.Race:
    return race.Race(candidates.line_up(tiny(), 1, names, layers))


def forked() -> Conductor:
    return Conductor(limit=120.0, launch=ForkedRank)


@pytest.mark.long
def test_ranks_with_two_roles_do_the_same_arithmetic(tmp_path: Path) -> None:
    contest = line_up("ours", *candidates.TOGETHER)
    race.run(contest, 1, tmp_path / "rounds", conductor=forked(), say=quiet)
    assert not contest.failures
    assert [candidate.ranks for candidate in contest.candidates] == [3, 2, 1]
    assert [contest.beside[name] for name in candidates.TOGETHER] == [0.0, 0.0]  # to the bit


@pytest.mark.long
def test_all_candidates_do_the_same_arithmetic(tmp_path: Path) -> None:
    contest = line_up(*candidates.USUAL, "ours-gpipe")
    plain = line_up("deepspeed", "one-process", layers=("plain",)).candidates
    contest.candidates = [
        *contest.candidates,
        *(replace(c, label=f"{c.name} (plain)") for c in plain),
    ]
    race.run(contest, 2, tmp_path / "rounds", conductor=forked(), say=quiet)
    assert not contest.failures
    assert len(contest.seconds) == 10
    for candidate in contest.candidates:
        label = candidate.label
        assert len(contest.seconds[label]) == 2
        assert all(0 < seconds < 60 for seconds in contest.seconds[label])
        assert len(contest.losses[label]) == 5  # 3 of warm-up, 2 timed
        if candidate.name in candidates.OTHER_NORMS:
            assert label not in contest.beside
        elif candidate.ranks > 1 and candidate.layers == "ours":
            assert contest.beside[label] == 0.0  # to the bit
        else:
            assert contest.beside[label] < 1e-5
    lines = [json.loads(line) for line in (tmp_path / "rounds").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    assert lines[1]["seconds"]["deepspeed"] == contest.seconds["deepspeed"][1]
    found = json.loads(json.dumps(table.as_json(contest)))
    ours = found["candidates"]["ours"]
    assert ours["peak_bytes"]["stage 1"] > 1e7
    for shares in ours["shares"].values():
        assert min(shares.values()) > 0
        assert 0.5 < sum(shares.values()) < 1.01  # the rest: between an iteration's end and start
    assert found["ours_over"]["torch-1f1b"]["rounds"] == contest.ratios("ours", "torch-1f1b")


@pytest.mark.long
def test_deepspeed_trains_a_model_of_ones_own_with_a_weight_without_dimensions() -> None:
    whole = tiny()
    model = replace(whole.model, name="randommodel:build")
    settings = replace(whole, model=model, topology=replace(whole.topology, partition=None))
    contest = race.Race(candidates.line_up(settings, 1, ("ours", "deepspeed"), ("ours",)))
    race.run(contest, 1, conductor=forked(), say=quiet)
    assert not contest.failures
    assert contest.beside["deepspeed"] == 0.0  # to the bit


@pytest.mark.long
@pytest.mark.skipif(shutil.which(candidates.compiler()) is None, reason="no C++ compiler")
def test_a_compiled_tail_does_the_same_arithmetic() -> None:
    contest = line_up("one-process", "one-compiled")
    race.run(contest, 1, say=quiet)
    assert not contest.failures
    assert contest.beside["one-compiled"] < 1e-5


@pytest.mark.long
def test_a_wrong_peer_and_one_that_cannot_start_are_errors_and_not_figures() -> None:
    contest = line_up("ours", "one-process", "one-piece")
    ours, wrong, unable = contest.candidates
    train = replace(wrong.settings.train, seed=1)
    data = replace(unable.settings.data, source="csinet", path="/nowhere")
    contest.candidates = [
        ours,
        replace(wrong, settings=replace(wrong.settings, train=train)),
        replace(unable, settings=replace(unable.settings, data=data)),
    ]
    race.run(contest, 1, conductor=forked(), say=quiet)
    assert sorted(contest.failures) == ["one-piece", "one-process"]
    assert "one-process doesn't compute the same as ours" in contest.failures["one-process"]
    assert "one-piece: rank 0: data.path is /nowhere" in contest.failures["one-piece"]
    assert "the end of its log" in contest.failures["one-piece"]
    assert list(contest.seconds) == ["ours"]


@pytest.mark.long
def test_a_dead_and_a_frozen_candidate_are_named_and_end_alone() -> None:
    contest = line_up("ours", "one-process", "one-piece")
    with forked() as conductor:
        contest.start(conductor)
        contest.warm_up()
        contest.round()
        dead, frozen = (contest._residents[name] for name in ("one-process", "one-piece"))
        dead.processes[0].kill()
        frozen.limit = 1.0
        [process] = frozen.processes
        assert isinstance(process, ForkedRank)
        os.kill(process.pid, signal.SIGSTOP)
        contest.round()
        contest.round()
    assert "one-process: rank 0 exited with status -9" in contest.failures["one-process"]
    assert "one-piece: no answer from rank(s) [0] within 1 s" in contest.failures["one-piece"]
    assert {label: len(times) for label, times in contest.seconds.items()} == {
        "ours": 3,
        "one-process": 1,
        "one-piece": 1,
    }


def test_candidates_without_room_give_their_memory_back() -> None:
    contest = line_up("one-process", layers=candidates.LAYERS)
    with forked() as conductor:
        contest.start(conductor)
        contest.warm_up(available=1)
        assert contest.crowded
        contest.round()
    assert not contest.failures
    assert [len(losses) for losses in contest.losses.values()] == [4, 4]  # two of them untimed
    assert contest.beside["one-process (plain)"] < 1e-5


@pytest.mark.long
def test_growth_runs_more_ues_on_the_same_ranks() -> None:
    found = growth.candidates(small(train={"batch_size": 8}), 2, ues=(2, 4, 8))
    contest = race.Race(found, same=False)
    race.run(contest, 1, conductor=forked(), say=quiet)
    assert not contest.failures
    assert [c.ranks for c in found] == [4, 4, 4]
    lines = growth.table(contest).splitlines()[2:]
    assert [line.split()[:3] for line in lines] == [
        ["2", "UEs", "2"],
        ["4", "UEs", "4"],
        ["8", "UEs", "8"],
    ]
    assert [len(t) for t in contest.losses["8 UEs"]] == [8, 8, 8, 8]


@pytest.mark.long
def test_an_interrupted_benchmark_keeps_its_rounds_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    """Started as a person does, programs and all."""
    target = tmp_path / "figures.json"
    arguments = "--model.c1 8 --model.c2 8 --model.angles 8 --model.delays 8 --topology.ues 2"
    process = subprocess.Popen(
        [
            *(sys.executable, "launch/benchmark.py", *arguments.split(), "--rounds", "100000"),
            *("--ue-ranks", "1", "--only", "ours", "--json", str(target)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        record = tmp_path / "figures.json.rounds"
        _wait_for(lambda: record.exists() and len(record.read_text().splitlines()) >= 3)
        started = _children(process.pid)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert len(started) == 3
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert "interrupted after" in err
    assert "the reference for the others" in out
    found = json.loads(target.read_text())
    assert len(found["candidates"]["ours"]["seconds"]) >= 3


@pytest.mark.long
def test_table1_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table1, "_LEAST_TURN", 0.01)
    plan = table1.Plan(ues=2, angles=8, delays=8, ue_ranks=1)
    cells = [table1.Cell("indoor", 8, 4), table1.Cell("outdoor", 8, 4)]
    calls: list[int] = []

    def conductor() -> Conductor:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forked()

    with pytest.raises(SystemExit) as ended:
        table1.reproduce(plan, cells, tmp_path, 3, 60, conductor)
    assert ended.value.code == 130
    assert "1 finished cell(s)" in capsys.readouterr().out
    first = tmp_path / "cells" / "indoor-8-4.json"
    before = first.read_bytes()
    assert len((tmp_path / "table1.csv").read_text().splitlines()) == 2
    table1.reproduce(plan, cells, tmp_path, 3, 60, conductor)
    assert "1 cell(s) are in" in capsys.readouterr().out
    assert calls == [0, 1, 2]
    assert first.read_bytes() == before
    rows = table1.read(tmp_path)
    assert [row.environment for row in rows] == ["indoor", "outdoor"]
    assert [len(row.saved) for row in rows] == [3, 3]
    assert len((tmp_path / "table1.csv").read_text().splitlines()) == 3
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.suffix for f in (tmp_path / "cells").iterdir()) == [".json", ".json"]
    table1.reproduce(plan, cells, tmp_path, 3, 60, conductor)  # nothing is left to do
    assert calls == [0, 1, 2]
    with pytest.raises(ValueError, match=r"micro_batches 2, not 4"):
        table1.reproduce(replace(plan, micro_batches=4), cells, tmp_path, 3, 60, conductor)


def _wait_for(condition: object, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def _children(parent: int) -> list[int]:
    """Processes that a process started and that are still there."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in children.split()]
