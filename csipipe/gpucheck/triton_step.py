"""CRBlock's Triton kernels on a GPU: numbers against float64, times of kernels, block and iteration.

    python csipipe/gpucheck/triton_step.py --seconds 90 --out triton.json

Each finding is written at once, so that nothing is lost when the time is up. On a CPU it is only
rehearsed: TRITON_INTERPRET=1 … --device cpu.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from csipipe.models.kernels.triton_iteration import Iteration
from torch import Tensor, nn

from csipipe.measure.metrics import paper_loss
from csipipe.models import build_encoder, build_head, build_tail
from csipipe.models.crblock import CRBlock
from csipipe.models.kernels import triton_crblock as fused
from csipipe.settings.config import ModelSettings

CRNET = (((3, 3), (1, 9), (9, 1)), ((1, 5), (5, 1)))


class Report:
    """Findings, printed and written as they come."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.end, self.found = path, time.monotonic() + seconds, {}
        self.begun = time.monotonic()

    def add(self, name: str, **values: Any) -> None:
        self.found[name] = values
        shown = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in values.items()
            if k != "all"
        )
        print(f"[{time.monotonic() - self.begun:5.1f}] {name}: {shown}", flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1))

    def left(self) -> float:
        return self.end - time.monotonic()

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        if self.left() < 0:
            self.add(name, skipped="no time left")
            return
        try:
            run()
        except Exception as error:  # the next check may still tell something
            traceback.print_exc()
            self.add(name + " failed", error=str(error)[-600:])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def some_block(device: torch.device) -> CRBlock:
    block = CRBlock(CRNET)
    with torch.no_grad():
        for p in block.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return block.to(device)


def all_at_once(block: CRBlock, x: Tensor, dy: Tensor, training: bool = True) -> list[Tensor]:
    """Output, gradient at the input, gradients of the parameters."""
    y, saved = fused.forward(block, x, training)
    dx, rest = fused.input_gradient(block, saved, dy)
    return [y, dx, *fused.weight_gradients(block, saved, rest)]


def by_torch(block: CRBlock, x: Tensor, dy: Tensor, bf16: bool = False) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = block(x)
    found = torch.autograd.grad(y, [x, *block.parameters()], dy.to(y.dtype))
    return [y.detach(), *found]


def numbers(report: Report, device: torch.device, rows: int, size: int) -> None:
    """Against float64 by norm; the same bits twice."""
    torch.manual_seed(1)
    for training in (True, False) if device.type == "cpu" else (True,):
        block = some_block(device).train(training)
        x = torch.randn(rows, 2, size, size, device=device)
        dy = torch.randn_like(x)
        exact = copy.deepcopy(block).double()
        wanted = by_torch(exact, x.double(), dy.double())
        own = by_torch(copy.deepcopy(block), x, dy)
        for dtype in (torch.float32, torch.bfloat16):
            copied = copy.deepcopy(block)
            got = all_at_once(copied, x.to(dtype), dy.to(dtype), training)
            again = all_at_once(copied, x.to(dtype), dy.to(dtype), training)
            names = ["y", "dx", *(n for n, _ in block.named_parameters())]
            other = own if dtype == torch.float32 else by_torch(copy.deepcopy(block), x, dy, True)
            errors = {
                n: [distance(g, w), distance(o, w)]
                for n, g, w, o in zip(names, got, wanted, other, strict=True)
            }
            worst = max(errors, key=lambda n: errors[n][0] if n.endswith("0.weight") else 0)
            buffers = (
                max(
                    distance(a, b)
                    for a, b in zip(copied.buffers(), exact.buffers(), strict=True)
                    if a.is_floating_point()
                )
                if not training
                else 0.0
            )
            report.add(
                f"numbers {'training' if training else 'evaluation'} {dtype}",
                y=errors["y"],
                dx=errors["dx"],
                worst_dw=[worst, *errors[worst]],
                same_bits=all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
                buffers=buffers,
                all=errors,
            )


