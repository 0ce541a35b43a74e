"""Before training: every rank runs the same release with the same settings, and both ends of the
wire agree on every message, so that a difference is named before it can be misread as data.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest

import torch

from csipipe import commandline
from csipipe.config import Settings
from csipipe.pipeline import settings as deepspeed
from csipipe.wire import Wire
from csipipe.world import World


def compare_settings(world: World, settings: Settings) -> None:
    """Refuse to train where nodes differ in release or settings.

    Raises:
        ValueError: naming the first difference.
        ValueError, OSError: a DeepSpeed file that can't be used.
    """
    releases = f"csipipe {version('csipipe')}\ntorch {torch.__version__}"
    if difference := _differ(releases, world.shared("releases", releases)):
        here, there = difference
        raise ValueError(
            f"rank {world.rank} runs {here!r}, rank 0 {there!r}; install the same on every node "
            "(pip install -c constraints.txt -e .)."
        )
    # a path may mean another file on another node, and two paths the same
    without = replace(settings, train=replace(settings.train, deepspeed=None))
    content = json.dumps(deepspeed.of(settings), sort_keys=True)
    mine = f"{commandline.to_yaml(without)}train.deepspeed with {content}"
    if difference := _differ(mine, world.shared("settings", mine)):
        here, there = difference
        raise ValueError(
            f"rank {world.rank} was started with {here!r}, rank 0 with {there!r}; start every "
            "node with the same settings and the same DeepSpeed file."
        )


def compare_messages(world: World, wire: Wire) -> None:
    """Refuse to train (ValueError) where a UE and the BTS expect different messages.

    Each rank publishes its UEs' messages, the UE ranks compare: number, kind, shape and type.
    """
    world.tell("messages", "\n".join(sorted(wire.terms)))
    topology = wire.topology
    if topology.is_bts(world.rank):
        return
    stages = [line for rank in topology.bts_ranks for line in world.hear("messages", rank)]
    own = tuple(f"UE {ue}: " for ue in topology.ues_of(world.rank))
    theirs = sorted({line for line in stages if line.startswith(own)})
    if difference := _differ("\n".join(sorted(wire.terms)), "\n".join(theirs)):
        here, there = difference
        raise ValueError(
            f"{topology.role(world.rank)} would exchange {here!r}, the BTS {there!r}; both must "
            "run the same release with the same settings."
        )


def _differ(mine: str, theirs: str) -> tuple[str, str] | None:
    """The first lines that differ."""
    lines = zip_longest(mine.splitlines(), theirs.splitlines(), fillvalue="")
    return next(((a.strip(), b.strip()) for a, b in lines if a != b), None)
