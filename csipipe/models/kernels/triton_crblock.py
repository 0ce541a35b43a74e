"""CRBlock by fused Triton kernels: forward pass, gradient at the input, weight gradients.

Stored for the backward pass are the input, the convolutions' outputs before BatchNorm and the
join's output, in the input's type (fp32 or bf16); everything else is recomputed. Arithmetic and
statistics are fp32, sums over tiles float64.

Shapes: B rows, A angles, D delays; images are (B, 2, A, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from torch import Tensor, nn

from csipipe.models.crblock import CHANNELS, CRBlock
from csipipe.models.kernels import triton_backward as backward_kernels
from csipipe.models.kernels import triton_forward as forward_kernels
from csipipe.models.kernels import triton_weights as weight_kernels
from csipipe.models.layers import Conv2d

LARGEST_TILE = 1024
"""Pixels of a program; larger images are cut into several tiles."""
LARGEST_KERNEL = 9
"""Taps of a convolution; a thread keeps sums for all of them and all output channels."""


@dataclass
class Tuning:
    """What only the speed depends on."""

    forward_warps: int = 4
    backward_warps: int = 4
    weight_warps: int = 8
    weight_programs: int = 264
    """How many programs share the images: two per multiprocessor of an H100."""
    weight_registers: int | None = None
    """At most so many per thread."""


tuning = Tuning()


@dataclass
class Stage:
    """A convolution and its BatchNorm. `offset`: its first channel in the paths' common output."""

    conv: Conv2d
    norm: nn.BatchNorm2d
    offset: int | None


@dataclass
class Saved:
    """What the backward pass needs: of each path and stage the output q and BatchNorm's table."""

    x: Tensor
    q: list[list[Tensor]]
    stats: list[list[Tensor]]
    last: Tensor
    last_stats: Tensor
    j: Tensor
    join_stats: Tensor
    training: bool


@dataclass
class Rest:
    """What the weight gradients need beside `Saved`: per path and stage g (of the last: dj)."""

    g: list[list[Tensor]]
    coef: list[list[Tensor]]
    dgamma: list[list[Tensor]]
    dbeta: list[list[Tensor]]
    dj: Tensor
    join: Tensor
    join_dgamma: Tensor
    join_dbeta: Tensor


def stages(block: CRBlock) -> list[list[Stage]]:
    """The paths' convolutions, in order."""
    paths = []
    for p, path in enumerate(block.paths):
        pairs = [m for m in cast(nn.Sequential, path) if isinstance(m, nn.Sequential)]
        paths.append(
            [
                Stage(
                    cast(Conv2d, pair[0]),
                    cast(nn.BatchNorm2d, pair[1]),
                    CHANNELS * p if k == len(pairs) - 1 else None,
                )
                for k, pair in enumerate(pairs)
            ]
        )
    return paths


def reason(block: CRBlock, x: Tensor) -> str | None:
    """Why these kernels can't do this block on this input; None if they can."""
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton's kernels run on a GPU, and the input is on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the input is {x.dtype}; the kernels are for float32 and bfloat16"
    if any(p.dtype != torch.float32 for p in block.parameters()):
        return "a parameter isn't float32"
    if len(x) == 0:
        return "the batch is empty"
    for path in stages(block):
        for stage in path:
            weight = stage.conv.weight
            if weight[0, 0].numel() > LARGEST_KERNEL:
                return f"a kernel of {tuple(weight.shape[2:])} has too many weights"
            if not (weight.shape[2] % 2 and weight.shape[3] % 2):
                return f"a kernel of {tuple(weight.shape[2:])} is even"
    return None


