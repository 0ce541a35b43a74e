"""Cuts of the tail that balance measured time. No DeepSpeed import.

A profile holds the seconds that each layer takes, forward and backward, for one micro-batch of
the run. It can be kept in a file, which is then used only for the same model, micro-batch and
machine.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.device import autocast, processor, synchronize
from csipipe.files import DAMAGED, write_file
from csipipe.settings.config import ModelSettings, Precision

_ROUNDS, _WARM_UP = 5, 2


def profile(
    model: ModelSettings, rows: int, precision: Precision, device: torch.device, file: str | None
) -> list[float]:
    """Seconds per tail layer for a micro-batch of `rows` rows: from `file`, or measured now.

    A measurement is written to `file`, if one is named.

    Raises:
        ValueError: the file holds no profile, or one of another model, micro-batch or machine.
        OSError: it can't be read or written.
    """
    about = _about(model, rows, precision, device)
    path = Path(file) if file else None
    if path is not None and path.exists():
        return _read(path, about, layers=len(models.tail_shapes(model)) - 1)
    seconds = measure(model, rows, precision, device)
    if path is not None:
        write_file(path, json.dumps(about | {"seconds": seconds}, indent=2) + "\n")
    return seconds


def measure(
    model: ModelSettings, rows: int, precision: Precision, device: torch.device
) -> list[float]:
    """Median seconds of every tail layer's forward and backward pass."""
    layers = models.build_tail(model, seed=0)
    times: list[list[float]] = [[] for _ in layers]
    for layer in layers:
        layer.to(device).train()
    for _ in range(_WARM_UP + _ROUNDS):
        x = torch.randn(rows, models.widths(model)[0], device=device)
        for layer, seconds in zip(layers, times, strict=True):
            x, elapsed = _timed(layer, x, precision, device)
            seconds.append(elapsed)
    return [statistics.median(seconds[_WARM_UP:]) for seconds in times]


def _timed(
    layer: nn.Module, x: Tensor, precision: Precision, device: torch.device
) -> tuple[Tensor, float]:
    """A layer's output, and the seconds of its forward and backward pass."""
    x = x.detach().requires_grad_()
    synchronize(device)
    before = time.perf_counter()
    with autocast(precision, device):
        y: Tensor = layer(x)
    torch.autograd.backward(y, torch.ones_like(y))
    synchronize(device)
    return y, time.perf_counter() - before


def cut(seconds: Sequence[float], layers: Sequence[nn.Module], stages: int) -> list[int]:
    """First layer of every stage, then the number of layers; minimises the longest stage.

    Every stage gets a layer with parameters, since DeepSpeed's optimiser needs one; as many have
    some (`models.check_stages`).
    """
    heavy = [models.count_parameters([layer]) > 0 for layer in layers]
    inner = itertools.combinations(range(1, len(seconds)), stages - 1)
    cuts = [[0, *places, len(seconds)] for places in inner]
    possible = [c for c in cuts if all(any(heavy[a:b]) for a, b in itertools.pairwise(c))]
    return min(possible, key=lambda c: max(stage_seconds(seconds, c)))


def stage_seconds(seconds: Sequence[float], parts: Sequence[int]) -> list[float]:
    """Seconds per micro-batch of every stage."""
    return [sum(seconds[start:stop]) for start, stop in itertools.pairwise(parts)]


def report(seconds: Sequence[float], parts: Sequence[int]) -> str:
    """What the run reports about its partition."""
    stages = stage_seconds(seconds, parts)
    times = ", ".join(f"{1e3 * s:.1f}" for s in stages)
    longer = max(stages) / statistics.mean(stages) - 1
    return (
        f"partition measured: layers cut at {parts[1:-1]}, {times} ms per micro-batch and stage; "
        f"imbalance (longest stage above the mean) {longer:.0%}"
    )


def _about(
    model: ModelSettings, rows: int, precision: Precision, device: torch.device
) -> dict[str, Any]:
    """What a profile is valid for."""
    cpu = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "model": json.loads(json.dumps(asdict(model))),
        "rows": rows,
        "precision": precision,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
    }


def _read(path: Path, about: dict[str, Any], layers: int) -> list[float]:
    remedy = "delete it to have it measured again, or name another file in topology.profile."
    try:
        found = json.loads(path.read_text())
        seconds = [float(value) for value in found["seconds"]]
    except DAMAGED as error:
        raise ValueError(
            f"topology.profile: {path} holds no profile of a tail; {remedy}"
        ) from error
    for key, value in about.items():
        if found.get(key) != value:
            raise ValueError(
                f"topology.profile: {path} was measured with {key} {found.get(key)}, this run has "
                f"{value}; {remedy}"
            )
    if len(seconds) != layers or not all(math.isfinite(s) and s >= 0 for s in seconds):
        raise ValueError(
            f"topology.profile: {path} holds the times {seconds}; expected {layers} times in "
            f"seconds; {remedy}"
        )
    return seconds
