"""What the card reaches, and what PyTorch's layers reach at the CRBlock's size.

Rows B, channels C of an image of A angles × D delays. Times are medians of single calls, in ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from csipipe.device import set_arithmetic
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.loopback import rates
from csipipe.gpucheck.timing import milliseconds

CONVOLUTIONS = (
    (2, 7, (3, 3)),
    (7, 7, (1, 9)),
    (7, 7, (9, 1)),
    (2, 7, (1, 5)),
    (7, 7, (5, 1)),
    (14, 2, (1, 1)),
    (2, 2, (3, 3)),
)
"""(inputs, outputs, kernel) of the tail's convolutions."""


@dataclass(frozen=True)
class Mode:
    """How a layer is computed."""

    name: str
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    last: bool = False
    deterministic: bool = True

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format


MODES = (
    Mode("fp32"),
    Mode("fp32, any order", deterministic=False),
    Mode("fp32 NHWC", last=True),
    Mode("TF32", tf32=True),
    Mode("TF32 NHWC", tf32=True, last=True),
    Mode("bf16", torch.bfloat16),
    Mode("bf16 NHWC", torch.bfloat16, last=True),
)


def run(step: Step) -> None:
    """Ceilings first, then BatchNorm, convolutions, products and the way to the host."""
    torch.manual_seed(0)
    ceilings(step)
    batch_norm(step)
    convolutions(step)
    products(step)
    rates(step)


def ceilings(step: Step) -> None:
    """Copy rate, products, launches."""
    device, size = step.device, 2**16 if step.tiny else 2**28
    x, y = torch.randn(size, device=device), torch.empty(size, device=device)
    ms = milliseconds(lambda: y.copy_(x), device)
    step.add("copy on the device, read and written", f"{8 * size / ms / 1e9:.2f} TB/s")
    ms = milliseconds(lambda: x.sum(), device)
    step.add("sum of 2²⁸ fp32, read", f"{4 * size / ms / 1e9:.2f} TB/s")
    n = 64 if step.tiny else 8192
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        set_arithmetic(tf32)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        ms = milliseconds(partial(torch.matmul, a, b), device, repeats=5)
        step.add(f"product {n}³ {name}", f"{2 * n**3 / ms / 1e9:.1f} TFLOP/s")
    set_arithmetic(False)
    small = torch.zeros(32, device=device)

    def many() -> None:
        for _ in range(200):
            small.add_(1.0)

    step.add("a launch, eager", f"{5 * milliseconds(many, device):.2f} µs")
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        step.add("a launch in a graph", f"{5 * milliseconds(graph.replay, device):.2f} µs")


def batch_norm(step: Step) -> None:
    """BatchNorm over 7 channels: PyTorch's ways, and statistics in two stages."""
    lines = ["BatchNorm, ms            forward   forward + backward"]
    rows = 8 if step.tiny else 4000
    for name, dtype, last, cudnn in (
        ("fp32, cuDNN allowed", torch.float32, False, True),
        ("fp32, native", torch.float32, False, False),
        ("fp32 NHWC", torch.float32, True, True),
        ("bf16", torch.bfloat16, False, True),
        ("bf16 NHWC", torch.bfloat16, True, True),
    ):
        form = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(rows, 7, 32, 32, device=step.device, dtype=dtype)
        x = x.contiguous(memory_format=form).requires_grad_()
        layer = torch.nn.BatchNorm2d(7).to(step.device)
        gradient = torch.randn_like(x)
        with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False, deterministic=True):
            forward = milliseconds(partial(layer, x), step.device)

            def both(x: Tensor = x, layer: torch.nn.Module = layer, g: Tensor = gradient) -> None:
                x.grad = None
                layer(x).backward(g)

            lines.append(f"{name:<22} {forward:>9.3f} {milliseconds(both, step.device):>20.3f}")
    x = torch.randn(rows, 7, 32, 32, device=step.device)
    scale, bias = (torch.ones(1, 7, 1, 1, device=step.device) for _ in range(2))
    for name, way in (
        ("var_mean over (0, 2, 3)", lambda: torch.var_mean(x, (0, 2, 3), correction=0)),
        ("var_mean in two stages", lambda: two_stages(x)),
        ("sums in two stages", lambda: (x.sum((2, 3)).sum(0), (x * x).sum((2, 3)).sum(0))),
        ("only scaling and adding", lambda: torch.addcmul(bias, x, scale)),
    ):
        lines.append(f"{name:<24} {milliseconds(way, step.device):>7.3f}")
    one = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    for found, wanted in zip(two_stages(x), one, strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6), (found, wanted)
    step.show("\n".join(lines))


