"""The peer to beat: the unsplit model of stock layers, eager and under torch.compile.

What a PyTorch programmer would write for the same training: ten encoders and heads, one tail, the
same micro-batches, one backward pass, fused Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from csipipe.bench import plain
from csipipe.device import autocast, set_arithmetic
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import settings
from csipipe.gpucheck.size import captured, paper
from csipipe.gpucheck.timing import milliseconds
from csipipe.measure.metrics import paper_loss
from csipipe.models.crblock import SLOPE
from csipipe.settings.config import ModelSettings, Settings


class Unsplit(nn.Module):
    """(U, B, 2, A, D) → the loss: mean over rows, sum over UEs.

    Args:
        micro_batches: pieces in which the tail sees the rows.
    """

    def __init__(self, model: ModelSettings, ues: int, micro_batches: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoder(model) for _ in range(ues))
        self.tail = nn.Sequential(*plain.build_tail(model, 0))
        self.heads = nn.ModuleList(head(model) for _ in range(ues))
        self.micro_batches = micro_batches

    def forward(self, h_UBAD: Tensor) -> Tensor:
        z_UBC = [encode(h) for encode, h in zip(self.encoders, h_UBAD, strict=True)]
        ues, rows = len(z_UBC), h_UBAD.shape[1] // self.micro_batches
        total = h_UBAD.new_zeros(())
        for first in range(0, h_UBAD.shape[1], rows):
            part = slice(first, first + rows)
            y = self.tail(torch.cat([z[part] for z in z_UBC]))
            h_hats = [decode(x) for decode, x in zip(self.heads, y.split(rows), strict=True)]
            h = h_UBAD[:, part].reshape(ues * rows, *h_UBAD.shape[2:])
            total = total + paper_loss(torch.cat(h_hats).float(), h).sum()
        return total / h_UBAD.shape[1]


def encoder(model: ModelSettings) -> nn.Sequential:
    """CsiNet's encoder of stock layers."""
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.LeakyReLU(SLOPE),
        nn.Flatten(),
        nn.Linear(model.reals, model.c1),
    )


def head(model: ModelSettings) -> nn.Sequential:
    """The decoder head of stock layers."""
    return nn.Sequential(
        nn.Linear(model.c2 or model.c1, model.reals),
        nn.Unflatten(1, model.image),
        nn.Hardsigmoid(),
    )


class Peer:
    """The peer's training; `forward` is the model or what torch.compile made of it."""

    def __init__(self, step: Step, precision: str, compiled: bool) -> None:
        self.made: Settings = settings(step.folder / "peer", paper(step))
        train, ues = self.made.train, self.made.topology.ues
        self.device, self.precision = step.device, precision
        torch.manual_seed(0)
        self.model = Unsplit(self.made.model, ues, train.micro_batches).to(step.device)
        self.forward: Callable[[Tensor], Tensor] = self.model
        if compiled:
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        on_card = step.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=train.lr, fused=True, capturable=on_card
        )
        image = self.made.model.image
        shape = (ues, train.batch_size, *image)
        self.rows = torch.rand(2 * ues * train.batch_size, *image, device=step.device)
        self.picks = torch.randint(len(self.rows), shape[:2], device=step.device)

    def iterate(self) -> None:
        """One iteration."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast("bf16" if self.precision == "bf16" else "fp32", self.device):
            loss = self.forward(self.rows[self.picks])
        torch.autograd.backward(loss)
        self.optimizer.step()


def run(step: Step) -> None:
    """Eager, compiled, and compiled in one graph."""
    for precision in ("fp32", "bf16"):
        _time(step, f"stock layers, eager, {precision}", Peer(step, precision, False))
    for precision in ("fp32", "bf16", "TF32"):
        if step.left < 45:  # to compile took an H100's host 62 s beside other work
            step.add(f"stock layers, torch.compile, {precision}", "no time was left")
            continue
        set_arithmetic(precision == "TF32")
        before = time.monotonic()
        peer = Peer(step, precision, True)
        peer.iterate()
        step.add(f"compiling, {precision}", f"{time.monotonic() - before:.0f} s")
        _time(step, f"stock layers, torch.compile, {precision}", peer)
    set_arithmetic(False)


def _time(step: Step, name: str, peer: Peer) -> None:
    ms = milliseconds(peer.iterate, step.device, repeats=7)
    step.add(name, f"{ms:.2f} ms per iteration")
    if step.device.type == "cuda":
        ms = milliseconds(captured(peer.iterate), step.device, repeats=9)
        step.add(f"{name}, whole iteration in one CUDA graph", f"{ms:.2f} ms per iteration")
