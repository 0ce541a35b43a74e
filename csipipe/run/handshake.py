"""Before training: every rank runs the same release with the same settings, on like images."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from csipipe import __version__, channels
from csipipe.comm.handshake import first_difference
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.pipeline import settings as deepspeed
from csipipe.settings import commandline
from csipipe.settings.commandline import argument
from csipipe.settings.config import Settings


def agree_on_images(world: World, settings: Settings) -> Settings:
    """The settings with size and kind of the images, which the host of UE 0 looks up in its data.

    A BTS rank may run where there is no data.

    Raises:
        ValueError, OSError: data that can't be used, or ranks that don't fit the topology.
    """
    host = Topology.first_host(settings, world.size)
    mine = channels.sized(settings) if world.rank == host else settings
    said = json.dumps([mine.model.angles, mine.model.delays, mine.data.kind])
    angles, delays, kind = json.loads(world.shared("images", said, origin=host))
    return replace(
        settings,
        model=replace(settings.model, angles=angles, delays=delays),
        data=replace(settings.data, kind=kind),
    )


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
            f"rank {world.rank} was started with {key} {argument(here)}, rank 0 with "
            f"{argument(there)}; start every node with the same settings and the same "
            "DeepSpeed file."
        )