def two_stages(x: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, mean) per channel, from those of each image: (B, C, A, D) → (C,) twice."""
    var_BC, mean_BC = torch.var_mean(x, (2, 3), correction=0)
    outer, mean = torch.var_mean(mean_BC, 0, correction=0)
    return var_BC.mean(0) + outer, mean


def convolutions(step: Step) -> None:
    """Forward pass and the two gradients of each of the tail's convolutions."""
    rows = 8 if step.tiny else 4000
    lines = ["convolution, ms" + " " * 5 + "".join(f"{mode.name:>26}" for mode in MODES)]
    lines.append(" " * 20 + "   forward      dx      dW" * len(MODES))
    for inputs, outputs, kernel in CONVOLUTIONS:
        name = f"{inputs}→{outputs}, {kernel[0]}×{kernel[1]}"
        cells = []
        for mode in MODES:
            if step.left < 12:
                cells.append(" " * 26)
                continue
            times = convolution(step.device, rows, inputs, outputs, kernel, mode)
            cells.append("".join(f"{t:>{w}.3f}" for t, w in zip(times, (10, 8, 8), strict=True)))
        lines.append(f"{name:<20}" + "".join(cells))
    step.show("\n".join(lines))


def convolution(
    device: torch.device,
    rows: int,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    mode: Mode,
) -> list[float]:
    """ms of forward pass, gradient at the input, gradient of the weights."""
    padding = (kernel[0] // 2, kernel[1] // 2)

    def tensor(channels: int) -> Tensor:
        t = torch.randn(rows, channels, 32, 32, device=device, dtype=mode.dtype)
        return t.contiguous(memory_format=mode.format)

    x, g = tensor(inputs), tensor(outputs)
    w = torch.randn(outputs, inputs, *kernel, device=device, dtype=mode.dtype)
    w = w.contiguous(memory_format=mode.format)

    def back(wanted: tuple[bool, bool, bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            g, x, w, None, [1, 1], padding, [1, 1], False, [0, 0], 1, wanted
        )

    with torch.backends.cudnn.flags(
        enabled=True, allow_tf32=mode.tf32, deterministic=mode.deterministic, benchmark=False
    ):
        ways = (
            lambda: functional.conv2d(x, w, padding=padding),
            back((True, False, False)),
            back((False, True, False)),
        )
        return [milliseconds(way, device, repeats=5, warm=2) for way in ways]


def products(step: Step) -> None:
    """The linear layers: the tail's over a micro-batch, ten heads at once and one by one."""
    lines = ["linear layers, ms            fp32      TF32      bf16"]
    ues, rows, wide, narrow = (2, 4, 32, 8) if step.tiny else (10, 400, 2048, 256)
    shapes = {
        f"({ues * rows}, {narrow})·({narrow}, {wide})": ((ues * rows, narrow), (narrow, wide)),
        f"({ues * rows}, {wide})·({wide}, {narrow})": ((ues * rows, wide), (wide, narrow)),
        f"({narrow}, {ues * rows})·({ues * rows}, {wide})": (
            (narrow, ues * rows),
            (ues * rows, wide),
        ),
        f"one of {ues}: ({rows}, {narrow})·({narrow}, {wide})": ((rows, narrow), (narrow, wide)),
        f"{ues} × ({rows}, {narrow})·({narrow}, {wide})": (
            (ues, rows, narrow),
            (ues, narrow, wide),
        ),
    }
    for name, (one, other) in shapes.items():
        cells = []
        for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            set_arithmetic(tf32)
            a = torch.randn(*one, device=step.device, dtype=dtype)
            b = torch.randn(*other, device=step.device, dtype=dtype)
            cells.append(f"{milliseconds(partial(torch.matmul, a, b), step.device):>10.3f}")
        lines.append(f"{name:<28}" + "".join(cells))
    set_arithmetic(False)
    step.show("\n".join(lines))
