"""How far a rank's arithmetic is from what the machine can do: GFLOP/s and GB/s beside its peaks.

Work is counted, not measured: of convolutions and linear layers, in all three passes (forward,
gradient at the input, gradients of the weights), a product and a sum are two operations; of every
layer, each pass reads and writes its images once. Fused kernels move less than that. Shapes: a row
of a mini-batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.bench.candidates import Candidate
from csipipe.bench.race import Race
from csipipe.comm.topology import Topology
from csipipe.settings.config import ModelSettings

_PASSES = 3
_SIDE, _VALUES, _TIMES = 1024, 2**24, 5
_VIEWS = (nn.Flatten, nn.Unflatten)


@dataclass(frozen=True)
class Work:
    """What a row takes in training: operations, and bytes that go through memory."""

    flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def times(self, rows: int) -> Work:
        """Of several rows."""
        return Work(self.flop * rows, self.bytes * rows)


def of_layers(layers: Iterable[nn.Module], row: Tensor) -> list[Work]:
    """Work of each of some layers that follow each other, from a row (1, …) on."""
    found = []
    with models.plain_layers(), torch.no_grad():
        for layer in layers:
            seen: list[Work] = []
            leaves = [m for m in layer.modules() if not list(m.children())]
            hooks = [m.register_forward_hook(_watch(seen)) for m in leaves]
            row = layer.eval()(row)
            for hook in hooks:
                hook.remove()
            found.append(sum(seen, Work()))
    return found


def _watch(seen: list[Work]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, _VIEWS):
            return
        products = 0
        if isinstance(module, nn.Linear | nn.Conv2d):
            products = out.numel() * module.weight[0].numel()
        moved = sum(x.numel() for x in given) + out.numel()
        seen.append(Work(2.0 * products, float(out.element_size() * moved)).times(_PASSES))

    return hook


def of_rank(candidate: Candidate, parts: Sequence[int] | None, rank: int) -> Work:
    """What a rank of a candidate computes in an iteration.

    Args:
        parts: first layer of every stage, then the number of layers; None: one piece.
    """
    settings = candidate.settings
    model, ues, rows = settings.model, settings.topology.ues, settings.train.batch_size
    tail, of_ue = _of_model(model)
    if candidate.ranks == 1:
        return (sum(tail, Work()) + of_ue).times(ues * rows)
    topology = Topology.of(settings, candidate.ranks)
    found = Work()
    for role in topology.roles_of(rank):
        if topology.is_bts(role):
            assert parts is not None
            mine = tail[parts[role] : parts[role + 1]]
            found += sum(mine, Work()).times(ues * rows)
        else:
            found += of_ue.times(len(topology.ues_of(role)) * rows)
    return found


def _of_model(model: ModelSettings) -> tuple[list[Work], Work]:
    """Of every tail layer; of encoder and head together."""
    up, down = models.widths(model)
    h, z = torch.zeros(1, *model.image), torch.zeros(1, up)
    tail = of_layers(models.build_tail(model, 0), z)
    encoder = of_layers([models.build_encoder(model, 0)], h)
    head = of_layers([models.build_head(model, 0)], torch.zeros(1, down))
    return tail, sum([*encoder, *head], Work())


def peaks(threads: int) -> tuple[float, float]:
    """GFLOP/s of a product of matrices and GB/s of a copy, by some threads of this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.rand(_SIDE, _SIDE), torch.rand(_VALUES)
        product, copy = torch.empty_like(a), torch.empty_like(b)
        gflops = 2e-9 * _SIDE**3 / _fastest(lambda: torch.mm(a, a, out=product))
        return gflops, 2e-9 * b.nbytes / _fastest(lambda: copy.copy_(b))
    finally:
        torch.set_num_threads(before)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(1 + _TIMES):  # the first one faults memory in
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return min(times[1:])


def measure(race: Race) -> dict[str, dict[str, Any]]:
    """By candidate with a clock on a CPU: a rank's peaks, and what each rank reaches, by role."""
    found: dict[str, dict[str, Any]] = {}
    for candidate in race.candidates:
        turns = race.turns_of(candidate)
        on_cpu = candidate.settings.train.device == "cpu" or not torch.cuda.is_available()
        if not turns or not all(turns[0].spent) or not on_cpu:
            continue
        gflops, gbytes = peaks(candidate.threads)
        reached = {}
        for rank, role in enumerate(candidate.roles):
            work = of_rank(candidate, race.parts.get(candidate.label), rank)
            seconds = statistics.median(turn.spent[rank]["compute"] for turn in turns)
            of_one = {"gflops": 1e-9 * work.flop / seconds, "gbytes": 1e-9 * work.bytes / seconds}
            reached[role] = {"gflop": 1e-9 * work.flop, "seconds": seconds, **of_one}
        found[candidate.label] = {"peak_gflops": gflops, "peak_gbytes": gbytes, "ranks": reached}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """What `measure` found, as text; empty if nothing."""
    if not found:
        return ""
    names = ("GFLOP/s", "of peak", "GB/s", "of copy")
    lines = [f"{'while it computes':>24}" + "".join(f"  {name:>8}" for name in names)]
    for label, of_candidate in found.items():
        gflops, gbytes = of_candidate["peak_gflops"], of_candidate["peak_gbytes"]
        peak = f"{gflops:>8.1f}  {'product':>8}  {gbytes:>8.1f}  {'copy':>8}"
        lines.append(f"{label:>24}  {peak}  the machine's, with a rank's threads")
        for role, reached in of_candidate["ranks"].items():
            lines.append(
                f"{role:>24}  {reached['gflops']:>8.1f}  {reached['gflops'] / gflops:>8.0%}  "
                f"{reached['gbytes']:>8.1f}  {reached['gbytes'] / gbytes:>8.0%}"
            )
    lines.append(f"{'':>24}  GB/s: what separate layers would move; fused kernels move less")
    return "\n".join(lines)
