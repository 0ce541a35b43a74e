"""`slurm/common.sh` beside programs that answer as SLURM's do: what becomes of a job, and why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTED = "2026-11-28T01:44:04"
JOB = "JobId=36 JobName=csipipe StartTime={started} PreemptTime={preempted} Command=x\n"
ARRAY = (
    "JobId=36 ArrayJobId=36 ArrayTaskId=2 JobName=csipipe StartTime={started} PreemptTime=None\n"
    "JobId=37 ArrayJobId=36 ArrayTaskId=0 JobName=csipipe StartTime={started} PreemptTime=None\n"
)


class Script:
    """A job script that trains, with make-believe `python`, `srun` and `scontrol`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run").mkdir()
        self.program("python", '[ "$3" != plan ] || echo run')
        self.program(
            "scontrol", 'echo "$SLURM_TIME_FORMAT $*" >>asked; [ "$1" != show ] || cat job'
        )
        self.shown()

    def program(self, name: str, body: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)

    def shown(self, job: str = JOB, preempted: str = "None") -> None:
        """What SLURM shows of the job."""
        text = job.format(started=STARTED, preempted=preempted)
        (self.folder / "job").write_text(text)

    def train(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it."""
        lines = f"export SCRIPT=$$; . {ROOT}/slurm/common.sh; train"
        return self.start("-c", lines, **environment)

    def start(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run bash as a job would; one that doesn't end is an error."""
        outside = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "CSIPIPE"))}
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", *words],
            cwd=self.folder,
            env=outside | {"PATH": path, "SLURM_JOB_ID": "36"} | environment,
            capture_output=True,
            text=True,
            timeout=20,
        )

    def requeued(self) -> list[str]:
        """Jobs that were requeued."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.split()[-1] for line in lines if " requeue " in line]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


ASKED = "until [ -e run/stop ]; do sleep 0.01; done"
SAVES = f"""kill -USR1 "$SCRIPT"; {ASKED}; echo '{{"status": "stopped"}}' >run/summary.json"""


def test_a_job_that_saved_is_requeued(script: Script) -> None:
    script.program("srun", SAVES)
    assert script.train().returncode == 0
    assert (script.folder / "run" / "stop").exists()
    assert script.requeued() == ["36"]


def test_ctrl_c_stops_the_run_and_waits_for_it(script: Script) -> None:
    script.program("srun", f"""kill -INT "$SCRIPT"; {ASKED}; echo saved""")
    done = script.train()
    assert (done.returncode, done.stdout) == (0, "saved\n")
    assert "interrupted: one more iteration, and all is saved" in done.stderr
    assert script.requeued() == []


def test_ranks_have_as_long_to_save_as_slurm_gives_them(script: Script) -> None:
    script.program("srun", 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"')
    assert script.train().stdout == "300\n"
    assert script.train(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60").stdout == "60\n"


def test_a_task_of_an_array_requeues_itself_alone(script: Script) -> None:
    script.program("srun", SAVES)
    script.shown(ARRAY)
    script.train()
    assert script.requeued() == ["36_2"]  # not 36: the array's last task has the array's id


def test_a_preempted_job_is_requeued_though_torchrun_failed(script: Script) -> None:
    script.program("srun", "exit 1")
    script.shown(preempted="2026-11-28T01:44:34")
    done = script.train(SLURM_TIME_FORMAT="relative")  # as somebody likes squeue's
    assert "preempted; the job is requeued" in done.stderr
    assert script.requeued() == ["36"]
    assert (script.folder / "asked").read_text().startswith("standard show job ")


@pytest.mark.parametrize("preempted", ["None", "2026-11-28T01:41:00"], ids=["never", "earlier"])
def test_a_job_that_fails_is_not_requeued(preempted: str, script: Script) -> None:
    script.program("srun", "exit 3")
    script.shown(preempted=preempted)
    assert script.train().returncode == 3
    assert script.requeued() == []


@pytest.mark.parametrize(
    ("nodes", "requeued"),
    [
        ({"SLURM_NNODES": "1"}, []),
        ({"SLURM_NNODES": "2"}, ["36"]),
        ({"SLURM_NNODES": "1", "SLURM_HET_SIZE": "2"}, ["36"]),  # of the first component
    ],
    ids=["one", "two", "components"],
)
def test_a_job_that_loses_a_node_is_requeued(
    nodes: dict[str, str], requeued: list[str], script: Script
) -> None:
    script.program("srun", "touch run/config.yaml; exit 1")  # no node answers
    script.train(**nodes)
    assert script.requeued() == requeued


def test_a_signal_to_torchrun_itself_ends_the_job_and_is_named(script: Script) -> None:
    script.program("srun", "exit 138")
    done = script.train()
    assert done.returncode == 1
    assert "USR1 was sent to torchrun" in done.stderr
    assert "--run.dir run" in done.stderr
    assert script.requeued() == []


def test_why_python_has_no_csipipe_is_said(script: Script) -> None:
    script.program(
        "python", "echo Traceback >&2; echo 'ImportError: libcudart.so.12: gone' >&2; exit 1"
    )
    done = script.train()
    assert done.returncode == 1
    assert "has no Python with csipipe: ImportError: libcudart.so.12: gone\n" in done.stderr
    assert str(script.folder / "python") in done.stderr


def test_several_tasks_of_a_step_are_refused(script: Script) -> None:
    script.program("srun", "exit 0")
    done = script.train(SLURM_STEP_NUM_TASKS="6")
    assert done.returncode == 1
    assert "srun started this script\n    6 times" in done.stderr
    # submitted by sbatch from such a step
    assert script.train(SLURM_STEP_NUM_TASKS="6", ENVIRONMENT="BATCH").returncode == 0


@pytest.mark.parametrize("name", ["mine.slurm", "mine.sbatch"])
def test_a_script_without_its_neighbour_says_where_it_belongs(name: str, script: Script) -> None:
    file = script.folder / name
    file.write_bytes((ROOT / "slurm" / "single_node.sbatch").read_bytes())
    script.shown(f"JobId=36\n   Command={file} --x /y\n   WorkDir=/\n")
    spooled = script.folder / "slurm_script"  # what sbatch runs
    file.rename(spooled)
    done = script.start(str(spooled), SLURM_SUBMIT_DIR=str(script.folder))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("csipipe: error: no common.sh is beside this script; it belongs in ")
