"""Small runs on the device beside the same on the CPU, themselves, and the unsplit model.

Adam divides by the size of a gradient, so that a rounding error of one of these small runs grows
tenfold in some five iterations. How much of a difference that explains is measured, not guessed:
the unsplit model is trained a second time from weights that are off by half a unit in the last
place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from csipipe.files import shipped
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import Run, private, relative, same_bits, settings, start
from csipipe.models import widths

ITERATIONS = 20
TOLERANCE = 1e-5


def small(step: Step) -> dict[str, Any]:
    """Arguments of a run that takes seconds, with the real layers: 4 UEs × 32 rows of 32 × 32."""
    return {
        "train.device": step.device.type,
        "train.iterations": 4 if step.tiny else ITERATIONS,
        "train.batch_size": 8 if step.tiny else 32,
        "train.micro_batches": 4,
        "train.threads": 1 if step.tiny else 2,  # other steps want cores too
        "model.c1": 64,
        "model.c2": 32,
        "data.train_samples": 320,
        "data.test_samples": 32,
        "data.holdout": 0,
        "run.eval_every": 1,
        "run.save_every": 1000,
        "run.timeout": 30,
    }


def centralised(step: Step) -> None:
    """The unsplit model through the program: on the CPU, and twice on the device."""
    arguments = small(step) | {"method": "centralised"}
    runs = {
        name: start(step, name, 1, arguments | {"train.device": device})
        for name, device in (
            ("cpu", "cpu"),
            ("first", step.device.type),
            ("second", step.device.type),
        )
    }
    for run in runs.values():
        run.succeed(step.left - 2)
    cpu, first, second = runs.values()
    _compare(step, "the device beside the CPU", first.losses, cpu.losses, 1e-3, 1e-3)
    differ = same_bits(first.weights, second.weights)
    step.add("twice on the device", differ or "the same bits", "the same bits", not differ)


def split(step: Step) -> None:
    """One stage and two, in fp32, bf16 and with ZeRO-1, all ranks or one on one device."""
    zero = shipped("ds_configs/zero1.json")
    graph = {"train.cuda_graph": "auto" if step.device.type == "cpu" else "always"}
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "one-stage": (3, {"topology.stages": 1}),
        "together": (1, {"topology.placement": "together", **graph}),
        "two-stages": (4, {"topology.stages": 2}),
        "zero1": (4, {"topology.stages": 2, "train.deepspeed": zero}),
        "bf16": (4, {"topology.stages": 2, "train.precision": "bf16"}),
    }
    runs = {
        name: start(step, name, ranks, small(step) | changes)
        for name, (ranks, changes) in cases.items()
    }
    wanted, nudged = (unsplit(step, small(step) | {"topology.stages": 1}, n) for n in (False, True))
    grown = relative(nudged, wanted)
    step.add("the unsplit model, its weights off by half a unit in the last place", f"{grown:.1e}")
    for name, run in runs.items():
        try:
            run.succeed(step.left - 2)
        except (RuntimeError, TimeoutError) as error:
            step.add(name, "failed", "ends well", False)
            step.show(str(error))
    done = {name: run for name, run in runs.items() if run.process.poll() == 0}
    for name, run in done.items():
        early, late = (TOLERANCE, max(TOLERANCE, grown)) if name != "bf16" else (3e-2, 3e-2)
        _compare(step, f"{name} beside the unsplit model", run.losses, wanted, early, late)
    for name in ("two-stages", "together"):
        if done.keys() >= {"one-stage", name}:
            differ = same_bits(done["one-stage"].weights, done[name].weights)
            found = differ or "the same bits"
            step.add(f"one-stage and {name}", found, "the same bits", not differ)
    if "two-stages" in done:
        _ledger(step, done["two-stages"])


def _ledger(step: Step, run: Run) -> None:
    """What crossed, by both ends' count, beside the paper's formula."""
    made = settings(run.folder, run.arguments)
    rows = made.train.iterations * made.train.batch_size * made.topology.ues
    scalars = rows * sum(widths(made.model))
    exchanged = run.summary["exchanged"]
    want = {
        "scalars": {"up": scalars, "down": scalars},
        "bytes": {"up": 4 * scalars, "down": 4 * scalars},
    }
    step.add("ledger", f"{exchanged['scalars']} scalars", f"{scalars} each way", exchanged == want)


def unsplit(step: Step, arguments: dict[str, Any], nudge: bool = False) -> Tensor:
    """(evaluations, UEs) test losses of the unsplit model with private ends, on the device.

    Args:
        nudge: begin with weights that are off by up to half a unit in the last place.
    """
    worker = private(step, arguments)
    if nudge:
        for part in (worker.tail, *(p for ue in worker.ues for p in (ue.encoder, ue.head))):
            _nudge(part)
    losses = []
    for iteration in range(worker.settings.train.iterations):
        worker.train_iteration(iteration)
        losses.append(worker.evaluate("test").loss_per_ue)
    return torch.tensor(losses, dtype=torch.float64)


def _nudge(part: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in part.parameters():
            half = torch.rand(weight.shape, generator=generator) - 0.5
            weight.mul_(1 + torch.finfo(weight.dtype).eps * half.to(weight.device))


def _compare(
    step: Step, what: str, found: Tensor, wanted: Tensor, early: float, late: float
) -> None:
    """Losses of the first few iterations, and of all, within `early` and `late`."""
    for name, count, limit in (("5 iterations", 5, early), (f"all {len(wanted)}", None, late)):
        distance = relative(found[:count], wanted[:count])
        step.add(f"{what}, {name}", f"{distance:.1e}", f"≤ {limit:.1e}", distance <= limit)
