"""Profiles without processes: spans, clocks, merged traces, and the session on one rank."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import HashStore  # type: ignore[attr-defined]

from csipipe import methods
from csipipe.comm.blame import PeerLost
from csipipe.comm.texts import PeerFailed
from csipipe.comm.world import World
from csipipe.measure.clock import Clock
from csipipe.methods.centralised import Centralised
from csipipe.profiling import Profile, alignment, traces
from csipipe.profiling.recorder import Recorder
from csipipe.profiling.spans import Row, Span, from_json, idle, to_json, typical
from csipipe.run.stopping import Stopping
from csipipe.settings.config import (
    DataSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)
from csipipe.tracking import Tracker

CPU = torch.device("cpu")
MS = 1_000_000


def span(begin: int, end: int, activity: str = "compute", iteration: int = 1) -> Span:
    return Span(activity, "forward", 0, iteration, begin, end)


def test_a_clock_counts_what_it_was_told_of() -> None:
    clock = Clock()
    clock.begin("wait", "wait")
    time.sleep(0.02)
    clock.begin("compute", "forward", 1)
    clock.stop()
    before = dict(clock.seconds)
    time.sleep(0.01)  # nobody's
    clock.begin("compute", "forward", 2)
    clock.stop()
    assert clock.seconds["wait"] == before["wait"] >= 0.02
    assert before["compute"] < clock.seconds["compute"] < before["compute"] + 0.01
    assert clock.seconds["send"] == 0


def test_a_reset_forgets_what_was_begun() -> None:
    clock = Clock()
    clock.begin("wait", "wait")
    clock.reset()
    clock.stop()
    assert not any(clock.seconds.values())


def test_spans_cross_as_one_line_of_text() -> None:
    spans = [span(1, 2), Span("wait", "wait for figures", None, 7, 3, 4)]
    assert spans[1].shifted(-5) == Span("wait", "wait for figures", None, 7, -2, -1)
    text = to_json(spans)
    assert len(text.splitlines()) == 1
    assert from_json(text) == spans
    assert [s.name for s in spans] == ["forward 0", "wait for figures"]


def test_idle_is_what_is_not_computed_gaps_too() -> None:
    row = Row("a", [span(0, 2), span(2, 5, "wait"), span(6, 7, "send"), span(7, 10)])
    assert idle(row) == pytest.approx(0.5)
    # what lies between iterations, such as an evaluation, is nobody's
    later = Row("a", [*row.spans, span(100, 110, iteration=2)])
    assert idle(later) == pytest.approx(0.25)


def test_the_typical_iteration_is_the_median_over_all_ranks() -> None:
    first = Row(
        "a", [span(0, 10, iteration=1), span(10, 12, iteration=2), span(20, 24, iteration=3)]
    )
    last = Row("b", [span(0, 1, iteration=1), span(25, 31, iteration=3)])
    assert typical([first]) == 3  # lengths 10, 2, 4
    assert typical([first, last]) == 1  # lengths 10, 2, 11


def test_the_quickest_answer_tells_the_offset() -> None:
    # rank 0 is 5 ms ahead; a slow round would say 45 ms
    found = alignment.best([(0, 95 * MS, 100 * MS), (200 * MS, 206 * MS, 202 * MS)])
    assert found == alignment.Offset(5 * MS, 1 * MS)
    # half a millisecond can't be told from none by a round of two
    assert alignment.best([(0, MS + MS // 2, 2 * MS)]) == alignment.Offset(0, MS)


def kineto(base: int, process: int) -> dict[str, Any]:
    """A trace as torch.profiler writes it, with a GPU."""
    common = {"ph": "X", "dur": 2.0, "tid": 1}
    return {
        "baseTimeNanoseconds": base,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "ts": 1, "args": {}},
            {"ph": "M", "name": "thread_name", "pid": process, "tid": 1, "ts": 1, "args": {}},
            common | {"cat": "user_annotation", "name": "forward 0", "pid": process, "ts": 10.0},
            common | {"cat": "kernel", "name": "gemm", "pid": 0, "ts": 11.0},
            {"ph": "s", "id": 1, "cat": "fwdbwd", "name": "x", "pid": process, "tid": 1, "ts": 10},
            common | {"cat": "Trace", "name": "all", "pid": "Spans", "ts": 0},
            {"ph": "i", "name": "end", "pid": "", "tid": "", "ts": 20, "s": "g"},
        ],
    }


def packed(file: Path, content: dict[str, Any]) -> Path:
    with gzip.open(file, "wt") as out:
        json.dump(content, out)
    return file


def unpacked(file: Path) -> dict[str, Any]:
    with gzip.open(file, "rt") as source:
        return dict(json.load(source))


def test_merged_traces_have_a_process_per_rank_on_one_clock(tmp_path: Path) -> None:
    found = [
        traces.Trace(0, "BTS stage 0", packed(tmp_path / "a", kineto(5 * MS, 77)), 0),
        # 3 ms later by its clock, which is 2 ms ahead; by chance the same process number
        traces.Trace(1, "UE rank 1 (UE 0)", packed(tmp_path / "b", kineto(8 * MS, 77)), -2 * MS),
    ]
    traces.merge(found, tmp_path / "all")
    events = unpacked(tmp_path / "all")["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert list(names) == [
        "BTS stage 0",
        "BTS stage 0, GPU 0",
        "UE rank 1 (UE 0)",
        "UE rank 1 (UE 0), GPU 0",
    ]
    at = {e["pid"]: e["ts"] for e in events if e["name"] == "forward 0"}
    assert at == {names["BTS stage 0"]: 10.0, names["UE rank 1 (UE 0)"]: 1010.0}
    assert {e["pid"] for e in events if e["name"] == "gemm"} == {
        pid for name, pid in names.items() if name.endswith("GPU 0")
    }
    assert len({e["id"] for e in events if e["ph"] == "s"}) == 2
    assert {e["pid"] for e in events} == set(names.values())  # no process of Kineto's own
    order = [e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"]
    assert order == sorted(order)


def test_half_a_trace_is_none_though_torch_says_nothing(tmp_path: Path) -> None:
    recorder = Recorder(CPU)
    for end, there in (('"traceName": "x"}', True), ('"trace', False)):
        export = SimpleNamespace(
            export_chrome_trace=lambda file, end=end: Path(file).write_text("[" * 9999 + end)
        )
        recorder._profiler = export  # type: ignore[assignment]
        with nullcontext() if there else pytest.raises(OSError, match="not written completely"):
            traces.write(recorder, tmp_path / "trace.gz")
        assert (tmp_path / "trace.gz").exists() == there
        (tmp_path / "trace.gz").unlink(missing_ok=True)


def test_half_a_merged_trace_is_none(tmp_path: Path) -> None:
    whole = traces.Trace(0, "BTS stage 0", packed(tmp_path / "a", kineto(0, 7)), 0)
    with pytest.raises(OSError, match="missing"):
        traces.merge([whole, replace(whole, file=tmp_path / "missing")], tmp_path / "all")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_role_becomes_a_workers_name() -> None:
    assert traces.file_name("BTS stage 0") == "bts-stage-0.pt.trace.json.gz"
    assert traces.file_name("UE rank 2 (UEs 0-1)") == "ue-rank-2-ues-0-1.pt.trace.json.gz"


def test_ranges_of_the_trace_are_the_spans(tmp_path: Path) -> None:
    clock, recorder = Clock(), Recorder(CPU)
    recorder.start()
    clock.recorder = recorder
    recorder.iteration_begins(6)
    clock.begin("compute", "forward", 2)
    torch.ones(100).sum()
    clock.begin("wait", "receive forward", 3)
    recorder.within("wait for BTS stage 1", lambda: time.sleep(0.005))
    clock.stop()
    clock.recorder = None
    clock.begin("compute", "unseen")
    clock.stop()
    recorder.stop()
    traces.write(recorder, tmp_path / "trace.gz")
    assert [file.name for file in tmp_path.iterdir()] == ["trace.gz"]
    content = unpacked(tmp_path / "trace.gz")
    ranges = {
        e["name"]: (e["ts"], e["ts"] + e["dur"])
        for e in content["traceEvents"]
        if e.get("cat") == "user_annotation"
    }
    assert set(ranges) == {
        "ProfilerStep#6",
        "forward 2",
        "receive forward 3",
        "wait for BTS stage 1",
    }
    assert [(s.name, s.activity, s.iteration) for s in recorder.spans] == [
        ("forward 2", "compute", 6),
        ("receive forward 3", "wait", 6),
    ]
    base = content["baseTimeNanoseconds"]
    for one in recorder.spans:  # both tell the time of day; a busy machine may come between
        begin, end = ranges[one.name]
        assert abs((one.begin - base) / 1000 - begin) < 50_000
        assert abs((one.end - base) / 1000 - end) < 50_000
    waited = ranges["wait for BTS stage 1"]
    assert ranges["receive forward 3"][0] <= waited[0] < waited[1] <= ranges["receive forward 3"][1]
    assert any(e["name"] == "aten::sum" for e in content["traceEvents"])


# the session, on one rank


def settings(**run: Any) -> Settings:
    return Settings(
        method="centralised",
        model=ModelSettings(c1=8, c2=8, angles=8, delays=8),
        topology=TopologySettings(ues=2),
        data=DataSettings(train_samples=32, test_samples=8, holdout=0.0),
        train=TrainSettings(iterations=12, batch_size=4, micro_batches=2),
        run=RunSettings(**{"profile": True, "profile_iterations": 2, **run}),
    )


class Session:
    """A run's iterations through a profile, and what was said."""

    def __init__(self, folder: Path, settings: Settings, done: int = 0, ranks: int = 1) -> None:
        folder.mkdir(exist_ok=True)
        self.world = world = World(HashStore(), 0, ranks, 0, ranks)
        ues, test = methods.load(settings, range(settings.topology.ues), CPU)
        self.worker = Centralised(settings, ues, test, CPU)
        self.tracker = Tracker(folder, settings, done)
        self.said: list[str] = []
        self.tracker.say = lambda line: self.said.append(line)  # type: ignore[method-assign]
        unhurried = Stopping(world, folder).unhurried
        self.profile = Profile(self.worker, settings, folder, done, world, self.tracker, unhurried)
        self.done = done

    def until(self, done: int) -> Session:
        while self.done < done:
            self.profile.train_iteration(self.done)
            self.done += 1
        return self

    def end(self) -> list[str]:
        self.profile.close()
        self.tracker.events.close()
        return self.said


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Session]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "profile").mkdir(parents=True)
    (folder / "profile" / "old.pt.trace.json").write_text("{}")
    session = Session(folder, settings()).until(12)
    session.end()
    return folder, session


