"""Ours beside one process, iteration by iteration in turn, so that a noisy machine hits both."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from csipipe import methods
from csipipe.config import Settings
from csipipe.device import keep_memory, pick_device
from csipipe.methods import Centralised
from csipipe.world import World

WARM_UP = 2
"""Rounds that are run and not counted."""


def measure(world: World, settings: Settings, rounds: int) -> dict[str, list[float]] | None:
    """Seconds per iteration of `split` (one thread per rank) and `one process` (a thread per core).

    The ranks train one split iteration, then rank 0 alone trains the unsplit model on the same
    micro-batches while the others wait, asleep; and so on, `rounds` times.

    Returns:
        On rank 0, the seconds of every counted round; None on the others.
    """
    device = pick_device(settings.train.device, world.local_rank)
    keep_memory()
    build = methods.prepare(settings, world.rank, world.size, device)
    unsplit = None
    if world.rank == 0:
        ues, test = methods.load(settings, range(settings.topology.ues), device)
        unsplit = Centralised(settings, ues, test, device, shared=False)
    world.ready("data")
    world.connect(settings.run.timeout)
    split = build(world)
    seconds: dict[str, list[float]] = {"split": [], "one process": []}
    cores = len(os.sched_getaffinity(0))
    for k in range(WARM_UP + rounds):
        split.agree(True)  # start together
        torch.set_num_threads(settings.train.threads or 1)
        seconds["split"].append(_timed(split.train_iteration, k))
        if unsplit is not None:
            torch.set_num_threads(cores)
            seconds["one process"].append(_timed(unsplit.train_iteration, k))
    world.leave()
    counted = {name: times[WARM_UP:] for name, times in seconds.items()}
    return counted if world.rank == 0 else None


def _timed(iterate: Callable[[int], object], iteration: int) -> float:
    before = time.perf_counter()
    iterate(iteration)
    return time.perf_counter() - before


def table(seconds: dict[str, list[float]]) -> str:
    """Median and spread of each, and the ratio round by round."""
    lines = [f"{'seconds per iteration':>24}  {'min':>8}  {'median':>8}  {'max':>8}"]
    ratios = [a / b for a, b in zip(seconds["split"], seconds["one process"], strict=True)]
    for name, values in [*seconds.items(), ("split / one process", ratios)]:
        figures = (min(values), statistics.median(values), max(values))
        lines.append(f"{name:>24}" + "".join(f"  {value:>8.3f}" for value in figures))
    return "\n".join(lines)
