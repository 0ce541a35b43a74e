"""The scripts in slurm/ on a real SLURM: the same results on any nodes, whatever happens."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster as clusters
import pytest
import yaml
from cluster import Cluster
from jobs import ROOT, SETTINGS, Job, environment, results, submit, train, words

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(clusters.missing()), reason=clusters.missing()),
]
NETWORK = "the nodes have no addresses of their own: this needs root"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def jobs(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that nobody has to watch, submitted at once."""
    place = tmp_path_factory.mktemp("jobs")
    bare = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": ""}
    unshared = ("--run.dir", str(slurm.folder / "unshared" / "run"))
    return {
        "one node": train(slurm, place / "one", "single_node"),
        "two nodes": train(slurm, place / "two", "multi_node"),
        "mixed nodes": train(slurm, place / "mixed", "hetero"),
        "failing": train(slurm, place / "failing", "multi_node", train__lr="1e30"),
        "few": train(slurm, place / "few", "single_node", ("--ntasks=2",)),
        "typo": train(slurm, place / "typo", "multi_node", train__rate="1"),
        "bare": submit(slurm, place / "bare", "single_node", changes=bare),
        "unshared": submit(slurm, place / "unshared", "multi_node", *unshared),
        "nameless": train(slurm, place / "nameless", "multi_node", ("--partition=nameless",)),
    }


@pytest.fixture(scope="session")
def wanted(jobs: dict[str, Job]) -> dict[str, Any]:
    """Results of a run on one node that nothing happened to."""
    jobs["one node"].completed()
    return results(jobs["one node"].run)


def test_one_node(jobs: dict[str, Job], wanted: dict[str, Any]) -> None:
    job = jobs["one node"]
    assert wanted["status"] == "finished"
    assert "n1: BTS stage 0, BTS stage 1, UE rank 2 (UE 0), UE rank 3 (UE 1), " in job.output()
    assert "look at it:   tensorboard --logdir run\n" in job.output()
    assert not (job.run / "slurm.json").exists()


def test_two_nodes_are_one_node_to_the_bit(jobs: dict[str, Job], wanted: dict[str, Any]) -> None:
    output = jobs["two nodes"].completed()
    first, second = (line for line in output.splitlines() if line.startswith("  n"))
    assert first.endswith(": BTS stage 0, BTS stage 1, UE rank 2 (UE 0)")
    assert second.endswith(": UE rank 3 (UE 1), UE rank 4 (UE 2), UE rank 5 (UE 3)")
    assert results(jobs["two nodes"].run) == wanted


def test_gpu_and_cpu_nodes_are_one_world(jobs: dict[str, Job], wanted: dict[str, Any]) -> None:
    output = jobs["mixed nodes"].completed()
    first, *others = (line for line in output.splitlines() if line.startswith("  n"))
    assert first == "  n1: BTS stage 0, BTS stage 1"  # the node with GPUs
    assert [line.partition(": ")[2] for line in others] == [
        "UE rank 2 (UE 0), UE rank 3 (UE 1)",
        "UE rank 4 (UE 2), UE rank 5 (UE 3)",
    ]
    assert results(jobs["mixed nodes"].run) == wanted


def test_a_preempted_job_comes_back_and_ends_as_if_undisturbed(
    slurm: Cluster, wanted: dict[str, Any], tmp_path: Path
) -> None:
    job = train(slurm, tmp_path, "preemptible")
    job.wait_for("iteration 15/")
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    output = job.completed()
    assert "stopped:      resume with the same command" in output
    assert f"job {job.number} (attempt 2): csilocal" in output
    assert "resuming after iteration " in output
    assert job.facts()["Restarts"] == "1"
    assert results(job.run) == wanted


def test_a_job_survives_the_death_of_a_node(
    slurm: Cluster, wanted: dict[str, Any], tmp_path: Path
) -> None:
    job = train(slurm, tmp_path, "multi_node", ("--partition=frail",))
    job.wait_for("iteration 30/")
    assert job.facts()["NodeList"] == "n[5-6]"
    slurm.kill("n6")
    output = job.completed()
    assert "resuming after iteration " in output
    assert job.facts()["NodeList"] == "n[5,7]"
    assert job.facts()["Restarts"] == "1"
    assert results(job.run) == wanted


