"""Who started a process, where it meets the others, and which attempt of a run it belongs to."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from csipipe.__main__ import main
from csipipe.comm import blame, meeting
from csipipe.comm.world import World
from csipipe.settings.launcher import RANKS, TORCHRUN, launched

ROOT = Path(__file__).parents[2]
COMPLETE = {**dict.fromkeys(RANKS, "1"), "MASTER_ADDR": "here"}


@pytest.mark.parametrize(
    ("arguments", "environment", "by", "leftover"),
    [
        ([], {}, None, ""),
        ([], COMPLETE | {TORCHRUN: "True"}, "torchrun", ""),
        (["--local-rank", "1"], COMPLETE | {TORCHRUN: "True"}, "torchrun", ""),
        (["--local_rank=1"], COMPLETE, "deepspeed", ""),
        ([], COMPLETE, None, "RANK=1, WORLD_SIZE=1"),
        ([], {"RANK": "0"}, None, "RANK=0"),
        ([], {"WORLD_SIZE": "1"}, None, "WORLD_SIZE=1"),
        ([], {"RANK": "0", TORCHRUN: "True"}, None, "RANK=0"),
        (["--local_rank=0"], {}, None, "--local_rank"),
        ([], {"SLURM_STEP_NUM_TASKS": "4"}, None, "SLURM_STEP_NUM_TASKS=4"),
        ([], {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": ""}, None, ""),
        ([], {"OMPI_COMM_WORLD_SIZE": "2"}, None, "OMPI_COMM_WORLD_SIZE=2"),
    ],
)
def test_who_started_a_process(
    arguments: list[str], environment: dict[str, str], by: str | None, leftover: str
) -> None:
    found = launched([*arguments, "--train.lr", "1"], environment)
    assert (found.by, found.leftover) == (by, leftover)
    assert found.arguments == ["--train.lr", "1"]


def test_train_refuses_rank_variables_that_no_launcher_vouches_for() -> None:
    ended = subprocess.run(
        [sys.executable, "launch/train.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"},
    )
    assert ended.returncode == 1
    assert "RANK=0, WORLD_SIZE=4 says" in ended.stderr
    assert "torchrun --nproc_per_node=4 launch/train.py" in ended.stderr


def test_other_commands_ignore_them_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", str(tmp_path)]) == 1  # and waits for nobody
    said = capsys.readouterr().err
    assert "RANK=0, WORLD_SIZE=4 is ignored" in said
    assert "is not a run's directory" in said


def test_a_name_that_does_not_resolve_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.invalid.*--local-addr=ADDRESS"):
        meeting.resolve("nowhere.invalid")
    with pytest.raises(ValueError, match="no answer after 0 s"):
        meeting.resolve("nowhere.invalid", limit=0)
    meeting.resolve("127.0.0.1")


def test_an_address_that_no_other_node_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed: refused, remote=[127.0.1.1]:39345$1")

    monkeypatch.setattr(dist, "init_process_group", refused)
    monkeypatch.setattr(World, "attend", lambda _: None)
    with pytest.raises(OSError, match=r"gave 127\.0\.1\.1 as its address.*GLOO_SOCKET_IFNAME=eth0"):
        World(HashStore(), 0, 2, 0, 1).connect(1.0)
    with pytest.raises(RuntimeError, match=r"Gloo connectFullMesh failed"):  # both on one node
        World(HashStore(), 0, 2, 0, 2).connect(1.0)


def attempts(stores: list[PrefixStore], ranks: list[int]) -> list[int]:
    """What these ranks of three find out, at the same time."""
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(meeting.attempt, stores[rank], rank, 3, 10.0) for rank in ranks]
        return [future.result() for future in found]


def test_ranks_agree_which_attempt_it_is_whoever_was_there_before() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
    stores = [PrefixStore("meeting", client) for client in clients]
    assert attempts(stores, [0, 1, 2]) == [0, 0, 0]
    with pytest.raises(blame.PeerLost):  # rank 1 died before it could say hello
        meeting.attempt(stores[0], 0, 3, 0.1)
    with pytest.raises(blame.PeerLost):  # and rank 2 afterwards
        meeting.attempt(stores[2], 2, 3, 0.1)
    assert attempts(stores, [2, 1, 0]) == [2, 2, 2]
