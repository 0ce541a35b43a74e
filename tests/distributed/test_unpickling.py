"""No rank unpickles anything in a run, DeepSpeed's and torch's own code included."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness import run_world
from runs import small, split

from csipipe.comm.world import World
from csipipe.settings.config import Settings


def listening() -> list[str]:
    """What this process's unpicklers look for from now on.

    Python tells of every class or function that a pickle names, whoever reads it.
    """
    found: list[str] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            found.append(".".join(map(str, arguments)))

    sys.addaudithook(listen)  # until the end of this process
    return found


def unpickled(world: World, settings: Settings) -> list[str]:
    """What a rank's unpicklers looked for while it was set up and trained."""
    found = listening()
    split(world, settings)
    return found


def planted(world: World) -> list[str]:
    """What is found where torch unpickles what another rank sent."""
    found = listening()
    world.connect(20)
    dist.broadcast_object_list([Path("a") if world.rank == 0 else None], src=0)
    world.leave()
    return found


def test_what_torch_unpickles_is_found() -> None:
    assert "pathlib.PosixPath" in run_world(2, planted)[1]


@pytest.mark.parametrize(
    ("method", "ranks"), [("csilocal", 4), pytest.param("fedavg", 3, marks=pytest.mark.long)]
)
def test_a_run_unpickles_nothing(method: str, ranks: int) -> None:
    settings = small(method, topology={"stages": 2 if method == "csilocal" else 1})
    assert run_world(ranks, unpickled, settings) == [[]] * ranks
