"""The paper's size: 10 UEs × 800 rows, c = 256, M = 2, in ms per iteration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csipipe import models
from csipipe.device import autocast, synchronize
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import Run, private
from csipipe.gpucheck.timing import milliseconds
from csipipe.measure.metrics import paper_loss
from csipipe.methods.centralised import Centralised

_PROFILED = 20


def paper(step: Step) -> dict[str, Any]:
    """Arguments of the paper's size on generated channels; few rows, few iterations."""
    ues, rows = (3, 8) if step.tiny else (10, 800)
    arguments: dict[str, Any] = {
        "train.device": step.device.type,
        "topology.ues": ues,
        "train.batch_size": rows,
        "train.micro_batches": 2,
        "train.lr": 8e-5,
        "train.lr_schedule": "constant",
        "model.c1": 16 if step.tiny else 256,
        "model.c2": 16 if step.tiny else 256,
        "data.train_samples": 2 * ues * rows,
        "data.test_samples": ues,
        "data.holdout": 0,
        "train.iterations": 12,
        "run.eval_every": 12,
        "run.save_every": 1000,
    }
    return arguments | ({"train.threads": 1} if step.tiny else {})


def program(step: Step) -> None:
    """The program as it is: all roles in one process, and each on a rank of its own."""
    cases: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("together", 1, 1, {}),
        ("together", 1, 1, {"train.tf32": "true"}),
        ("together", 1, 1, {"train.precision": "bf16"}),
        ("together", 1, 1, {"train.cuda_graph": "never"}),
        ("apart", 2, 4, {}),
    )
    for placement, stages, ranks, changes in cases:
        if step.left < 20:
            break
        words = [f"{key.removeprefix('train.')} {value}" for key, value in changes.items()]
        name = ", ".join([placement, f"{stages} stage(s)", f"{ranks} rank(s)", *words])
        run = Run(
            step.folder / name.replace(" ", "-").replace(",", ""),
            ranks,
            paper(step) | {"topology.placement": placement, "topology.stages": stages} | changes,
        )
        most = 0
        while run.process.poll() is None and step.left > 3:
            if step.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(step.device)
                most = max(most, total - free)
            time.sleep(0.1)
        run.succeed(1)
        ms = 1000 * run.summary["seconds_per_iteration"]
        step.add(
            name,
            f"{ms:.1f} ms per iteration; {most / 2**30:.1f} GiB of the card",
        )
        step.show("\n".join([f"{name}:", *run.how()]))


def unsplit(step: Step) -> None:
    """The unsplit model with csipipe's layers: eager with its checks, bare, and as a graph."""
    for precision in ("fp32", "bf16"):
        changes = {"train.iterations": 1000, "train.precision": precision}
        worker = private(step, paper(step) | changes)
        step.add(f"unsplit, eager, {precision}", f"{_ms(worker, step):.2f} ms per iteration")
        if precision == "fp32":
            _profile(step, worker)
        _graph(step, precision, worker)


def _ms(worker: Centralised, step: Step) -> float:
    for k in range(2):
        worker.train_iteration(k)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
    return milliseconds(lambda: worker.train_iteration(2), step.device, repeats=5, warm=1)


def _graph(step: Step, name: str, worker: Centralised) -> None:
    """One iteration without checks and figures, eager and as one CUDA graph."""
    bare = Bare(worker)
    ms = milliseconds(bare.iterate, step.device, repeats=5, warm=1)
    peak = _peak(step)
    step.add(f"unsplit, bare, {name}", f"{ms:.2f} ms per iteration{peak}")
    if step.device.type == "cpu":
        return
    replay = captured(bare.iterate)
    ms = milliseconds(replay, step.device, repeats=7, warm=1)
    step.add(f"unsplit, CUDA graph, {name}", f"{ms:.2f} ms per iteration{_peak(step)}")
    before = bare.loss.clone()
    for _ in range(5):
        replay()
    step.add(
        f"loss after 5 more replays, {name}",
        f"{float(before):.4e} → {float(bare.loss):.4e}",
        "falls",
        bool(bare.loss < before),
    )


def captured(iterate: Callable[[], None]) -> Callable[[], None]:
    """`iterate` as one graph; its warm-up runs on a side stream, as PyTorch asks."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            iterate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    return graph.replay


class Bare:
    """What an iteration computes, and nothing else: draw, passes, Adam; no figures, no checks.

    Works on the worker's weights, with optimisers of its own that a graph can hold.
    """

    def __init__(self, worker: Centralised) -> None:
        self.train, self.device = worker.settings.train, worker.device
        self.ues = ues = worker.ues
        self.tail = worker.tail.train()
        self.pending = worker.pending
        for ue in ues:
            ue.train(True)
        parts = [p for ue in ues for m in (ue.encoder, ue.head) for p in m.parameters()]
        self.optimizer = torch.optim.Adam(
            [*self.tail.parameters(), *parts],
            lr=self.train.lr,
            betas=self.train.betas,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        rows = self.train.batch_size
        self.picks = torch.stack(
            [torch.randint(len(ue.rows), (rows,), device=self.device) for ue in ues]
        )
        self.loss = torch.zeros((), device=self.device)

    def iterate(self) -> None:
        """One iteration on the rows that `picks` names."""
        self.optimizer.zero_grad(set_to_none=True)
        train = self.train
        rows = train.batch_size // train.micro_batches
        h_UBAD = [ue.rows[picks] for ue, picks in zip(self.ues, self.picks, strict=True)]
        total = torch.zeros((), device=self.device)
        with autocast(train.precision, self.device):
            z_UBC = [ue.encoder(h) for ue, h in zip(self.ues, h_UBAD, strict=True)]
        leaves = [z.detach().requires_grad_() for z in z_UBC]
        for first in range(0, train.batch_size, rows):
            part = slice(first, first + rows)
            with autocast(train.precision, self.device):
                y = self.tail(torch.cat([z[part] for z in leaves]))
                h_hats = [ue.head(x) for ue, x in zip(self.ues, y.split(rows), strict=True)]
            loss = paper_loss(torch.cat(h_hats).float(), torch.cat([h[part] for h in h_UBAD]))
            objective = loss.sum() / train.batch_size
            torch.autograd.backward(objective)
            total = total + objective.detach()
        models.accumulate(models.joined(self.pending))
        self.pending.clear()
        torch.autograd.backward(z_UBC, [_gradient(z) for z in leaves])
        self.optimizer.step()
        self.loss.copy_(total)


def _gradient(z: Tensor) -> Tensor:
    assert z.grad is not None
    return z.grad


def _peak(step: Step) -> str:
    if step.device.type == "cpu":
        return ""
    return f"; peak {torch.cuda.max_memory_allocated(step.device) / 2**30:.1f} GiB"


def _profile(step: Step, worker: Centralised) -> None:
    """The longest kernels of one iteration, eager."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        worker.train_iteration(3)
        synchronize(step.device)
    events = profile.key_averages()
    if step.device.type == "cuda":
        events = [e for e in events if e.device_type.name == "CUDA"]
    events = sorted(events, key=lambda event: -getattr(event, key))
    whole = sum(getattr(event, key) for event in events)
    count = sum(event.count for event in events)
    lines = [f"one iteration, eager, fp32: {count} kernels, {whole / 1000:.2f} ms", ""]
    for event in events[:_PROFILED]:
        ms = getattr(event, key) / 1000
        lines.append(f"{ms:>9.3f} ms  {event.count:>5} ×  {event.key[:110]}")
    step.show("\n".join(lines))
