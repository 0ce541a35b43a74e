"""Jobs of a SLURM: nodes, ranks and roles from the environment; what is printed and submitted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import reportruns
from reportruns import finish

from csipipe.comm.topology import Topology
from csipipe.reports import array, fig6, headline, runs
from csipipe.reports.command import Report
from csipipe.run import slurm
from csipipe.run.lock import Lock
from csipipe.run.slurm import Plan
from csipipe.settings import commandline
from csipipe.settings.config import Placement, Settings

GOLDEN = Path(__file__).parent / "golden"
MIXED = {
    "SLURM_JOB_ID": "12",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu7",
    "SLURM_TASKS_PER_NODE_HET_GROUP_0": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "a1,b2,c3",
    "SLURM_TASKS_PER_NODE_HET_GROUP_1": "2(x2),1",
}


def golden(name: str, text: str) -> None:
    """Compare with the golden file; CSIPIPE_GOLDEN=1 writes it anew."""
    file = GOLDEN / name
    if os.environ.get("CSIPIPE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text + "\n")
    assert file.read_text() == text + "\n"


def settings(
    method: str = "csilocal",
    ues: int = 4,
    stages: int | None = None,
    placement: Placement | None = None,
) -> Settings:
    defaults = Settings()
    topology = replace(defaults.topology, ues=ues, stages=stages, placement=placement)
    return replace(defaults, method=method, topology=topology)


def groups(*counts: int) -> list[list[tuple[str, int]]]:
    return [[(f"n{i}", count) for i, count in enumerate(counts)]]


@pytest.mark.parametrize(
    ("text", "counts"),
    [("4", [4]), ("3(x2)", [3, 3]), ("3,2", [3, 2]), ("12(x2),1,2(x3)", [12, 12, 1, 2, 2, 2])],
)
def test_slurms_way_of_writing_tasks(text: str, counts: list[int]) -> None:
    assert slurm.task_counts(text) == counts


def test_components_of_a_heterogeneous_job_come_in_order() -> None:
    found = slurm.tasks(MIXED, lambda names: names.split(","))
    assert found == [[("gpu7", 2)], [("a1", 2), ("b2", 2), ("c3", 1)]]


@pytest.mark.parametrize(
    ("method", "counts", "ranks"),
    [
        ("csilocal", (3, 3), (3, 3)),
        ("csilocal", (4, 4), (4, 2)),  # 2 stages and 4 UEs have use for 6
        ("csilocal", (8, 8), (6, 0)),
        ("fedavg", (3, 3), (3, 2)),
        ("centralised", (4,), (1,)),
    ],
)
def test_a_task_becomes_a_rank_where_there_is_use_for_it(
    method: str, counts: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    asked = settings(method)
    assert slurm.ranks_of(asked, groups(*counts)) == ranks
    if method != "centralised":
        Topology(sum(ranks), asked.stages, asked.topology.ues)


def test_too_few_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 task.* sbatch --ntasks=3 or more, ideally 6"):
        slurm.ranks_of(settings(), groups(1, 1))
    with pytest.raises(ValueError, match=r"1 task.*: 2 BTS rank.s. and at least one.* --ntasks=3 "):
        slurm.ranks_of(settings(stages=2), groups(1))


@pytest.mark.parametrize(
    ("method", "placement", "counts", "ranks"),
    [
        ("csilocal", "together", (1, 1), (1, 1)),
        ("csilocal", "together", (4, 4), (4, 0)),  # 4 UEs have use for 4
        ("csilocal", None, (1,), (1,)),
        ("fedavg", None, (1,), (1,)),
    ],
)
def test_a_rank_may_be_a_stage_and_host_ues(
    method: str, placement: Placement | None, counts: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    asked = settings(method, placement=placement)
    assert slurm.ranks_of(asked, groups(*counts)) == ranks
    one = settings(method, placement="together", ues=1)
    assert slurm.ranks_of(one, groups(*counts)) == (1, *[0] * (len(counts) - 1))
    Topology.of(asked, sum(ranks))


def test_a_stage_that_would_leave_the_gpu_nodes_is_refused() -> None:
    mixed = [[("gpu7", 2)], [("a1", 4)]]
    assert slurm.ranks_of(settings(stages=2), mixed) == (2, 4)
    with pytest.raises(ValueError, match=r"has 2 task.*, but topology.stages is 4; give it --ntas"):
        slurm.ranks_of(settings(stages=4), mixed)


def test_what_a_job_says_and_starts() -> None:
    found = slurm.tasks(MIXED, lambda names: names.split(","))
    nodes = tuple(node for group in found for node, _ in group)
    asked = settings(ues=8)
    ranks = slurm.ranks_of(asked, found)
    first = slurm.describe(asked, "12.0", nodes, ranks, Path("my runs/1"))
    again = slurm.describe(asked, "12.2", nodes, ranks, Path("my runs/1")).splitlines()[0]
    plan = Plan("12.0", nodes, ranks, "10.0.0.7", 4242, ("--run.dir", "my runs/1"))
    lines = [" ".join(plan.torchrun(place)) for place in range(len(nodes))]
    golden("slurm_job.txt", "\n".join([first, again, *lines]))


def test_nodes_without_a_rank_are_not_waited_for() -> None:
    plan = Plan("1.0", ("n1", "n2", "n3"), (4, 2, 0), "10.0.0.1", 1, ())
    assert "--nnodes=2" in plan.torchrun(1)


def test_the_first_attempt_wants_a_new_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = slurm.folder_of(settings(), MIXED)
    assert folder == Path("runs/csilocal-indoor-job12")
    folder.mkdir(parents=True)
    assert slurm.folder_of(settings(), MIXED) == folder
    (folder / "config.yaml").touch()
    assert slurm.folder_of(settings(), MIXED | {"SLURM_RESTART_COUNT": "1"}) == folder
    with pytest.raises(
        ValueError, match=r"is there already, of an earlier start in .*a --run\.dir"
    ):
        slurm.folder_of(settings(), MIXED)


def test_a_job_leaves_a_live_run_alone(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    lock = Lock(tmp_path)
    one = MIXED | {"SLURM_HET_SIZE": "0", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "3"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "_expand", str.split)
        with pytest.raises(ValueError, match=r"in use by a live run"):
            slurm.plan(["--run.dir", str(tmp_path)], one)
        assert (tmp_path / "stop").exists()
        lock.release()
        assert slurm.plan(["--run.dir", str(tmp_path)], one) == tmp_path
    assert not (tmp_path / "stop").exists()  # asked of an earlier attempt


def test_a_node_without_the_plan_of_this_attempt_says_so(tmp_path: Path) -> None:
    plan = Plan("12.0", ("n1",), (3,), "127.0.0.1", 1, ("--x",))
    plan.write(tmp_path)
    assert Plan.read(tmp_path, "12.0", 0.0) == plan
    with pytest.raises(
        ValueError, match=r"give a --run\.dir on a file system that all nodes share"
    ):
        Plan.read(tmp_path, "12.1", 0.0)


def test_a_node_that_slurm_does_not_show_is_reached_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden(*words: str) -> str:
        raise OSError(f"scontrol {words}: slurm_load_node error: Access/permission denied")

    monkeypatch.setattr(slurm, "_scontrol", hidden)
    assert slurm.address_of("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"the name of node nobody\.invalid doesn't resolve"):
        slurm.address_of("nobody.invalid")


def test_the_interface_of_an_address() -> None:
    assert slurm.interface_of(slurm.address_towards("127.0.0.1")).startswith("lo")
    with pytest.raises(ValueError, match=r"no network interface of .* 192\.0\.2\.254"):
        slurm.interface_of("192.0.2.254")


def report(out: Path) -> Report:
    return Report(reportruns.preset(), out, quick=False, collect=True, jobs=1)


@pytest.mark.parametrize(
    ("indices", "text"), [([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 1, 4, 7, 8, 9], "0-1,4,7-9")]
)
def test_indices_as_slurm_writes_them(indices: list[int], text: str) -> None:
    assert array.ranges(indices) == text


def test_the_line_for_what_is_missing(tmp_path: Path) -> None:
    one = report(tmp_path)
    wanted = array.numbered(fig6.wanted(one).values())
    words = ["fig6", "--preset", "paper", "--data.path", "my data"]
    lines = [array.line(one, wanted, words)]
    for index in (0, 1, 47):
        finish(wanted[index], [0.5])
    (wanted[1].folder / "summary.json").unlink()  # interrupted
    live = wanted[2]
    live.folder.mkdir(parents=True)
    (live.folder / "config.yaml").write_text(commandline.to_yaml(live.settings))
    lock = Lock(live.folder)
    failed_early = wanted[3].folder
    failed_early.mkdir()
    (failed_early / slurm.FILE).touch()
    lines.append(array.line(one, wanted, words))
    lock.release()
    golden("sbatch_line.txt", "\n".join(line or "" for line in lines))
    for run in wanted:
        if run.state() is not runs.State.FINISHED:
            for file in run.folder.glob("*"):
                file.unlink()
            if run.folder.exists():
                run.folder.rmdir()
            finish(run, [0.5])
    assert array.line(one, wanted, words) is None


def test_an_index_is_a_run_of_the_report(tmp_path: Path) -> None:
    one = report(tmp_path)
    wanted = array.numbered(headline.wanted(one).values())
    for index in (0, len(wanted) - 1):
        file = array.pick(one, wanted, index)
        asked = commandline.read(["--config", str(file)])
        assert asked == wanted[index].settings
    assert [path.suffix for path in file.parent.iterdir()] == [".yaml"] * 2
    with pytest.raises(ValueError, match=r"index is 21, but .* 21 runs; .*--array=0-20"):
        array.pick(one, wanted, 21)