def test_a_failing_rank_fails_the_job(jobs: dict[str, Job]) -> None:
    jobs["failing"].failed()
    output = jobs["failing"].output()
    assert output.count("csipipe: error:") == 1
    assert "csipipe: error: BTS stage 0, iteration 2: smashed data of micro-batch " in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "2 task(s) are too few for topology.stages 2: 2 BTS rank(s) and at least one UE"),
        ("typo", "unrecognized arguments: --train.rate "),
        ("bare", "has no Python with csipipe"),
        ("unshared", "doesn't see what the job's first node wrote into"),
        ("nameless", "the name of node n9 doesn't resolve on node n8"),
    ],
    ids=lambda text: text if text.isalpha() else "said",
)
def test_what_a_person_got_wrong_is_named_first(
    name: str, message: str, jobs: dict[str, Job], slurm: Cluster
) -> None:
    if slurm.plain and name in ("unshared", "nameless"):
        pytest.skip(NETWORK)
    lines = jobs[name].failed()
    [shown] = [line for line in lines if message in line]
    assert "csipipe: error: " in shown


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda s: s.stem)
def test_a_script_outside_slurm_says_how_to_submit_it(script: Path, tmp_path: Path) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        ["bash", script, "--x", "1"], env=outside, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("csipipe: error: ")
    assert line.endswith(f"sbatch {script} --x 1")


def clone(folder: Path, *activate: str) -> Path:
    """csipipe's scripts in a folder of their own, with an environment beside them."""
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    lines = [f"PATH={Path(sys.executable).parent}:$PATH", f"export PATH PYTHONPATH={ROOT}"]
    place = folder / ".venv" / "bin" / "activate"
    place.parent.mkdir(parents=True)
    place.write_text("\n".join([*lines, *activate, ""]))
    return folder


def submit_there(slurm: Cluster, folder: Path, *line: str, **changes: str) -> Job:
    """`sbatch …` as somebody types it in a folder, with nothing of this process's environment."""
    folder.mkdir(exist_ok=True)
    inside = ["env", "-C", str(folder), "sbatch", "--parsable", "--output=%j.out", *line]
    return Job(slurm, slurm.run(*inside, CSIPIPE_VENV="", **changes).strip(), folder)


def test_a_script_is_found_from_elsewhere_and_needs_no_environment(
    slurm: Cluster, wanted: dict[str, Any], tmp_path: Path
) -> None:
    clone(tmp_path / "a clone")
    chosen = words(SETTINGS | {"run.dir": "run"})
    script = "../a clone/slurm/multi_node.sbatch"
    job = submit_there(slurm, tmp_path / "here", "--export=NONE", script, *chosen)
    job.completed()
    assert results(job.run) == wanted


@pytest.mark.parametrize(
    ("trains", "message", "restarts"),
    [
        ("true", "not requeued, since nothing was trained yet", "0"),
        ("touch run/config.yaml", "again; it was requeued 1 times", "1"),
    ],
    ids=["never trained", "again and again"],
)
def test_requeues_end(
    trains: str, message: str, restarts: str, slurm: Cluster, tmp_path: Path
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "srun").write_text(f"#!/bin/sh\n{trains}\nexit 1\n")  # no node answers
    (programs / "srun").chmod(0o755)
    place = clone(tmp_path / "clone", f"PATH={programs}:$PATH", "CSIPIPE_REQUEUES=1")
    script = str(place / "slurm" / "multi_node.sbatch")
    job = submit_there(slurm, tmp_path / "here", script, "--run.dir", "run")
    job.failed()
    assert message in job.output()
    assert job.facts()["Restarts"] == restarts


def test_a_step_has_all_that_the_job_has(slurm: Cluster, tmp_path: Path) -> None:
    place = clone(tmp_path / "clone")
    look = """'echo "$SLURM_CPUS_ON_NODE CPUs, GPUs $CUDA_VISIBLE_DEVICES"'"""
    script = tmp_path / "look.sbatch"
    script.write_text(f"#!/bin/bash\n. {place}/slurm/common.sh\non_each_node sh -c {look}\n")
    ranks = "--ntasks-per-node=2"
    asked = (ranks, "--cpus-per-task=4", "--gpus-per-node=2", str(script))
    job = submit_there(slurm, tmp_path / "here", *asked, SRUN_CPUS_PER_TASK="4")
    assert job.completed().endswith("8 CPUs, GPUs 0,1\n")
    job = submit_there(slurm, tmp_path / "here", ranks, "--gpus-per-task=1", str(script))
    [line, _] = job.failed()
    assert line.startswith("csipipe: error: SLURM_GPUS_PER_TASK is 1, but one task per node")


