"""The program on a GPU with and without the Triton kernels: times, and losses side by side."""

from __future__ import annotations

from functools import partial

import torch

from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import Run, private, relative
from csipipe.gpucheck.size import paper
from csipipe.gpucheck.timing import milliseconds

_BY = ("triton", "torch")
_WANTED = "1e-5 in fp32"


def run(step: Step) -> None:
    """The unsplit model as the program trains it, then two ranks as a user starts them."""
    for precision in ("fp32", "bf16"):
        _unsplit(step, precision)
    _split(step)


def _unsplit(step: Step, precision: str) -> None:
    losses, tests = [], []
    for by in _BY:
        arguments = paper(step) | {"model.kernels_by": by, "train.precision": precision}
        worker = private(step, arguments)
        trained = [worker.train_iteration(k).loss_per_ue for k in range(5)]
        losses.append(torch.tensor(trained, dtype=torch.float64))
        tests.append(torch.tensor(worker.evaluate("test").loss_per_ue, dtype=torch.float64))
        ms = milliseconds(partial(worker.train_iteration, 5), step.device, 3, 1)
        step.add(f"unsplit, {precision}, {by}", f"{ms:.2f} ms; {'; '.join(worker.notes)}")
        del worker
    name = f"unsplit, {precision}, triton beside torch"
    step.add(f"{name}, training", f"{relative(*losses):.1e}", _WANTED)
    step.add(f"{name}, test set", f"{relative(*tests):.1e}", _WANTED)


def _split(step: Step) -> None:
    losses = []
    for by in _BY:
        changes = {"model.kernels_by": by, "train.iterations": 5, "run.eval_every": 1}
        run = Run(step.folder / by, 2, paper(step) | changes | {"topology.stages": 1})
        losses.append(run.succeed(step.left - 2).losses)
        step.add(f"two ranks, fp32, {by}", f"{1000 * run.summary['seconds_per_iteration']:.2f} ms")
        step.show("\n".join([f"two ranks, {by}:", *run.how()]))
    step.add("two ranks, fp32, triton beside torch", f"{relative(*losses):.1e}", _WANTED)
