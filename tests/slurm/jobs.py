"""Jobs of the very scripts in slurm/, and what their runs left."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PENDING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")
SETTINGS = {
    "model.c1": "24",
    "model.c2": "16",
    "model.angles": "8",
    "model.delays": "8",
    "model.kernels_by": "torch",  # several jobs start at a time, and each rank would compile
    "topology.partition": "uniform",
    "data.train_samples": "80",
    "data.test_samples": "20",
    "data.holdout": "0.1",
    "train.iterations": "150",
    "train.batch_size": "8",
    "train.threads": "1",  # more would sum in another order
    "run.eval_every": "15",
    "run.save_every": "5",
    "run.timeout": "30",
}
"""A run long enough to be caught in the middle."""


def words(settings: dict[str, str]) -> list[str]:
    """Settings as arguments."""
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def environment(**changes: str) -> dict[str, str]:
    """This interpreter's, as an activated environment on a shared file system would be."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(ROOT), "CSIPIPE_VENV": "/none", **changes}


@dataclass
class Job:
    """A submitted job; an array's task if it has one's number."""

    cluster: Cluster
    number: str
    folder: Path
    """Where its output is, and its run's directory."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def output(self) -> str:
        """What the job has written so far."""
        file = self.folder / f"{self.number}.out"
        return file.read_text() if file.exists() else ""

    def facts(self) -> dict[str, str]:
        """What SLURM says about it."""
        text = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))

    def wait(self, timeout: float = 600.0) -> str:
        """Wait until it has ended; its state."""
        deadline = time.monotonic() + timeout
        while (state := self.facts()["JobState"]) in PENDING:
            assert time.monotonic() < deadline, f"{state}\n{self.output()}"
            time.sleep(0.5)
        return state

    def wait_for(self, text: str, timeout: float = 600.0) -> None:
        """Wait until it has written `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            state = self.facts()["JobState"]
            assert state in PENDING, f"{state}\n{self.output()}"
            assert time.monotonic() < deadline, f"{state}\n{self.output()}"
            time.sleep(0.1)

    def completed(self) -> str:
        """Wait until it has ended well; its output."""
        state = self.wait()
        assert state == "COMPLETED", self.output()
        return self.output()

    def failed(self) -> list[str]:
        """Wait until it has failed; the first lines of its output."""
        state = self.wait()
        assert state == "FAILED", f"{state}\n{self.output()}"
        return self.output().splitlines()[:10]


def submit(
    cluster: Cluster,
    folder: Path,
    script: str,
    *arguments: str,
    options: tuple[str, ...] = (),
    changes: dict[str, str] | None = None,
) -> Job:
    """`sbatch slurm/SCRIPT.sbatch ARGUMENTS` from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    place = ("--parsable", f"--chdir={folder}", f"--output={folder}/%j.out")
    file = str(ROOT / "slurm" / f"{script}.sbatch")
    line = ["sbatch", *place, *options, file, *arguments]
    number = cluster.run(*line, **environment(**(changes or {}))).strip()
    return Job(cluster, number, folder)


def train(
    cluster: Cluster, folder: Path, script: str, options: tuple[str, ...] = (), **settings: str
) -> Job:
    """A run of `SETTINGS` in `folder/run`; `train__lr="1"` stands for --train.lr 1."""
    chosen = SETTINGS | {"run.dir": "run"}
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    return submit(cluster, folder, script, *words(chosen), options=options)


def results(run: Path) -> dict[str, Any]:
    """What must not depend on where a run was computed, nor on its interruptions."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "history": (run / "history.jsonl").read_text(),
        "test": summary["test"],
        "exchanged": [summary[key] for key in summary if key.startswith("exchanged")],
        "status": summary["status"],
        "weights": {
            f"{file.name}.{key}": tensor.tolist()
            for place in ("weights", "checkpoints/best")
            for file in sorted((run / place).iterdir())
            for key, tensor in load_file(file).items()
        },
    }