def test_a_profile_is_what_was_promised(session: tuple[Path, Session]) -> None:
    folder, run = session
    assert sorted(file.name for file in (folder / "profile").iterdir()) == [
        "all-ranks.json.gz",
        "old.pt.trace.json",
        "rank-0.pt.trace.json.gz",
    ]
    events = unpacked(folder / "profile" / "all-ranks.json.gz")["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert [name for name in names if "Step#" in name] == ["ProfilerStep#6", "ProfilerStep#7"]
    assert names.count("forward 1") == 2
    assert (folder / "timeline.png").stat().st_size > 5000
    assert "<svg" in (folder / "timeline.svg").read_text()
    accumulated = EventAccumulator(str(folder)).Reload()
    assert [image.step for image in accumulated.Images("timeline")] in ([6], [7])
    assert run.worker.clock.recorder is None


def test_the_size_is_said_before_and_keeps_its_word(session: tuple[Path, Session]) -> None:
    folder, run = session
    before, foreign, after = run.said
    needed = int(before.split("takes up to ")[1].split(" ")[0].replace(",", ""))
    files = [folder / "profile" / n for n in ("all-ranks.json.gz", "rank-0.pt.trace.json.gz")]
    written = sum(file.stat().st_size for file in files)
    with gzip.open(files[1]) as trace:
        plain = len(trace.read())
    # while it is written, the plain trace lies there as well
    assert written + plain <= needed < 3 * (written + plain)
    spans = [e for e in unpacked(files[1])["traceEvents"] if e["ph"] == "X"]
    assert needed / 650 == pytest.approx(len(spans), rel=0.1)  # of both iterations
    assert "holds old.pt.trace.json" in foreign
    assert "iterations 6 to 7" in after
    assert f"{written:,} bytes" in after


def test_a_profile_changes_no_bit(session: tuple[Path, Session]) -> None:
    worker = session[1].worker
    plain = Centralised(settings(), *methods.load(settings(), range(2), CPU), CPU)
    for iteration in range(12):
        plain.train_iteration(iteration)
    assert_same(worker.tail.state_dict(), plain.tail.state_dict())
    for ue, other in zip(worker.ues, plain.ues, strict=True):
        assert_same(ue.encoder.state_dict(), other.encoder.state_dict())


def test_a_disk_without_room_costs_the_profile_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    (line,) = Session(tmp_path, settings()).until(12).end()
    assert "iterations 6 to 7 would take " in line
    assert f"1,000 are free in {tmp_path}" in line
    assert "training continues" in line
    assert not (tmp_path / "profile").exists()
    assert not list(tmp_path.glob("timeline*"))


def test_without_matplotlib_there_are_traces_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("csipipe.profiling.timeline", raising=False)
    monkeypatch.setitem(sys.modules, "csipipe.profiling.timeline", None)
    session = Session(tmp_path, settings()).until(12)
    assert "can't be written: " in session.end()[-1]
    assert "timeline" in session.said[-1]
    assert (tmp_path / "profile" / "all-ranks.json.gz").is_file()
    assert not list(tmp_path.glob("timeline*"))


def test_a_file_in_the_way_costs_the_profile_alone(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("mine")
    session = Session(tmp_path, settings()).until(12)
    assert str(tmp_path / "profile") in session.end()[-1]
    assert "can't be written" in session.said[-1]
    assert (tmp_path / "profile").read_text() == "mine"


def test_a_run_that_goes_on_behind_the_profile_says_so(tmp_path: Path) -> None:
    (line,) = Session(tmp_path, settings(), done=4).until(12).end()
    assert "nothing is profiled" in line
    assert "--run.profile_after 6" in line
    # the remedy is right, and the line before the least that works
    later = Session(tmp_path, settings(profile_after=6), done=4).until(12).end()
    assert "iterations 7 to 8 is in" in later[-1]


def test_a_run_that_stops_inside_the_profile_says_so(tmp_path: Path) -> None:
    session = Session(tmp_path, settings()).until(6)
    assert session.worker.clock.recorder is None  # nor would an evaluation be recorded
    assert torch._C._autograd._profiler_enabled()
    assert "was not finished when the run stopped" in session.end()[-1]
    assert not torch._C._autograd._profiler_enabled()
    assert not (tmp_path / "profile").exists()


def test_more_iterations_than_the_run_has() -> None:
    settings(profile_after=10, profile_iterations=2)
    with pytest.raises(ValueError, match=r"run.profile_iterations is 3.*train.iterations 12.*13"):
        settings(profile_after=10, profile_iterations=3)
    settings(profile=False, profile_after=10, profile_iterations=3)
    with pytest.raises(ValueError, match=r"run.profile_after is 1; it must be at least 2"):
        settings(profile_after=1)


@pytest.mark.long
def test_a_rank_that_is_silent_is_waited_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csipipe.profiling.session.LEAST", 0.1)
    monkeypatch.setattr(alignment, "offset", lambda *_: alignment.Offset(0, 0))
    run = Session(tmp_path / "run", settings(timeout=3.0, profile_after=2), ranks=2)
    run.world.store.set("events/1/1", "3")  # the last word of rank 1
    with pytest.raises(PeerLost, match=r"for its text \(spans\) from rank 1") as found:
        run.until(4)
    assert found.value.peer == 1
    assert not found.value.gone
    run.end()


def test_a_clock_that_is_silent_is_waited_for_a_while() -> None:
    with pytest.raises(PeerLost, match=r"for its clock from rank 1: Timed out after 0\.1 s"):
        alignment.offset(World(HashStore(), 0, 2, 0, 2), 0.1)


def test_a_rank_that_fails_ends_the_comparison_of_clocks() -> None:
    store = HashStore()
    store.set("failure", "rank 0: no more")
    with pytest.raises(PeerFailed):
        alignment.offset(World(store, 1, 2, 1, 2), 60.0)
