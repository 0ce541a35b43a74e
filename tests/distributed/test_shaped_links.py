"""The links of docs/links.md, tried: ranks in networks of their own, a link that breaks."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csipipe.links import network

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("tc") is None, reason="tc missing: apt-get install iproute2"),
]
ROOT = Path(__file__).parents[2]
SMALL = "--topology.ues 2 --train.batch_size 16 --train.threads 1 --model.kernels_by torch"
SMALL += " --data.train_samples 200 --data.test_samples 20 --model.angles 16 --model.delays 16"
SMALL += " --model.c1 64 --model.c2 64 --run.timeout 20"


def links(out: Path, words: str) -> subprocess.CompletedProcess[str]:
    """The command, with small runs."""
    line = [sys.executable, "-m", "csipipe", "links", *words.split(), *SMALL.split()]
    line += ["--out", str(out)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500)


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "links.csv").open()))


def test_runs_cross_their_links(tmp_path: Path) -> None:
    words = "--up 1mbit 500kbit,2mbit --down 2mbit --methods fedavg --train.iterations 4"
    done = links(tmp_path, words)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rows(tmp_path):
        assert float(row["measured_s"]) > 0.9 * (float(row["planned_s"]) - float(row["free_s"]))
        assert 1.0 < float(row["overhead"]) < 1.5
    found = json.loads(
        (tmp_path / "runs" / "fedavg-1mbit-up-2mbit-down" / "summary.json").read_text()
    )
    assert found["status"] == "finished"
    assert "measured / planned" in (tmp_path / "links.md").read_text()
    assert (tmp_path / "links.png").stat().st_size > 1000
    assert not list(Path("/run/netns").glob(f"{network.PREFIX}*-ue*"))


def test_a_link_that_stays_broken_ends_the_run_by_name(tmp_path: Path) -> None:
    words = "--up 2mbit --methods fedavg --train.iterations 50 --trouble 1:2:300"
    done = links(tmp_path, words)
    assert done.returncode == 1
    [row] = rows(tmp_path)
    assert "UE rank 2 (UE 1)" in row["error"]


def test_a_link_that_is_whole_again_in_time_loses_nothing(tmp_path: Path) -> None:
    words = "--up 2mbit --methods fedavg --train.iterations 4 --trouble 1:2:10"
    done = links(tmp_path, words)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = tmp_path / "runs" / "fedavg-2mbit" / "summary.json"
    assert json.loads(summary.read_text())["status"] == "finished"
    [row] = rows(tmp_path)
    assert float(row["in_all_s"]) > 4 * float(row["measured_s"]) + 5