def median_ms(run: Callable[[int], Any], device: torch.device, repeats: int = 15) -> float:
    for i in range(3):
        run(i)
    if device.type != "cuda":
        begun = time.perf_counter()
        run(0)
        return (time.perf_counter() - begun) * 1e3
    pairs = []
    for i in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run(i)
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def launches(run: Callable[[int], Any], repeats: int = 6) -> list[tuple[str, float]]:
    """Name and median time in µs of each kernel that one run launches, in order."""
    run(0)
    run(1)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(repeats):
            run(i)
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    one = len(events) // repeats
    assert one * repeats == len(events), f"{len(events)} kernels in {repeats} runs"
    return [
        (
            events[k].name,
            statistics.median(events[k + one * r].time_range.elapsed_us() for r in range(repeats)),
        )
        for k in range(one)
    ]


def graphed(run: Callable[[int], Any], sets: int) -> list[torch.cuda.CUDAGraph]:
    """One graph per input set, as launches from Python may take longer than the kernels."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(sets):
            run(i)
    torch.cuda.synchronize()
    graphs = []
    pool = None
    for i in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run(i)
        pool = graph.pool()
        graphs.append(graph)
    return graphs


def settings(dtype: torch.dtype) -> Iterator[fused.Tuning]:
    """What to try, the likeliest first."""
    base = fused.Tuning()
    yield base
    for warps, registers, programs in (
        (8, None, 132),
        (8, 128, 264),
        (8, 128, 528),
        (4, 168, 396),
        (4, 168, 792),
        (4, None, 264),
        (4, None, 528),
    ):
        if dtype == torch.float32 or registers == 128:
            yield dataclasses.replace(
                base, weight_warps=warps, weight_registers=registers, weight_programs=programs
            )


OTHERS = (
    "finish_forward",
    "join_forward",
    "output_forward",
    "output_backward",
    "finish_backward",
    "join_backward",
    "finish_weights",
)
DTYPES = (torch.float32, torch.bfloat16)


def jobs() -> list[tuple[int, int, str, int]]:
    """Number of a type, of a setting, a kernel that it is the first to need, and which launch."""
    found = []
    for t, dtype in enumerate(DTYPES):
        seen: set[tuple[Any, ...]] = set()
        for i, s in enumerate(settings(dtype)):
            for kind, key in (
                ("conv_weights", (s.weight_warps, s.weight_registers)),
                ("conv_forward", (s.forward_warps,)),
                ("conv_backward", (s.backward_warps,)),
                ("small", (0,)),
                *((other, ()) for other in OTHERS),
            ):
                if (kind, key) not in seen:
                    seen.add((kind, key))
                    found += [
                        (t, i, kind, n)
                        for n in range(1 if key == () else 7 if kind == "small" else 5)
                    ]
    return found


def compile_job(job: tuple[int, int, str, int, int]) -> str:
    """Compile some kernels into Triton's cache without running any; what went wrong, if anything."""
    t, i, kind, number, size = job
    launched = iter(range(99))
    run = triton.runtime.JITFunction.run

    def only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = self.fn.__name__
        small = kwargs.get("IN") == kwargs.get("OUT") == 2 or name == "activate"
        wanted = small if kind == "small" else name == kind
        if wanted and (kind in OTHERS or next(launched) == number):
            return run(self, *args, grid=grid, warmup=True, **kwargs)
        return None

    triton.runtime.JITFunction.run = only
    try:
        fused.tuning = list(settings(DTYPES[t]))[i]
        x = torch.zeros(16, 2, size, size, device="cuda", dtype=DTYPES[t])
        if kind == "small":
            held, picks = torch.zeros(2, 8, 2, 32, 32), torch.zeros(2, 8, dtype=torch.int64)
            device = x.device
            one = Iteration(*parts_of(2, device), held.to(device), picks.to(device), 1, DTYPES[t])
            with torch.no_grad():
                one.gradients()
        else:
            all_at_once(some_block(x.device), x, x)
    except Exception as error:
        return f"{job}: {str(error)[-300:]}"
    finally:
        triton.runtime.JITFunction.run = run
    return ""


