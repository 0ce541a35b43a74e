"""Runs that reports start: their ranks, failures, interruptions, and one report per folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reportruns import a_run

from csipipe import files
from csipipe.comm.topology import Topology
from csipipe.reports import start
from csipipe.reports.preset import REFERENCE
from csipipe.reports.runs import Run
from csipipe.settings.config import Settings, TopologySettings, suited


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Runs are `python -c code NAME` instead of a torchrun."""

    def command(run: Run, *_: Any) -> list[str]:
        return [sys.executable, "-c", code, run.name]

    monkeypatch.setattr(start, "command", command)


def test_a_failing_run_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; sys.exit('csipipe: error: no luck' if 'seed1' in sys.argv[1] else 0)"
    program(monkeypatch, code)
    asked = [a_run(tmp_path, seed=seed) for seed in (0, 1, 2)]
    failed = start.start(asked, tmp_path, 3, jobs=2)
    assert list(failed) == [asked[1].name]
    assert failed[asked[1].name].startswith("no luck (see ")
    shown = capsys.readouterr().err
    assert shown.count(" of 3: ") == 3
    assert f"{asked[1].name}: FAILED: no luck" in shown


def test_an_interruption_ends_the_runs_that_were_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "going"
    program(
        monkeypatch,
        f"import time, os; open({str(mark)!r}, 'w').write(str(os.getpid()));time.sleep(60)",
    )

    def interrupt() -> None:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        start.start([a_run(tmp_path), a_run(tmp_path, seed=1)], tmp_path, 3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent")
def test_a_killed_report_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    asked = [a_run(tmp_path)], tmp_path, 3
    report = multiprocessing.get_context("fork").Process(target=start.start, args=asked)
    report.start()
    log = wait_for(lambda: next(tmp_path.glob("logs/*.log"), None))
    run = wait_for(lambda: int(log.read_text() or 0))
    os.kill(run, 0)
    report.kill()
    report.join()
    wait_for(lambda: ended(run))


def ended(process: int) -> bool:
    """Whether it is gone, or nobody has asked yet how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(look: Callable[[], Any]) -> Any:
    """What it finds, within 30 seconds."""
    end = time.monotonic() + 30
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_two_reports_do_not_start_runs_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(monkeypatch, "")
    with (tmp_path / "lock").open("w") as held:
        assert files.lock(held.fileno())
        with pytest.raises(ValueError, match="another report is starting"):
            start.start([a_run(tmp_path)], tmp_path, 3)
    assert start.start([a_run(tmp_path)], tmp_path, 3) == {}


@pytest.mark.parametrize(
    ("topology", "processes", "ranks"),
    [
        ({}, 3, (3, 3, 1)),
        ({}, 2, (3, 2, 1)),
        ({}, 1, (1, 1, 1)),
        ({"placement": "together"}, 2, (2, 2, 1)),
        ({"placement": "apart"}, 1, (3, 2, 1)),
        ({"placement": "together", "ues": 1}, 4, (1, 1, 1)),
        ({"placement": "together", "ues": 2, "stages": 1}, 4, (2, 2, 1)),
    ],
)
def test_a_run_has_as_many_ranks_as_are_wanted_and_it_can_use(
    topology: dict[str, Any], processes: int, ranks: tuple[int, int, int], tmp_path: Path
) -> None:
    found = []
    for method in ("csilocal", "fedavg", REFERENCE):
        sections = vars(Settings(topology=TopologySettings(**topology)))
        settings = Settings(**suited(method, sections))
        line = start.command(Run("one", settings), tmp_path / "c.yaml", processes)
        found += [int(word.split("=")[1]) for word in line if "nproc" in word]
        if settings.stages:
            Topology.of(settings, found[-1])
    assert tuple(found) == ranks
