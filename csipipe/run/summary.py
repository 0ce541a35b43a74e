"""What `summary.json` says of a run that has ended."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from csipipe.comm.ledger import Ledger
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.methods import Worker
from csipipe.methods.roster import evaluated
from csipipe.run import ceiling, joining
from csipipe.settings.config import Settings
from csipipe.tracking import Tracker, exchanged_summary


def pca(settings: Settings, world: World) -> dict[str, Any] | None:
    """The PCA to compare a finished run with, found where there is data; collective.

    None where there is none, or its rows can't be read any more: the run is finished all the same.
    """
    host, mine = Topology.first_host(settings, world.size), ""
    if world.rank == host:
        try:
            found = ceiling.find(settings)
        except (ValueError, OSError):
            found = None
        mine = json.dumps(found and asdict(found))
    shared: dict[str, Any] | None = json.loads(world.shared("ceiling", mine, origin=host))
    return shared


def content(
    worker: Worker,
    settings: Settings,
    tracker: Tracker,
    ledger: Ledger,
    done: int,
    ranks: int,
    beside: dict[str, Any] | None,
) -> dict[str, Any]:
    """All of it; `test` is the last evaluation, after `test_iteration` iterations; both are null
    where a run stopped before its first.

    Args:
        beside: as `pca` gave it; None: none, or the run isn't finished.
    """
    return {
        "method": settings.method,
        "status": "finished" if done == settings.train.iterations else "stopped",
        "iterations": done,
        "test": tracker.history[-1]["test"] if tracker.history else None,
        "test_iteration": tracker.history[-1]["iteration"] if tracker.history else None,
        "ceiling": beside,
        "evaluated_ues": evaluated(settings),
        "joined": [asdict(one) for one in joining.joined(settings, tracker.history)],
        **exchanged_summary(ledger),
        "dropped": worker.dropped,
        "seconds_per_iteration": tracker.seconds_per_iteration,
        "seconds_total": tracker.seconds_total,
        "parameters": worker.parameters,
        "topology": asdict(settings.topology)
        | {"stages": settings.stages, "partition": settings.partition, "ranks": ranks},
    }
