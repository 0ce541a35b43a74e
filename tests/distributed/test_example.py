"""The example of a model of one's own, as docs/models.md starts it: from outside the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_wheel import SETTINGS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_model"
RUN = ["--model.name", "mymodel:build"] + [
    word
    for name, value in SETTINGS.items()
    if name != "model.c2"  # the example has no second bottleneck
    for word in (f"--{name}", value)
]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=4")
pytestmark = pytest.mark.long


def python(folder: Path, *words: str) -> str:
    """What `python WORDS` prints, in a folder of its own, with the example in PYTHONPATH."""
    path = os.pathsep.join([str(EXAMPLE), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_trains_resumes_and_is_evaluated_exported_and_benchmarked(tmp_path: Path) -> None:
    train = (*TORCHRUN, "-m", "csipipe", "train", *RUN, "--run.save_every", "1")
    assert "NMSE (dB)" in python(tmp_path, *train, "--run.dir", "first")
    there = str(tmp_path / "first" / "checkpoints" / "1")
    python(tmp_path, *train, "--run.dir", "second", "--run.resume", there)
    weights = [(tmp_path / run / "weights" / "tail.safetensors") for run in ("first", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "percentile" in python(tmp_path, "-m", "csipipe", "evaluate", "first")
    line = ("export", "first", "--ue", "0", "--formats", "pt2", "--out", "exported")
    assert "feedback per channel" in python(tmp_path, "-m", "csipipe", *line)
    race = ("benchmark", "--rounds", "1", "--only", "ours,one-process", "--json", "figures.json")
    python(tmp_path, "-m", "csipipe", *race, *RUN)
    assert json.loads((tmp_path / "figures.json").read_text())
