"""Where the tail is cut into stages, by DeepSpeed's algorithms: known before the ranks meet."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from deepspeed.runtime.utils import partition_balanced, partition_uniform
from torch import nn

from csipipe.models import count_parameters


def cuts(layers: Sequence[nn.Module], stages: int, method: str) -> list[int]:
    """First layer of every stage, then the number of layers.

    Args:
        layers: the whole tail; may be without memory (device meta).
        method: `topology.partition`, but for measured.

    Raises:
        ValueError: a stage without layers or without parameters, or no layer of the type.
    """
    parts = _parts(layers, stages, method)
    if (empty := _empty(layers, parts)) is None:
        return parts
    sizes = [count_parameters([layer]) for layer in layers]
    most = sum(map(bool, sizes))
    if stages > most:
        remedy = f"only {most} of its layers have any: use {most} stages or fewer."
    else:
        ways = [
            way
            for way in ("parameters", "uniform")
            if _empty(layers, _parts(layers, stages, way)) is None
        ]
        remedy = f"use topology.partition {', '.join([*ways, 'measured'])}, or fewer stages."
    what = "parameters" if parts[empty + 1] > parts[empty] else "layers"
    raise ValueError(
        f"topology.partition {method!r} with topology.stages {stages} leaves BTS stage {empty} "
        f"without {what}; {remedy}"
    )


def _parts(layers: Sequence[nn.Module], stages: int, method: str) -> list[int]:
    if method == "uniform":
        return list(map(int, partition_uniform(len(layers), stages)))
    if method == "parameters":
        weights = [count_parameters([layer]) for layer in layers]
    else:
        names = [type(layer).__name__ for layer in layers]
        kind = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        weights = [int(kind.search(name) is not None) for name in names]
        if not any(weights):
            raise ValueError(
                f"topology.partition {method!r} matches no layer of the tail; its layers are "
                f"{', '.join(sorted(set(names)))}. Name one of them, or use parameters, uniform or "
                "measured."
            )
    return list(map(int, partition_balanced(weights, stages)))


def _empty(layers: Sequence[nn.Module], parts: Sequence[int]) -> int | None:
    """The first stage without parameters."""
    for stage, (start, stop) in enumerate(itertools.pairwise(parts)):
        if not count_parameters(layers[start:stop]):
            return stage
    return None
