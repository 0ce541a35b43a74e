"""Runs that are stopped, killed or damaged: what goes on ends as the run would have without it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Program, errors, run_program
from safetensors.torch import load_file
from test_run import ROOT, arguments

from csipipe import checkpoint


def whole(folder: Path) -> Path:
    """The newest checkpoint of a run, every part of it read."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    source = checkpoint.Snapshot(found)
    for name in source.content["parts"]:
        assert source.tensors(name)
    return found


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on a run's interruptions."""
    summary = json.loads((folder / "summary.json").read_text())
    weights = {
        f"{file.name}.{key}": tensor
        for place in ("weights", "checkpoints/best")
        for file in sorted((folder / place).iterdir())
        for key, tensor in load_file(file).items()
    }
    return {
        "history": (folder / "history.jsonl").read_text(),
        "test": summary["test"],
        "exchanged": [summary[key] for key in summary if key.startswith("exchanged")],
        "status": summary["status"],
        "weights": {key: tensor.tolist() for key, tensor in weights.items()},
    }


LONG = {"train__iterations": "40", "run__eval_every": "10", "run__save_every": "10"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a run of 40 iterations."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = run_program(4, arguments(folder, **LONG))
    assert [rank.code for rank in ended] == [0] * 4, errors(ended)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert [name for name in kept if name.isdigit()] == ["30", "40"]
    assert not any("partial" in name for name in kept)
    return results(folder)


def slow(folder: Path, **settings: str) -> list[str]:
    """The same run, with so many checkpoints that it can be caught at any place."""
    return arguments(folder, **{**LONG, "run__save_every": "1", **settings})


@pytest.mark.parametrize(
    "how",
    [
        "SIGTERM",
        pytest.param("SIGUSR1", marks=pytest.mark.long),
        pytest.param("file", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_ends_well_and_goes_on_elsewhere(
    how: str, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    with Program(4, slow(folder)) as program:
        program.wait_for("iteration 10/", timeout=180)
        if how == "file":
            (folder / "stop").touch()
        else:  # to one rank: the others hear of it
            pid = program.ranks[3].pid
            assert pid is not None
            os.kill(pid, getattr(signal, how))
        ended = program.join(timeout=180)
    assert [rank.code for rank in ended] == [0] * 4, errors(ended)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 10 < summary["iterations"] < 40
    assert whole(folder).name == str(summary["iterations"])
    assert "the same command" in ended[0].out
    assert not (folder / "stop").exists()
    again = run_program(3, slow(folder, topology__stages="1"))  # 1 stage instead of 2
    assert [rank.code for rank in again] == [0] * 3, errors(again)
    assert "resuming after iteration" in again[0].err
    assert results(folder) == uninterrupted


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 3], ids=["BTS", "UE"])
def test_a_run_killed_while_it_saves_goes_on(
    rank: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    with Program(4, slow(folder)) as program:
        program.wait_for("iteration 10/", timeout=180)
        deadline = time.monotonic() + 60
        while not list((folder / "checkpoints").glob("[0-9]*.partial")):
            assert time.monotonic() < deadline
        program.ranks[rank].kill()
    whole(folder)
    again = run_program(4, slow(folder))
    assert [r.code for r in again] == [0] * 4, errors(again)
    assert results(folder) == uninterrupted
    assert not list((folder / "checkpoints").glob("*.partial"))


@pytest.mark.long
def test_torchrun_restarts_from_the_newest_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--max-restarts=1"]
    # no run.dir: its name, which holds the time, must outlive the restart
    given = slow(tmp_path)
    place = given.index("--run.dir")
    del given[place : place + 2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(
            [*line, str(ROOT / "launch" / "train.py"), *given],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 120
            while "iteration 10/" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline
                assert agent.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            [folder] = (tmp_path / "runs").iterdir()
            os.kill(json.loads((folder / "lock").read_text())["pid"], signal.SIGKILL)
            assert agent.wait(timeout=180) == 0, (tmp_path / "log").read_text()
        finally:
            agent.kill()
    assert "resuming after iteration" in (tmp_path / "log").read_text()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    assert results(folder) == uninterrupted


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    endless = slow(folder, train__iterations="100000", train__lr_schedule="constant")
    with Program(4, endless) as program:
        program.wait_for("iteration 10/", timeout=180)
        pid = program.ranks[3].pid
        assert pid is not None
        # no file of this rank may grow beyond 10 kB, as if there were no more room
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
        program.wait_for("iteration 30/", timeout=180)
        lines = [line for line in program.text(3, "err").splitlines() if "can't be saved" in line]
        assert len(lines) > 1
        assert "File too large" in lines[0]
        assert "the last complete one is" in lines[0]
        assert "can't be saved" not in program.text(0, "err")
        before = whole(folder)
        assert int(before.name) < 20
    whole(folder)
    assert len(list((folder / "checkpoints").glob("[0-9]*.partial"))) < 2  # the one under way


def test_one_live_run_per_directory(tmp_path: Path) -> None:
    endless = slow(tmp_path / "run", train__iterations="100000")
    with Program(4, endless) as program:
        program.wait_for("iteration 10/", timeout=180)
        ended = run_program(4, endless)
        assert [rank.code for rank in ended] == [1] * 4
        [message] = errors(ended)
        assert "in use by a live run (process " in message
        assert str(program.ranks[0].pid) in message


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 iterations that was killed after it had saved the fourth."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = run_program(4, arguments(folder, run__save_every="4"))
    assert [rank.code for rank in ended] == [0] * 4, errors(ended)
    (folder / "summary.json").unlink()
    checkpoint.discard(folder / "checkpoints" / "6")
    return folder


def altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def newer(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))


def long(*values: object) -> Any:
    """A case that the plain suite leaves out."""
    return pytest.param(*values, marks=pytest.mark.long)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda at: (at / "ue-3.safetensors").unlink(), "ue-3.safetensors is missing"),
    "cut": (lambda at: os.truncate(at / "tail-4.safetensors", 100), "tail-4.safetensors has 100"),
    "altered": (lambda at: altered(at / "ue-0.safetensors"), "ue-0.safetensors was altered"),
    "manifest": (lambda at: os.truncate(at / "manifest.json", 50), "manifest.json can't be read"),
    "newer": (newer, "has format 3, this csipipe reads 2"),
}


@pytest.mark.parametrize(
    "damage",
    ["altered", *(long(d) for d in DAMAGE if d != "altered")],
)
def test_a_damaged_checkpoint_is_named(damage: str, stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    spoil, message = DAMAGE[damage]
    spoil(folder / "checkpoints" / "4")
    before = {path.name for path in folder.iterdir()}
    ended = run_program(4, arguments(folder))
    assert [rank.code for rank in ended] == [1] * 4
    [shown] = errors(ended)
    assert message in shown
    assert str(folder / "checkpoints" / "4") in shown
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__c1": "16"}, "was made with model.c1 24, this run has 16"),
        ({"run__eval_ues": "2"}, "was made with run.eval_ues null, this run has 2"),
        long({"method": "fedavg"}, "was made with method csilocal, this run has fedavg"),
        ({"train__iterations": "8"}, "the rates of train.lr_schedule cosine depend on it"),
        long({"run__resume": "never"}, "already holds a run, and run.resume is never"),
        long({"run__resume": "/nowhere"}, "/nowhere is neither a checkpoint nor the directory"),
    ],
    ids=["model", "evaluated", "method", "iterations", "never", "path"],
)
def test_a_run_that_would_be_another_is_refused(
    settings: dict[str, str], message: str, stopped: Path
) -> None:
    ended = run_program(4, arguments(stopped, **settings))
    assert [rank.code for rank in ended] == [1] * 4
    [shown] = errors(ended)
    assert message in shown


@pytest.mark.long
def test_a_named_checkpoint_starts_another_run(stopped: Path, tmp_path: Path) -> None:
    for source in (stopped, stopped / "checkpoints" / "4"):
        folder = tmp_path / source.name
        ended = run_program(4, arguments(folder, run__resume=str(source)))
        assert [rank.code for rank in ended] == [0] * 4, errors(ended)
        lines = (folder / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [3, 6]
    assert results(tmp_path / "run") == results(tmp_path / "4")


@pytest.mark.long
def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    for iterations in ("4", "6"):
        given = {"train__iterations": iterations, "train__lr_schedule": "constant"}
        ended = run_program(4, arguments(tmp_path / "run", **given))
        assert [rank.code for rank in ended] == [0] * 4, errors(ended)
    assert "resuming after iteration 4" in ended[0].err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 6
