"""A disk that fills up while a run of several ranks trains on it, or before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import Fault
from harness import Program, errors, run_program
from test_run import arguments

from csipipe.pipeline.schedule import Op

SMALL = {"topology__ues": "2", "topology__stages": "1", "run__save_every": "2"}
FILES = {0: "tail.safetensors", 2: "ue-1.safetensors"}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 2], ids=["BTS", "UE"])
def test_a_run_whose_disk_fills_up_ends_and_goes_on(rank: int, tmp_path: Path) -> None:
    """Checkpoints, events and learning curve are given up; the weights at the end can't be."""
    folder = tmp_path / "run"
    wide = arguments(folder, model__c1="64", model__c2="64", **SMALL)
    with Program(3, wide, Fault(rank, "full", Op.STEP, iteration=5)) as program:
        ended = program.join(timeout=120)
    assert [one.code for one in ended] == [1, 1, 1]
    [line] = errors(ended)
    assert f"{folder / 'weights' / FILES[rank]} can't be written: File too large" in line
    assert "Make room" in line
    [warning] = [text for text in ended[rank].err.splitlines() if "iteration 6 can't" in text]
    assert "training continues, the last complete one is" in warning
    assert "Traceback" not in "".join(one.err for one in ended)
    assert not [path for path in folder.rglob("*.partial") if path.is_file()]
    again = run_program(3, wide)
    assert [one.code for one in again] == [0, 0, 0], errors(again)
    assert "resuming after iteration 4" in again[0].err
