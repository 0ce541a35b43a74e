"""The Triton CRBlock: its numbers beside float64, its times beside PyTorch's layers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.timing import milliseconds
from csipipe.models import CRBlock
from csipipe.models.kernels import triton_crblock as fused
from csipipe.settings.config import CRNET_KERNELS

_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_SWEPT = {
    "forward_warps": (4, 16),
    "backward_warps": (4, 16),
    "weight_warps": (8,),
    "weight_chunk": (32, 128),
    "precision": ("ieee",),
}


def run(step: Step) -> None:
    """Numbers at an odd and at the real size, then times, registers and other tunings."""
    for dtype in (torch.float32, torch.bfloat16):
        sizes = ((5, 12, 10),) if step.tiny else ((5, 12, 10), (4000, 32, 32))
        for size in sizes:
            before = time.monotonic()
            worst = compare(step.device, dtype, *size)
            name = f"{str(dtype).removeprefix('torch.')}, {size[0]} × {size[1]} × {size[2]}"
            found = ", ".join(f"{part} {value:.1e}" for part, value in worst.items())
            limit = _LIMITS[dtype]
            step.add(
                f"{name}, largest ‖difference‖ / ‖value‖",
                found,
                f"≤ {limit:.0e}",
                all(value <= limit for value in worst.values()),
            )
            step.add(f"{name}, compiled and compared", f"{time.monotonic() - before:.1f} s")
    rows = 2 if step.tiny else 4000
    for dtype in (torch.float32, torch.bfloat16):
        times(step, dtype, rows)
    _registers(step)
    if not step.tiny:
        sweep(step, rows)
        twice(step, rows)


@dataclass
class Case:
    """A block, an input and a gradient at the output."""

    block: CRBlock
    x: Tensor
    dy: Tensor

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, rows: int, a: int, d: int) -> Case:
        torch.manual_seed(1)
        block = CRBlock(CRNET_KERNELS).to(device)
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.dim() == 1:  # of BatchNorm: not ones and zeros
                    parameter.add_(0.3 * torch.randn_like(parameter))
        x, dy = (torch.randn(rows, 2, a, d, device=device).to(dtype) for _ in range(2))
        return cls(block.train(), x, dy)

    def ours(self) -> dict[str, Tensor]:
        """By the fused kernels."""
        y, saved = fused.forward(self.block, self.x, True)
        dx, rest = fused.input_gradient(self.block, saved, self.dy)
        gradients = fused.weight_gradients(self.block, saved, rest)
        names = [name for name, _ in self.block.named_parameters()]
        return {
            "y": y,
            "dx": dx,
            **dict(zip(names, gradients, strict=True)),
            **_buffers(self.block),
        }

    def wanted(self) -> dict[str, Tensor]:
        """By PyTorch's layers in float64."""
        block = copy.deepcopy(self.block).double()
        x = self.x.double().requires_grad_()
        y = block(x)
        y.backward(self.dy.double())
        assert x.grad is not None
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "dx": x.grad, **gradients, **_buffers(block)}


def _buffers(block: CRBlock) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in block.named_buffers() if b.is_floating_point()}


def compare(
    device: torch.device, dtype: torch.dtype, rows: int, a: int, d: int
) -> dict[str, float]:
    """Largest relative difference of outputs, gradients and running statistics."""
    case = Case.make(device, dtype, rows, a, d)
    wanted = case.wanted()
    found = case.ours()
    worst: dict[str, float] = {}
    for name, value in wanted.items():
        part = name if name in ("y", "dx") else "running" if "running" in name else "weights"
        error = float((found[name].double() - value).norm() / value.norm())
        worst[part] = max(worst.get(part, 0.0), error if error == error else float("inf"))
    return worst


