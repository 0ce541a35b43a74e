"""No rank unpickles anything in a run, DeepSpeed's and torch's own code included."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from harness import run_world
from runs import small, split

from csipipe.comm.world import World
from csipipe.settings.config import Settings


def unpickled(world: World, settings: Settings) -> list[str]:
    """What a rank's unpicklers looked for while it was set up and trained.

    Python tells of every class or function that a pickle names, whoever reads it.
    """
    found: list[str] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            found.append(".".join(map(str, arguments)))

    sys.addaudithook(listen)  # until the end of this process
    split(world, settings)
    return found


@pytest.mark.parametrize(
    ("method", "ranks"), [("csilocal", 4), pytest.param("fedavg", 3, marks=pytest.mark.long)]
)
def test_a_run_unpickles_nothing(method: str, ranks: int) -> None:
    settings = small(method, topology={"stages": 2 if method == "csilocal" else 1})
    assert run_world(ranks, unpickled, settings) == [[]] * ranks
