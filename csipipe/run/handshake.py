"""Before training: every rank runs the same release with the same settings."""

from __future__ import annotations

import json

import torch

from csipipe import __version__
from csipipe.comm.handshake import first_difference
from csipipe.comm.world import World
from csipipe.pipeline import settings as deepspeed
from csipipe.settings import commandline
from csipipe.settings.config import Settings


def compare_settings(world: World, settings: Settings) -> None:
    """Refuse to train where nodes differ in release or settings.

    Raises:
        ValueError: naming the first difference.
        ValueError, OSError: a DeepSpeed file that can't be used.
    """
    releases = f"csipipe {__version__}\ntorch {torch.__version__}"
    if difference := first_difference(releases, world.shared("releases", releases)):
        here, there = difference
        raise ValueError(
            f"rank {world.rank} runs {here!r}, rank 0 {there!r}; install the same on every node "
            "(pip install -c constraints.txt -e .)."
        )
    mine = commandline.dotted(commandline.plain(settings))
    # a path may mean another file on another node, and two paths the same
    mine["train.deepspeed"] = deepspeed.of(settings)
    theirs = json.loads(world.shared("settings", json.dumps(mine)))
    for key, there, here in commandline.differences(theirs, mine):
        raise ValueError(
            f"rank {world.rank} was started with {key} {here!r}, rank 0 with {there!r}; start "
            "every node with the same settings and the same DeepSpeed file."
        )
