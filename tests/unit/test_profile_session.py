"""A profile on one rank, from beginning to end: what it leaves, and what it says when it can't."""

from __future__ import annotations

import gzip
import json
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import HashStore  # type: ignore[attr-defined]

from csipipe import methods
from csipipe.comm.blame import PeerLost
from csipipe.comm.world import World
from csipipe.methods.centralised import Centralised
from csipipe.profiling import Profile, alignment
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


def unpacked(file: Path) -> dict[str, Any]:
    with gzip.open(file, "rt") as source:
        return dict(json.load(source))


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
