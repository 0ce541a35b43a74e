"""Profiles without processes: spans, clocks and merged traces."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from csipipe.comm.blame import PeerLost
from csipipe.comm.texts import PeerFailed
from csipipe.comm.world import World
from csipipe.measure.clock import Clock
from csipipe.profiling import alignment, traces
from csipipe.profiling.recorder import Recorder
from csipipe.profiling.spans import Row, Span, from_json, idle, to_json, typical

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


def test_a_clock_that_is_silent_is_waited_for_a_while() -> None:
    with pytest.raises(PeerLost, match=r"for its clock from rank 1: Timed out after 0\.1 s"):
        alignment.offset(World(HashStore(), 0, 2, 0, 2), 0.1)


def test_a_rank_that_fails_ends_the_comparison_of_clocks() -> None:
    store = HashStore()
    store.set("failure", "rank 0: no more")
    with pytest.raises(PeerFailed):
        alignment.offset(World(store, 1, 2, 1, 2), 60.0)
