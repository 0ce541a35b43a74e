"""Whole runs, started as a user starts them: torchrun, real processes, files on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
TINY = {
    "model.c1": "24",
    "model.c2": "16",
    "model.angles": "8",
    "model.delays": "8",
    "data.train_samples": "200",
    "data.test_samples": "30",
    "train.iterations": "6",
    "train.batch_size": "8",
    "run.eval_every": "3",
}


@dataclass
class Ended:
    code: int
    out: str
    err: str
    seconds: float


def command(folder: Path, ranks: int, settings: dict[str, str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    chosen = {**TINY, "run.dir": str(folder), **settings}
    arguments = [text for key, value in chosen.items() for text in (f"--{key}", value)]
    return [*torchrun, "launch/train.py", *arguments]


@contextmanager
def started(folder: Path, ranks: int, settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A run in the background; whatever is left of it is killed at the end."""
    process = subprocess.Popen(
        command(folder, ranks, settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.communicate()


def run(folder: Path, ranks: int = 4, timeout: float = 90.0, **settings: str) -> Ended:
    before = time.monotonic()
    with started(folder, ranks, {k.replace("__", "."): v for k, v in settings.items()}) as process:
        out, err = process.communicate(timeout=timeout)
        return Ended(process.returncode, out, err, time.monotonic() - before)


def errors(ended: Ended) -> list[str]:
    """The messages that the program itself showed."""
    return [line for line in ended.err.splitlines() if line.startswith("csipipe: error:")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = run(folder)
    assert ended.code == 0, ended.err
    return folder, ended


def test_the_summary_says_what_the_interface_promises(finished: tuple[Path, Ended]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert (summary["method"], summary["status"], summary["iterations"]) == (
        "csilocal",
        "finished",
        6,
    )
    test = summary["test"]
    assert [row["ue"] for row in test["per_ue"]] == [0, 1, 2, 3]
    assert test["loss"] == pytest.approx(sum(row["loss"] for row in test["per_ue"]) / 4)
    linear = sum(10 ** (row["nmse_db"] / 10) for row in test["per_ue"]) / 4
    assert 10 ** (test["nmse_db"] / 10) == pytest.approx(linear)
    assert 0 < test["floor_loss"] < 1
    scalars = 6 * 4 * 8 * (24 + 16)
    assert summary["exchanged"] == {
        "scalars": {"up": scalars, "down": scalars},
        "bytes": {"up": 4 * scalars, "down": 4 * scalars},
    }
    assert summary["exchanged_evaluation"]["scalars"]["up"] > 0
    assert summary["seconds_per_iteration"] > 0
    assert set(summary["parameters"]) == {"encoder", "tail", "head"}
    assert summary["topology"]["stages"] == 2


def test_the_config_repeats_the_run(finished: tuple[Path, Ended]) -> None:
    config = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert config["model"]["c1"] == 24
    assert config["train"]["lr_schedule"] == "cosine"  # complete, not only what was given


def test_weights_are_saved_by_ue_and_by_layer(finished: tuple[Path, Ended]) -> None:
    for folder in (finished[0] / "weights", finished[0] / "checkpoints" / "best"):
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["tail.safetensors", *(f"ue-{n}.safetensors" for n in range(4))]
        with safe_open(folder / "tail.safetensors", "pt") as tail:
            assert tail.get_tensor("tail.0.weight").shape == (128, 24)
            assert tail.get_tensor("tail.7.weight").shape == (16, 128)
            assert any(name.startswith("tail.4.") for name in tail.keys())  # noqa: SIM118
        with safe_open(folder / "ue-3.safetensors", "pt") as ue:
            assert ue.get_tensor("encoder.4.weight").shape == (24, 128)
            assert ue.get_tensor("head.0.weight").shape == (128, 16)


def test_tensorboard_has_the_curves(finished: tuple[Path, Ended]) -> None:
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("test/nmse_db")] == [3, 6]
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert events.Scalars("test/loss")[-1].value == pytest.approx(summary["test"]["loss"])
    assert events.Scalars("exchanged/scalars")[-1].value == 2 * 6 * 4 * 8 * (24 + 16)


def test_the_screen_ends_with_the_table(finished: tuple[Path, Ended]) -> None:
    folder, ended = finished
    for text in ("UE 3", "NMSE (dB)", "floor", "UE → BTS", f"tensorboard --logdir {folder}"):
        assert text in ended.out
    assert "iteration 6/6" in ended.err


def test_a_run_is_never_overwritten(finished: tuple[Path, Ended]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    ended = run(finished[0])
    assert ended.code != 0
    assert len(errors(ended)) == 1
    assert "already holds a run" in errors(ended)[0]
    assert before == {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}


def test_centralised_runs_in_one_process(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", ranks=1, method="centralised")
    assert ended.code == 0, ended.err
    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exchanged"]["scalars"] == {"up": 0, "down": 0}
    assert len({row["loss"] for row in summary["test"]["per_ue"]}) == 1


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (2, {}, "start with --nproc_per_node=3 or more"),
        (4, {"method": "centralised"}, "--nproc_per_node=1"),
        (4, {"train__bogus": "1"}, "train.bogus"),
        (3, {"topology__stages": "2", "topology__partition": "type:Flatten"}, "without parameters"),
        (3, {"run__dir": "/proc/nowhere/run"}, "can't be written"),
    ],
)
def test_mistakes_end_the_run_with_one_message(
    ranks: int, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    ended = run(tmp_path / "run", ranks, **settings)
    assert ended.code != 0
    assert len(errors(ended)) == 1
    assert message in ended.err
    assert "Traceback" not in ended.err.split("torch.distributed.elastic")[0].split("W1")[0]
    assert not (tmp_path / "run").exists()


def test_the_first_error_is_the_one_that_is_shown(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", train__lr="1e30")
    assert ended.code != 0
    assert len(errors(ended)) == 1
    assert "the loss of UE 0 is" in errors(ended)[0]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_killed_rank_ends_the_run(rank: int, tmp_path: Path) -> None:
    settings = {"train.iterations": "100000", "run.eval_every": "20"}
    with started(tmp_path / "run", 4, settings) as process:
        assert process.stderr is not None
        while "iteration 20/" not in process.stderr.readline():
            assert process.poll() is None
        ranks = psutil.Process(process.pid).children(recursive=True)
        [victim] = [child for child in ranks if child.environ().get("RANK") == str(rank)]
        victim.kill()
        process.communicate(timeout=45)
        assert process.returncode != 0
        assert not any(child.is_running() for child in ranks if child.pid != process.pid)


def test_plain_python_answers_with_the_torchrun_line() -> None:
    ended = subprocess.run(
        [sys.executable, "launch/train.py", "--model.c1", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k != "RANK"},
    )
    assert ended.returncode != 0
    assert "torchrun --nproc_per_node=4 launch/train.py --model.c1 8" in ended.stderr