def times(step: Step, dtype: torch.dtype, rows: int) -> None:
    """ms of the fused passes and of PyTorch's own block."""
    case = Case.make(step.device, dtype, rows, 32, 32)
    _, saved = fused.forward(case.block, case.x, True)
    _, rest = fused.input_gradient(case.block, saved, case.dy)
    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: fused.forward(case.block, case.x, True),
        "dx": lambda: fused.input_gradient(case.block, saved, case.dy),
        "weights": lambda: fused.weight_gradients(case.block, saved, rest),
    }
    repeats = 1 if step.tiny else 15
    found = {name: milliseconds(way, step.device, repeats) for name, way in ways.items()}
    name = str(dtype).removeprefix("torch.")
    each = ", ".join(f"{part} {ms:.3f}" for part, ms in found.items())
    step.add(f"fused, {name}, ({rows}, 2, 32, 32), ms", f"{each}; sum {sum(found.values()):.3f}")
    x = case.x.detach().requires_grad_()

    def layers() -> None:
        with torch.autocast(step.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = case.block(x)
        y.backward(case.dy.to(y.dtype))

    ms = milliseconds(layers, step.device, 1 if step.tiny else 7)
    step.add(f"PyTorch's layers, {name}, all passes, ms", f"{ms:.3f}")
    if step.device.type == "cuda":
        _kernels(step, name, ways)


def _kernels(step: Step, name: str, ways: dict[str, Callable[[], Any]]) -> None:
    """Time of each kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            for way in ways.values():
                way()
        torch.cuda.synchronize(step.device)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    lines = [f"fused, {name}: ms per block (mean of 5)"]
    lines += [
        f"{event.self_device_time_total / 5000:>9.3f}  {event.count / 5:>5.0f} ×  {event.key[:60]}"
        for event in events[:14]
    ]
    step.findings.show("\n".join(lines))


def _registers(step: Step) -> None:
    """What the compiler gave each kernel."""
    lines = ["kernel                 registers  spilled  shared  warps"]
    modules = (fused.forward_kernels, fused.backward_kernels, fused.weight_kernels)
    for name, kernel in (pair for module in modules for pair in vars(module).items()):
        for cache in getattr(kernel, "device_caches", {}).values():
            for made in cache[0].values():
                lines.append(
                    f"{name:<22} {made.n_regs:>9} {made.n_spills:>8} {made.metadata.shared:>7} "
                    f"{made.metadata.num_warps:>6}"
                )
    step.findings.show("\n".join(dict.fromkeys(lines)))


def sweep(step: Step, rows: int) -> None:
    """The three passes with one setting changed at a time, fp32."""
    case = Case.make(step.device, torch.float32, rows, 32, 32)
    lines = ["fp32, one setting changed    forward      dx  weights"]
    for name, values in _SWEPT.items():
        usual = getattr(fused.tuning, name)
        for value in (usual, *values):
            if step.left < 8:
                break
            setattr(fused.tuning, name, value)
            try:
                _, saved = fused.forward(case.block, case.x, True)
                _, rest = fused.input_gradient(case.block, saved, case.dy)
                ms = (
                    milliseconds(lambda: fused.forward(case.block, case.x, True), step.device, 5),
                    milliseconds(
                        lambda s=saved: fused.input_gradient(case.block, s, case.dy), step.device, 5
                    ),
                    milliseconds(
                        lambda s=saved, r=rest: fused.weight_gradients(case.block, s, r),
                        step.device,
                        5,
                    ),
                )
                lines.append(f"{name:<16} {value!s:>8} {ms[0]:>10.3f} {ms[1]:>7.3f} {ms[2]:>8.3f}")
            except Exception as error:  # a tuning that doesn't fit isn't a fault of the block
                lines.append(f"{name:<16} {value!s:>8}  {type(error).__name__}: {str(error)[:60]}")
        setattr(fused.tuning, name, usual)
    step.findings.show("\n".join(lines))


def twice(step: Step, rows: int) -> None:
    """The same bits."""
    one, other = (Case.make(step.device, torch.float32, rows, 32, 32).ours() for _ in range(2))
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    found = ", ".join(differ) or "the same bits"
    step.add("fused twice", found, "the same bits", not differ)