def compile_all(report: Report, size: int) -> None:
    """With all processors: the kernels' compilation takes longer than their runs."""
    begun = time.monotonic()
    listed = [(*job, size) for job in jobs()]
    workers = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        errors = [e for e in pool.imap_unordered(compile_job, listed) if e]
    report.add("compiled", jobs=len(listed), seconds=time.monotonic() - begun, errors=errors)


def kernels(
    report: Report, device: torch.device, rows: int, size: int, dtype: torch.dtype, until: float
) -> None:
    block = some_block(device)
    sets = [
        (
            torch.randn(rows, 2, size, size, device=device, dtype=dtype),
            torch.randn(rows, 2, size, size, device=device, dtype=dtype),
        )
        for _ in range(2)
    ]
    for i, setting in enumerate(settings(dtype)):
        if report.left() < until:
            report.add(f"settings {dtype} from {i} on", skipped="no time left")
            break
        fused.tuning = setting
        what = {
            k: v for k, v in dataclasses.asdict(setting).items() if v != getattr(fused.Tuning(), k)
        }

        def try_one() -> None:
            found = launches(lambda i: all_at_once(block, *sets[i % 2]))
            of_kind: dict[str, float] = {}
            for name, us in found:
                of_kind[name] = of_kind.get(name, 0) + us
            report.add(
                f"kernels {dtype} {rows} {what}",
                total_us=sum(us for _, us in found),
                of_kind={k: round(v) for k, v in of_kind.items()},
                convs=[(n, round(us)) for n, us in found if n.startswith("conv")],
            )

        report.attempt(f"kernels {dtype} {what}", try_one)
    fused.tuning = fused.Tuning()


def block_times(report: Report, device: torch.device, rows: int, size: int) -> None:
    """Forward and backward pass of one block, fused and by PyTorch's layers."""
    block = some_block(device)
    for dtype in (torch.float32, torch.bfloat16):
        sets = [
            (
                torch.randn(rows, 2, size, size, device=device, dtype=dtype),
                torch.randn(rows, 2, size, size, device=device, dtype=dtype),
            )
            for _ in range(2)
        ]
        floor = 226 * rows * size * size * sets[0][0].element_size() / 3e12 * 1e3
        values: dict[str, float] = {"floor_ms": floor}
        values["fused_eager_ms"] = median_ms(lambda i: all_at_once(block, *sets[i % 2]), device)
        if device.type == "cuda":
            graphs = graphed(lambda i: all_at_once(block, *sets[i]), 2)
            values["fused_graph_ms"] = median_ms(lambda i: graphs[i % 2].replay(), device)
            del graphs
        bf16 = dtype == torch.bfloat16
        values["torch_ms"] = median_ms(lambda i: by_torch(block, *sets[i % 2], bf16), device, 3)
        report.add(f"block {rows} {dtype}", **values)
        del sets
        if device.type == "cuda":
            torch.cuda.empty_cache()


