"""Ranks that torchrun or DeepSpeed's launcher started, and torchrun's counts that disagree."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import Program, errors
from test_run import ROOT, arguments


def status(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["status"])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_ranks_that_were_told_other_numbers_of_restarts_train(tmp_path: Path) -> None:
    with Program(3, arguments(tmp_path / "run"), restarts=(1, 1, 0)) as program:
        ended = program.join()
    assert [rank.code for rank in ended] == [0] * 3, errors(ended)
    assert status(tmp_path / "run") == "finished"


@pytest.mark.long
def test_deepspeeds_launcher_starts_the_same_run(tmp_path: Path) -> None:
    def deepspeed(*more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "3"]
        return subprocess.run(
            [*line, f"--master_port={free_port()}", "launch/train.py", *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    ended = deepspeed(*arguments(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    assert "on 3 rank(s)" in ended.stderr
    assert status(tmp_path / "run") == "finished"
    again = deepspeed(*arguments(tmp_path / "run"))
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    wrong = deepspeed(*arguments(tmp_path / "other", train__rate="1"))
    assert wrong.returncode != 0
    assert wrong.stderr.count("csipipe: error:") == 1


@pytest.mark.long
def test_agents_that_count_restarts_differently_resume(tmp_path: Path) -> None:
    settings = arguments(tmp_path / "run", train__iterations="400", run__save_every="10")
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    line += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=2"]
    line += ["--local-addr=127.0.0.1", "launch/train.py", *settings]
    agents = []
    try:
        for number in range(2):
            with open(tmp_path / f"{number}.log", "wb") as log:
                agents.append(subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log))
        deadline = time.monotonic() + 240
        while not list((tmp_path / "run" / "checkpoints").glob("[1-9]*0")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = {int(p.environ()["RANK"]): p for p in psutil.Process(agents[1].pid).children()}
        os.kill(ranks[max(ranks)].pid, signal.SIGKILL)
        codes = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    logs = "".join((tmp_path / f"{number}.log").read_text() for number in range(2))
    assert codes == [0, 0], logs
    assert "resuming after iteration " in logs
    assert status(tmp_path / "run") == "finished"
