"""A report from real runs: a torchrun each, one of them failing, then gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

TINY = {
    "settings": {
        "model": {"angles": 8, "delays": 8},
        "topology": {"ues": 2, "stages": 1},
        "data": {"train_samples": 80, "test_samples": 20},
        "train": {"iterations": 4, "batch_size": 8, "micro_batches": 2, "lr_schedule": "constant"},
        "run": {"eval_every": 1, "timeout": 20},
    },
    "processes": 2,
    "compression": [4],
    "seeds": [0],
    "search": None,
    "panels": ["f"],
    "headline": ["csilocal", "centralised"],
}


COMMAND = [sys.executable, "launch/reproduce.py"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def reproduce(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


@pytest.mark.long
def test_a_report_goes_on_after_a_run_that_failed(tmp_path: Path) -> None:
    preset, rates, out = tmp_path / "tiny.yaml", tmp_path / "rates.yaml", tmp_path / "out"
    preset.write_text(yaml.safe_dump(TINY | {"rates": "rates.yaml"}))
    rates.write_text("csilocal: 0.002\ncentralised: 1.0e+30\n")
    report = ("headline", "--preset", str(preset), "--out", str(out))
    first = reproduce(*report, "--jobs", "2")
    assert first.returncode == 1
    failed = "centralised-outdoor-c32-seed0"
    assert f"{failed}: FAILED: " in first.stderr
    assert "A lower train.lr usually helps" in first.stderr
    assert "csipipe: error: 1 run(s) failed" in first.stderr
    assert f"- {failed}: " in (out / "headline.md").read_text()

    run = out / "runs" / "csilocal-outdoor-c32-seed0"
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["test"] == summary["test"]
    assert lines[-1]["exchanged"] == summary["exchanged"]
    assert lines[0]["exchanged"]["scalars"] == {"up": 2 * 8 * 64, "down": 2 * 8 * 64}
    assert lines[0]["holdout"]["loss"] > 0

    rates.write_text("csilocal: 0.002\ncentralised: 0.002\n")
    (out / "runs" / failed).rename(tmp_path / "away")  # it was made with another rate
    before = (run / "summary.json").stat().st_mtime_ns
    second = reproduce(*report)
    assert second.returncode == 0, second.stderr
    assert "1 of 2 runs are finished" in second.stderr
    assert f"run 1 of 1: {failed}" in second.stderr
    assert (run / "summary.json").stat().st_mtime_ns == before
    assert "not in this report" not in (out / "headline.md").read_text()


@pytest.mark.long
def test_an_interrupted_report_goes_on_from_its_runs_checkpoints(tmp_path: Path) -> None:
    settings = TINY["settings"]
    assert isinstance(settings, dict)
    train = settings["train"] | {"iterations": 600}
    run = settings["run"] | {"eval_every": 100, "save_every": 20}
    preset, out = tmp_path / "tiny.yaml", tmp_path / "out"
    tiny = TINY | {"settings": settings | {"train": train, "run": run}, "headline": ["csilocal"]}
    preset.write_text(yaml.safe_dump(tiny))
    report = ("headline", "--preset", str(preset), "--out", str(out))
    name = "csilocal-outdoor-c32-seed0"
    with subprocess.Popen([*COMMAND, *report], cwd=ROOT, env=ENVIRONMENT) as first:
        deadline = time.monotonic() + 120
        while not list((out / "runs" / name / "checkpoints").glob("[0-9]*/manifest.json")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first.terminate()
        assert first.wait(60) != 0
    second = reproduce(*report)
    assert second.returncode == 0, second.stderr
    history = (out / "runs" / name / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in history] == list(range(100, 601, 100))
    assert "resuming after iteration" in (out / "logs" / f"{name}.log").read_text()


@pytest.mark.long
def test_accuracy_is_made_once(tmp_path: Path) -> None:
    preset, out = tmp_path / "tiny.yaml", tmp_path / "out"
    preset.write_text(yaml.safe_dump(TINY))
    report = ("accuracy", "--preset", str(preset), "--out", str(out), "--budget", "2")
    first = reproduce(*report)
    assert first.returncode == 0, first.stderr
    page = (out / "accuracy.md").read_text()
    assert "## Indoor, c = 32" in page
    assert "## Outdoor, c = 32" in page
    for method in ("centralised", "CSILocal", "FedAvg"):
        assert page.count(f"| {method} |") == 2
    second = reproduce(*report)
    assert second.returncode == 0, second.stderr
    assert "6 of 6 runs are finished" in second.stderr
    assert (out / "accuracy.md").read_text() == page
