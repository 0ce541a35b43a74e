"""A run of an earlier release, stopped in the middle: it is evaluated and goes on.

`old_run/` was written by the release before the methods, models and sources became tables (commit
a4cf20b), as `--train.iterations 20` of settings as small as can be, stopped after iteration 12; its
`ranks/` and its lock aren't kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import errors, run_program

from csipipe.__main__ import main

LOSSES = {
    "best": [0.026942154159769416, 0.02692805090919137],  # after iteration 5
    "last": [0.027003393927589058, 0.026935528265312314],  # after iteration 12
    "whole": [0.02702683233655989, 0.026923425821587445],  # after iteration 20
}
"""Of the two UEs on the test set, as that release evaluated them."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the old run."""
    copy = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "old_run", copy, symlinks=True)
    return copy


def losses(test: dict[str, list[dict[str, float]]]) -> list[float]:
    return [ue["loss"] for ue in test["per_ue"]]


@pytest.mark.parametrize("weights", ["last", "best"])
def test_it_is_evaluated(folder: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--weights", weights]) == 0, capsys.readouterr().err
    [found] = json.loads((folder / "evaluation" / "figures.json").read_text())["runs"]
    assert losses(found) == pytest.approx(LOSSES[weights], rel=1e-5)


def test_it_goes_on(folder: Path) -> None:
    line = ("--config", str(folder / "config.yaml"), "--run.dir", str(folder))
    ended = run_program(3, line)
    assert [rank.code for rank in ended] == [0, 0, 0], errors(ended)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("finished", 20)
    assert losses(summary["test"]) == pytest.approx(LOSSES["whole"], rel=1e-5)
    assert summary["exchanged"]["scalars"] == {"up": 5120, "down": 5120}
    history = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    assert [line["iteration"] for line in history] == [5, 10, 15, 20]
