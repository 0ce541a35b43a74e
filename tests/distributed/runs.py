"""Small runs that the distributed tests share: what a rank does, and the unsplit counterpart."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from csipipe import methods
from csipipe.comm.world import World
from csipipe.measure.figures import WIDTH, Figures
from csipipe.methods import roster
from csipipe.methods.centralised import Centralised
from csipipe.methods.csilocal_bts import BtsHalf
from csipipe.settings.config import (
    DataSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)

CPU = torch.device("cpu")


def small(method: str = "csilocal", **sections: Any) -> Settings:
    """A run that takes a moment: 8 angles × 8 delays, 4 UEs × 8 rows, 10 iterations.

    PyTorch's layers compute it: every rank would compile the kernels, for longer than it trains.
    """
    defaults = Settings(
        model=ModelSettings(c1=24, c2=16, angles=8, delays=8, kernels_by="torch"),
        topology=TopologySettings(ues=4, stages=2, partition="uniform"),
        data=DataSettings(train_samples=80, test_samples=20, holdout=0.1),
        train=TrainSettings(iterations=10, batch_size=8, micro_batches=4, warmup=0.2),
        run=RunSettings(timeout=20.0),
    )
    return replace(
        defaults,
        method=method,
        **{name: replace(getattr(defaults, name), **changes) for name, changes in sections.items()},
    )


def named_parameters(worker: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of a rank's worker by part, UE and layer, whatever the rank."""
    found: dict[str, torch.nn.Parameter] = {}
    worker = getattr(worker, "worker", worker)  # whose weights are averaged
    halves = getattr(worker, "halves", [worker])
    for ue in (ue for half in halves for ue in getattr(half, "ues", [])):
        for part in ("encoder", "head"):
            for name, parameter in getattr(ue, part).named_parameters():
                found[f"ue-{ue.number}.{part}.{name}"] = parameter
    replicas = [replica for half in halves for replica in getattr(half, "replicas", {}).values()]
    for replica in replicas:  # federated: a tail on every UE
        for name, parameter in replica.tail.named_parameters():
            found[f"ue-{replica.ue.number}.tail.{name}"] = parameter
    for half in (half for half in halves if isinstance(half, BtsHalf)):
        for i, layer in enumerate(half.layers, half.parts[half.role]):
            for name, parameter in layer.named_parameters():
                found[f"tail.{i}.{name}"] = parameter
    if isinstance(worker, Centralised):
        for name, parameter in worker.tail.named_parameters():
            found[f"tail.{name}"] = parameter
    return found


def follow(worker: Any, iterations: int) -> dict[str, Any]:
    """Train; first gradients, losses per UE and iteration (rank 0), final parameters, figures."""
    gradients: dict[str, Tensor] = {}
    parameters = named_parameters(worker)

    def record(*_: object) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                gradients.setdefault(name, parameter.grad.clone())

    hook = register_optimizer_step_pre_hook(record)
    losses = [worker.train_iteration(k) for k in range(iterations)]
    hook.remove()
    evaluations = [worker.evaluate(part) for part in ("holdout", "test")]
    return {
        "gradients": gradients,
        "losses": [f.loss_per_ue for f in losses if f is not None],
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
        "evaluations": [f.sums for f in evaluations if f is not None],
        "ledger": worker.exchanged().counts,
        "files": saved(worker),
    }


def saved(worker: Any) -> dict[str, dict[str, Tensor]]:
    """What a rank's worker writes: tensors by file name."""
    with tempfile.TemporaryDirectory() as folder:
        worker.save_weights(Path(folder))
        return {path.name: load_file(path) for path in Path(folder).iterdir()}


def split(world: World, settings: Settings) -> dict[str, Any]:
    """One rank of a run."""
    return splits(world, {"": settings})[""]


def splits(world: World, runs: dict[str, Settings]) -> dict[str, dict[str, Any]]:
    """One rank of several runs in one world, one after the other."""
    builders = {
        name: methods.prepare(settings, world.rank, world.size, CPU)
        for name, settings in runs.items()
    }
    world.ready("data")
    world.connect(20.0)
    results = {
        name: follow(build(world), runs[name].train.iterations) for name, build in builders.items()
    }
    world.leave()
    return results


class Rounded(torch.autograd.Function):
    """What a wire of bf16 does: to values on their way up, and to gradients on their way back."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.bfloat16().float()


class Unsplit(Centralised):
    """The model of the UEs that take part in an iteration; the others stay as they are.

    Attributes:
        without: UEs that never take part.
    """

    without: frozenset[int] = frozenset()

    def train_iteration(self, iteration: int) -> Figures:
        everyone = self.ues
        present = [ue for ue in roster.drawn(self.settings, iteration) if ue not in self.without]
        self.ues = [everyone[ue] for ue in present]
        sums = torch.zeros(len(everyone), WIDTH, dtype=torch.float64)
        sums[present] = super().train_iteration(iteration).sums
        self.ues = everyone
        return Figures(sums)


def unsplit(
    settings: Settings,
    shared: bool = False,
    crossing: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """The model without a wire, in this process; unless `shared`, with private ends (CSILocal).

    Args:
        crossing: is applied where smashed data and tail outputs would cross.
    """
    torch.set_num_threads(1)
    ues, test = methods.load(settings, range(settings.topology.ues), CPU)
    worker = Unsplit(settings, ues, test, CPU, shared)
    if crossing is not None:
        for part in (worker.tail, *(ue.encoder for ue in worker.ues)):
            part.register_forward_hook(lambda _, __, output: crossing(output))
    return follow(worker, settings.train.iterations)


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks of one world found, together."""
    return {
        "gradients": {k: v for r in results for k, v in r["gradients"].items()},
        "parameters": {k: v for r in results for k, v in r["parameters"].items()},
        "losses": results[0]["losses"],
        "evaluations": results[0]["evaluations"],
        "ledger": results[0]["ledger"],
        "files": {name: tensors for r in results for name, tensors in r["files"].items()},
    }