TINY = {
    "settings": {
        "model": {"angles": 8, "delays": 8},
        "topology": {"ues": 2, "stages": 1},
        "data": {"train_samples": 80, "test_samples": 20},
        "train": {"iterations": 4, "batch_size": 8, "micro_batches": 2, "lr_schedule": "constant"},
        "run": {"eval_every": 1, "save_every": 2},
    },
    "processes": 3,
    "compression": [4],
    "seeds": [0],
    "search": None,
    "rates": None,
    "panels": ["f"],
    "headline": ["csilocal", "centralised"],
}


def test_a_sweep_goes_on_where_it_was(slurm: Cluster, tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(TINY))

    def reproduce(report: str, *options: str) -> str:
        line = [sys.executable, "launch/reproduce.py", report, "--preset", str(preset)]
        done = subprocess.run(
            [*line, "--out", str(tmp_path / "out"), *options],
            cwd=ROOT,
            env=os.environ | environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sweep(line: str, *indices: str) -> list[Job]:
        """Submit the printed line; the array's tasks."""
        sbatch, *options, script, report, name, file, out, folder = shlex.split(line)
        assert (sbatch, script) == ("sbatch", "slurm/sweep.sbatch")
        options.append(f"--output={tmp_path}/%A_%a.out")
        words = (report, name, file, out, folder)
        job = submit(slurm, tmp_path, "sweep", *words, options=tuple(options))
        return [Job(slurm, f"{job.number}_{index}", tmp_path) for index in indices]

    first = reproduce("headline", "--sbatch")
    assert first.startswith("sbatch --array=0-1 --ntasks=3 slurm/sweep.sbatch headline --preset ")
    split, unsplit = sweep(first, "0", "1")
    # csilocal has a stage and two UEs; the unsplit model has use for one task
    assert "csilocal on 1 node(s), 3 rank(s)" in split.completed()
    assert "centralised on 1 node(s), 1 rank(s)" in unsplit.completed()
    assert reproduce("headline", "--sbatch") == ""
    # the headline's two runs are two of the eight of Fig. 6
    assert reproduce("fig6", "--sbatch").startswith("sbatch --array=1-6 --ntasks=3 ")

    run = tmp_path / "out" / "runs" / "centralised-outdoor-c32-seed0"
    before = results(run)
    (run / "summary.json").unlink()  # as if the job had been killed after iteration 2
    shutil.rmtree(run / "checkpoints" / "4")
    reproduce("fig6", "--collect")
    rows = (tmp_path / "out" / "fig6.csv").read_text().splitlines()[1:]
    assert [row.split(",")[3] for row in rows] == ["csilocal"] * 4
    page = (tmp_path / "out" / "fig6.md").read_text()
    assert "- centralised-outdoor-c32-seed0: interrupted" in page
    assert "- fedavg-outdoor-c32-seed0: not started yet" in page

    line = reproduce("headline", "--sbatch")
    assert line.startswith("sbatch --array=1 ")
    [again] = sweep(line, "1")
    assert "resuming after iteration 2" in again.completed()
    assert results(run) == before
    reproduce("headline", "--collect")
    assert "not in this report" not in (tmp_path / "out" / "headline.md").read_text()


def test_two_nodes_without_root(wanted: dict[str, Any], tmp_path: Path) -> None:
    with Cluster(plain=True) as plain:
        job = train(plain, tmp_path, "multi_node")
        job.completed()
        assert results(job.run) == wanted


def test_the_cluster_leaves_nothing_behind(tmp_path: Path) -> None:
    script = "sbatch --wrap 'exec sleep 98765'; until squeue -h -t RUNNING | grep .; do :; done"
    subprocess.run(
        [sys.executable, str(Path(clusters.__file__)), "bash", "-c", script],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        timeout=120,
    )
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 98765\n" not in found