def other_parts(report: Report, device: torch.device, ues: int, rows: int, parts: int) -> None:
    """Times in ms of an iteration's other parts, by PyTorch, stacked over UEs; `parts` micro-batches."""
    reals, code = 2048, 256
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.randn(ues, rows, reals, device=device, dtype=dtype)
        narrow = torch.randn(ues, rows, code, device=device, dtype=dtype)
        weight = torch.randn(ues, code, reals, device=device, dtype=dtype)
        some = wide.flatten(0, 1)[: ues * rows // parts]
        few = narrow.flatten(0, 1)[: ues * rows // parts]
        values = {
            "down": median_ms(lambda i: torch.bmm(wide, weight.mT), device),
            "up": median_ms(lambda i: torch.bmm(narrow, weight), device),
            "weights": median_ms(lambda i: torch.bmm(narrow.mT, wide), device),
            "weights_turned": median_ms(lambda i: torch.bmm(wide.mT, narrow), device),
            "tail_down": parts * median_ms(lambda i: some @ weight[0].mT, device),
            "tail_up": parts * median_ms(lambda i: few @ weight[0], device),
            "tail_weights": parts * median_ms(lambda i: few.mT @ some, device),
        }
        report.add(f"products {ues} x {rows} {dtype}", **values)
    weights = [
        torch.randn(ues, 2 * code, reals, device=device).requires_grad_(),
        torch.randn(2 * code, reals, device=device).requires_grad_(),
    ]
    for w in weights:
        w.grad = torch.randn_like(w)
    adam = torch.optim.Adam(weights, fused=True, capturable=True)
    held = torch.randn(ues * 10000, reals, device=device)
    picks = torch.randint(len(held), (ues * rows,), device=device)
    x = torch.randn(ues * rows, reals, device=device)
    report.add(
        "others",
        adam=median_ms(lambda i: adam.step(), device),
        draw=median_ms(lambda i: held[picks], device),
        draw_index_select=median_ms(lambda i: held.index_select(0, picks), device),
        hardsigmoid=median_ms(lambda i: torch.nn.functional.hardsigmoid(x), device),
        squares=median_ms(lambda i: (x - x).square_().sum(1), device),
    )


def parts_of(ues: int, device: torch.device) -> tuple[list[Any], list[Any], nn.Sequential]:
    """Encoders, heads and tail of the paper's size, every UE's weights its own."""
    model = ModelSettings()
    encoders = [build_encoder(model, u).to(device) for u in range(ues)]
    heads = [build_head(model, u).to(device) for u in range(ues)]
    return encoders, heads, nn.Sequential(*build_tail(model, 0)).to(device)


def unsplit(
    parts: tuple[list[Any], list[Any], nn.Sequential], h: Tensor, micro_batches: int
) -> tuple[Tensor, list[Tensor]]:
    """Losses (U, B), and gradients in `Iteration.parameters`' order, by PyTorch's layers."""
    encoders, heads, tail = parts
    rows = h.shape[1] // micro_batches
    z = torch.stack([e(x) for e, x in zip(encoders, h, strict=True)])
    losses = []
    for m in range(micro_batches):
        own = slice(m * rows, (m + 1) * rows)
        y = tail(z[:, own].flatten(0, 1)).view(len(h), rows, -1)
        found = torch.stack([head(v) for head, v in zip(heads, y, strict=True)])
        losses.append(paper_loss(found.flatten(0, 1), h[:, own].flatten(0, 1)).view(len(h), rows))
    loss = torch.cat(losses, 1)
    (loss.sum() / h.shape[1]).backward()
    every = [
        [getattr(p[k], n).grad for p in some]
        for some, k, n in (
            (encoders, 0, "weight"),
            (encoders, 1, "weight"),
            (encoders, 1, "bias"),
            (encoders, 4, "weight"),
            (encoders, 4, "bias"),
            (heads, 0, "weight"),
            (heads, 0, "bias"),
        )
    ]
    return loss.detach(), [*(torch.stack(v) for v in every), *(p.grad for p in tail.parameters())]


def iteration_numbers(report: Report, device: torch.device) -> None:
    """Losses and gradients of one whole iteration against float64."""
    torch.manual_seed(2)
    ues, batch, micro_batches = 3, 16, 2
    held = torch.rand(ues, 50, 2, 32, 32, device=device)
    picks = torch.randint(50, (ues, batch), device=device)
    h = torch.stack([rows[p] for rows, p in zip(held, picks, strict=True)])
    parts = parts_of(ues, device)
    exact, own = copy.deepcopy(parts), copy.deepcopy(parts)
    for part in (*exact[0], *exact[1], exact[2]):
        part.double()
    wanted, wanted_gradients = unsplit(exact, h.double(), micro_batches)
    loss, gradients = unsplit(own, h, micro_batches)
    for dtype in DTYPES:
        one = Iteration(*copy.deepcopy(parts), held, picks, micro_batches, dtype)
        with torch.no_grad():
            one.gradients()
        names = ["conv_w", "gamma", "beta", "enc_w", "enc_b", "head_w", "head_b"]
        names += [n for n, _ in one.tail.named_parameters()]
        errors = {"loss": [distance(one.loss, wanted), distance(loss, wanted)]}
        for n, p, g, w in zip(names, one.parameters, gradients, wanted_gradients, strict=True):
            assert p.grad is not None
            errors[n] = [distance(p.grad, w), distance(g, w)]
        worst = max(errors, key=lambda n: errors[n][0])
        report.add(
            f"iteration numbers {dtype}",
            worst=[worst, *errors[worst]],
            loss=errors["loss"],
            all=errors,
        )


def iteration_times(report: Report, device: torch.device, ues: int, batch: int) -> None:
    """The paper's size: ms of an iteration, eager and as one graph, and of its kernels."""
    held = torch.rand(ues, 13000, 2, 32, 32, device=device)
    picks = torch.randint(13000, (ues, batch), device=device)
    parts = parts_of(ues, device)
    for dtype in DTYPES:
        one = Iteration(*copy.deepcopy(parts), held, picks, 2, dtype)
        values = {"eager_ms": median_ms(lambda i: one.step(), device, 5)}
        before = float(one.loss.mean())
        (graph,) = graphed(lambda i: one.step(), 1)
        values["graph_ms"] = median_ms(lambda i: graph.replay(), device, 20)
        values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        report.add(f"iteration {dtype}", **values, loss=[before, float(one.loss.mean())])
        of_kind: dict[str, list[float]] = {}
        for name, us in launches(lambda i: one.step(), 3):
            entry = of_kind.setdefault(name[:60], [0, 0.0])
            entry[0] += 1
            entry[1] += us
        longest = sorted(of_kind.items(), key=lambda kv: -kv[1][1])[:30]
        report.add(
            f"iteration kernels {dtype}",
            total_us=sum(v[1] for v in of_kind.values()),
            longest=[(n, c, round(us)) for n, (c, us) in longest],
        )
        del graph, one
        torch.cuda.empty_cache()


def copy_rate(report: Report, device: torch.device) -> None:
    a = torch.randn(1 << 28, device=device)
    b = torch.empty_like(a)
    ms = median_ms(lambda i: b.copy_(a), device)
    report.add("copy", tb_per_s=2 * a.numel() * 4 / ms / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    report = Report(args.out, args.seconds)
    rows, size, left = args.rows, args.size, args.seconds
    report.add(
        "versions",
        torch=torch.__version__,
        triton=triton.__version__,
        device=torch.cuda.get_device_name() if cuda else "cpu",
    )
    if cuda:
        report.attempt("compile", lambda: compile_all(report, size))
    if cuda:
        report.attempt(
            "kernels", lambda: kernels(report, device, rows, size, torch.float32, left * 0.35)
        )
        report.attempt("iteration numbers", lambda: iteration_numbers(report, device))
        report.attempt("iteration", lambda: iteration_times(report, device, 10, rows // 5))
    report.attempt("numbers", lambda: numbers(report, device, max(rows // 8, 3), size))
    report.attempt("block", lambda: block_times(report, device, rows, size))
    if cuda:
        report.attempt("others", lambda: other_parts(report, device, 10, rows // 5, 2))
        report.attempt(
            "kernels", lambda: kernels(report, device, rows, size, torch.bfloat16, left * 0.1)
        )
        report.attempt("copy", lambda: copy_rate(report, device))


if __name__ == "__main__":
    main()