class _Launch:
    """Shapes that all launches of one pass share."""

    def __init__(self, x: Tensor) -> None:
        self.batch, _, self.a, self.d = x.shape
        self.pixels = self.a * self.d
        self.block = min(LARGEST_TILE, triton.next_power_of_2(self.pixels))
        self.tiles = triton.cdiv(self.pixels, self.block)
        self.programs = self.batch * self.tiles
        self.values = self.batch * self.pixels
        self.grid = (self.programs,)
        # a tile in runs of four pixels, down or to the right
        self.down = self._runs(triton.cdiv(self.a, 4) * self.d)
        self.right = self._runs(triton.cdiv(self.d, 4) * self.a)
        self.shape = {"A": self.a, "D": self.d}
        self.tile = {"TILES": self.tiles, "BLOCK": self.block}

    def _runs(self, count: int) -> tuple[int, dict[str, int]]:
        """Programs and tiles for `count` runs per image."""
        runs = min(LARGEST_TILE // 4, triton.next_power_of_2(count))
        tiles = triton.cdiv(count, runs)
        return self.batch * tiles, {"TILES": tiles, "RUNS": runs}

    def runs(self, weight: Tensor) -> tuple[int, dict[str, int]]:
        """Programs and tiles of a convolution."""
        return self.down if weight.shape[2] >= weight.shape[3] else self.right

    def sums(self, x: Tensor, rows: int) -> Tensor:
        """(rows, programs) sums of each tile."""
        return torch.empty(rows * max(self.programs, self.down[0], self.right[0]), device=x.device)


def _finish_forward(
    run: _Launch, programs: int, part: Tensor, norm: nn.BatchNorm2d, stats: Tensor, training: bool
) -> None:
    forward_kernels.finish_forward[(norm.num_features,)](
        part,
        programs,
        programs,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        stats,
        run.values,
        C=norm.num_features,
        stats_channels=stats.stride(0),
        MOMENTUM=norm.momentum,
        EPS=norm.eps,
        TRAIN=training,
        CHUNK=4096,
        num_warps=16,
    )


def forward(block: CRBlock, x: Tensor, training: bool) -> tuple[Tensor, Saved]:
    """(B, 2, A, D) → (B, 2, A, D), and what the backward pass needs.

    In training the running statistics are brought up to date, as by `nn.BatchNorm2d`.
    """
    x = x.contiguous()
    run = _Launch(x)
    paths = stages(block)
    channels = CHANNELS * len(paths)
    last = x.new_empty(run.batch, channels, run.a, run.d)
    last_stats = torch.empty(4, channels, device=x.device)
    part = run.sums(x, 2 * CHANNELS + 1)
    q: list[list[Tensor]] = []
    stats: list[list[Tensor]] = []
    for path in paths:
        q.append([])
        stats.append([])
        source, source_stats = x, last_stats
        for k, stage in enumerate(path):
            if stage.offset is None:
                target = x.new_empty(run.batch, CHANNELS, run.a, run.d)
                table = torch.empty(4, CHANNELS, device=x.device)
            else:
                target = last[:, stage.offset : stage.offset + CHANNELS]
                table = last_stats[:, stage.offset : stage.offset + CHANNELS]
            weight = stage.conv.weight
            programs, tile = run.runs(weight)
            forward_kernels.conv_forward[(programs,)](
                source,
                source_stats,
                weight,
                weight,
                target,
                part,
                programs,
                run.batch,
                0,
                KH=weight.shape[2],
                KW=weight.shape[3],
                IN=weight.shape[1],
                OUT=CHANNELS,
                x_channels=source.stride(0) // run.pixels,
                q_channels=target.stride(0) // run.pixels,
                stats_channels=source_stats.stride(0),
                ACTIVATE=k > 0,
                FINISH=False,
                TRAIN=training,
                num_warps=tuning.forward_warps,
                **run.shape,
                **tile,
            )
            _finish_forward(run, programs, part, stage.norm, table, training)
            q[-1].append(target)
            stats[-1].append(table)
            source, source_stats = target, table
    join, norm = cast(Conv2d, block.join[0]), cast(nn.BatchNorm2d, block.join[1])
    j = torch.empty_like(x)
    join_stats = torch.empty(4, 2, device=x.device)
    forward_kernels.join_forward[run.grid](
        last,
        last_stats,
        join.weight,
        j,
        part,
        run.programs,
        CHANNELS=channels,
        TRAIN=training,
        **run.shape,
        **run.tile,
    )
    _finish_forward(run, run.programs, part, norm, join_stats, training)
    y = torch.empty_like(x)
    forward_kernels.output_forward[run.grid](x, j, join_stats, y, **run.shape, **run.tile)
    return y, Saved(x, q, stats, last, last_stats, j, join_stats, training)


def _finish_backward(
    run: _Launch, programs: int, part: Tensor, stats: Tensor, extra: int, training: bool
) -> tuple[Tensor, ...]:
    """Coefficients, gradients of weight and bias, and the further sums."""
    channels = stats.shape[1]
    found = torch.empty(4 + extra, channels, device=part.device)
    coef, dgamma, dbeta, further = found[:2], found[2], found[3], found[4:]
    backward_kernels.finish_backward[(channels,)](
        part,
        programs,
        programs,
        stats,
        coef,
        dgamma,
        dbeta,
        further,
        run.values,
        C=channels,
        EXTRA=extra,
        TRAIN=training,
        CHUNK=4096,
        num_warps=16,
    )
    return coef, dgamma, dbeta, further


def input_gradient(block: CRBlock, saved: Saved, dy: Tensor) -> tuple[Tensor, Rest]:
    """Gradient at the input, and what the weight gradients need."""
    run = _Launch(saved.x)
    x, j, last = saved.x, saved.j, saved.last
    dy = dy.contiguous()
    dz, dj = torch.empty_like(x), torch.empty_like(x)
    common: dict[str, Any] = run.shape | run.tile
    part = run.sums(x, 4)
    backward_kernels.output_backward[run.grid](
        dy, x, j, saved.join_stats, dz, part, run.programs, **common
    )
    coef, join_dgamma, join_dbeta, _ = _finish_backward(
        run, run.programs, part, saved.join_stats, 0, saved.training
    )
    channels = last.shape[1]
    weight = cast(Conv2d, block.join[0]).weight
    part = run.sums(x, 4 * channels)
    backward_kernels.join_backward[run.grid](
        last,
        saved.last_stats,
        j,
        saved.join_stats,
        coef,
        dz,
        weight,
        dj,
        part,
        run.programs,
        CHANNELS=channels,
        **common,
    )
    last_coef, last_dgamma, last_dbeta, join_gradient = _finish_backward(
        run, run.programs, part, saved.last_stats, 2, saved.training
    )
    rest = Rest([], [], [], [], dj, join_gradient, join_dgamma, join_dbeta)
    dx = torch.empty_like(x)
    added = dz
    for p, path in enumerate(stages(block)):
        own = slice(CHANNELS * p, CHANNELS * (p + 1))
        g, coefs, dgammas, dbetas = [dj], [last_coef[:, own]], [last_dgamma[own]], [last_dbeta[own]]
        for k in range(len(path) - 1, -1, -1):
            weight = path[k].conv.weight
            activate = k > 0
            before = saved.q[p][k - 1] if activate else added
            out = torch.empty_like(before) if activate else dx
            _conv_backward(
                run, saved, block, p, k, g[0], coefs[0], weight, before, out, part, len(path)
            )
            if activate:
                programs, _ = run.runs(weight)
                found = _finish_backward(
                    run, programs, part, saved.stats[p][k - 1], 0, saved.training
                )
                g.insert(0, out)
                coefs.insert(0, found[0])
                dgammas.insert(0, found[1])
                dbetas.insert(0, found[2])
        added = dx
        rest.g.append(g)
        rest.coef.append(coefs)
        rest.dgamma.append(dgammas)
        rest.dbeta.append(dbetas)
    return dx, rest


def _conv_backward(
    run: _Launch,
    saved: Saved,
    block: CRBlock,
    p: int,
    k: int,
    g: Tensor,
    coef: Tensor,
    weight: Tensor,
    before: Tensor,
    out: Tensor,
    part: Tensor,
    length: int,
) -> None:
    q, stats = saved.q[p][k], saved.stats[p][k]
    programs, tile = run.runs(weight)
    backward_kernels.conv_backward[(programs,)](
        g,
        q,
        stats,
        coef,
        _join_weights(block, p),
        weight,
        before,
        saved.stats[p][k - 1],
        out,
        part,
        programs,
        0,
        KH=weight.shape[2],
        KW=weight.shape[3],
        IN=weight.shape[1],
        OUT=CHANNELS,
        q_channels=q.stride(0) // run.pixels,
        stats_channels=stats.stride(0),
        before_channels=before.stride(0) // run.pixels,
        JOIN=k == length - 1,
        NORM=True,
        ACTIVATE=k > 0,
        ADD=k == 0,
        num_warps=tuning.backward_warps,
        **run.shape,
        **tile,
    )


def _join_weights(block: CRBlock, p: int) -> Tensor:
    """(2, channels of path p) view of the join's weights; rows lie all paths' channels apart."""
    return cast(Conv2d, block.join[0]).weight.detach().flatten(1)[:, CHANNELS * p :]


def weight_gradients(block: CRBlock, saved: Saved, rest: Rest) -> list[Tensor]:
    """Gradients of all parameters, in the order of `block.parameters()`."""
    run = _Launch(saved.x)
    gradients: list[Tensor] = []
    for p, path in enumerate(stages(block)):
        for k, stage in enumerate(path):
            gradients.append(_conv_weights(run, saved, rest, block, p, k, stage.conv.weight))
            gradients += [rest.dgamma[p][k], rest.dbeta[p][k]]
    join = cast(Conv2d, block.join[0]).weight
    return [*gradients, rest.join.view_as(join), rest.join_dgamma, rest.join_dbeta]


def _conv_weights(
    run: _Launch, saved: Saved, rest: Rest, block: CRBlock, p: int, k: int, weight: Tensor
) -> Tensor:
    programs = min(run.batch, tuning.weight_programs)
    rows = triton.next_power_of_2(weight.shape[1])
    part = torch.empty(programs, weight.numel(), device=weight.device)
    x = saved.q[p][k - 1] if k else saved.x
    q, stats = saved.q[p][k], saved.stats[p][k]
    weight_kernels.conv_weights[(programs,)](
        rest.g[p][k],
        q,
        stats,
        rest.coef[p][k],
        _join_weights(block, p),
        x,
        saved.stats[p][k - 1],
        part,
        programs,
        run.batch,
        0,
        KH=weight.shape[2],
        KW=weight.shape[3],
        IN=weight.shape[1],
        OUT=CHANNELS,
        q_channels=q.stride(0) // run.pixels,
        stats_channels=stats.stride(0),
        x_channels=x.stride(0) // run.pixels,
        JOIN=k == len(saved.q[p]) - 1,
        NORM=True,
        ACTIVATE=k > 0,
        BIAS=False,
        ROWS=rows,
        COLUMNS=max(1, 32 * tuning.weight_warps // rows),
        num_warps=tuning.weight_warps,
        maxnreg=tuning.weight_registers,
        **run.shape,
    )
    out = torch.empty_like(weight)
    weight_kernels.finish_weights[(triton.cdiv(weight.numel(), 32),)](
        part, programs, out, SIZE=weight.numel(), COLUMNS=32, ROWS=32
    )
    return out
