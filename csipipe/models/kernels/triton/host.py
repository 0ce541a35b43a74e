"""Whether Triton's kernels can run, how images are cut into tiles, and the convolutions' launches.

Images are (B, C, A, D). Weights are (O, I, KH, KW), or (U, O, I, KH, KW): then the images are U
groups of equal size, one after the other, with weights of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn

from csipipe.models.kernels.triton import convolve, weights

LARGEST_TILE = 1024
"""Pixels of a program; larger images are cut into several tiles."""
LARGEST_KERNEL = 9
"""Taps of a convolution; a thread keeps sums for all of them and all output channels."""


@dataclass
class Tuning:
    """What only the speed depends on. As measured on an H100."""

    forward_warps: int = 4
    backward_warps: int = 4
    weight_warps: int = 8
    weight_programs: int = 264
    """How many programs share the images' chunks: two per multiprocessor of an H100."""
    weight_registers: int | None = 128
    """At most so many per thread, so that two programs fit on a multiprocessor."""


tuning = Tuning()


def reason_against(module: nn.Module, x: Tensor) -> str | None:
    """Why the kernels can't compute a module on an input; None if they can."""
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"they are for GPUs, and the input is on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"they take float32 and bfloat16, and the input is {x.dtype}"
    for parameter in module.parameters():
        if parameter.dtype != torch.float32:
            return f"they take parameters of float32, and there is {parameter.dtype}"
        if parameter.dim() >= 4 and parameter.shape[-2] * parameter.shape[-1] > LARGEST_KERNEL:
            high, wide = parameter.shape[-2:]
            return f"they take no more than {LARGEST_KERNEL} taps, and there is {high}×{wide}"
    return None if x.numel() else "there are no rows"


class Tiles:
    """How a kernel's programs share `images` images of A angles and D delays, in `groups` groups.

    A tile is `block` pixels, or, of convolutions, runs of pixels, down or to the right.
    """

    def __init__(self, images: int, a: int, d: int, groups: int = 1) -> None:
        self.images, self.a, self.d, self.groups = images, a, d, groups
        self.pixels = a * d
        self.values = images // groups * self.pixels
        block = min(LARGEST_TILE, triton.next_power_of_2(self.pixels))
        tiles = triton.cdiv(self.pixels, block)
        self.programs = images * tiles
        self.block = {"A": a, "D": d, "TILES": tiles, "BLOCK": block}
        run = convolve.RUN.value
        self.down = self._runs(triton.cdiv(a, run) * d)
        self.right = self._runs(triton.cdiv(d, run) * a)

    def _runs(self, count: int) -> tuple[int, dict[str, int]]:
        """Programs and constants for `count` runs per image."""
        runs = min(LARGEST_TILE // convolve.RUN.value, triton.next_power_of_2(count))
        tiles = triton.cdiv(count, runs)
        return self.images * tiles, {"A": self.a, "D": self.d, "TILES": tiles, "RUNS": runs}

    def chunks(self, weight: Tensor, columns: int) -> int:
        """How often `columns` runs of a weight gradient are needed for an image."""
        along, across = self.a, self.d
        if weight.shape[-2] < weight.shape[-1]:
            along, across = across, along
        chunks: int = triton.cdiv(triton.cdiv(along, weights.RUN.value) * across, columns)
        return chunks

    def runs(self, weight: Tensor) -> tuple[int, dict[str, int]]:
        """Programs and constants of a convolution."""
        return self.down if weight.shape[-2] >= weight.shape[-1] else self.right

    def sums(self, rows: int, device: torch.device) -> Tensor:
        """Room for `rows` sums of each tile, whichever way it is cut."""
        most = max(self.programs, self.down[0], self.right[0])
        return torch.empty(rows * most, device=device)

    def channels(self, x: Tensor) -> int:
        """How many channels lie between an image of `x`, which may have groups, and the next."""
        return x.shape[-3] if x.dim() == 5 else x.stride(0) // self.pixels


def _sizes(weight: Tensor) -> dict[str, int]:
    outputs, inputs, high, wide = weight.shape[-4:]
    return {"KH": high, "KW": wide, "IN": inputs, "OUT": outputs}


def forward(
    tiles: Tiles,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stats: Tensor | None = None,
    bias: Tensor | None = None,
    part: Tensor | None = None,
) -> None:
    """A convolution of `x` into `out`.

    Args:
        stats: table of the BatchNorm that is applied to x first, with a LeakyReLU.
        part: room for the moments of the output.
    """
    programs, constants = tiles.runs(weight)
    convolve.conv_forward[(programs,)](
        x,
        x if stats is None else stats,
        weight,
        weight if bias is None else bias,
        out,
        out if part is None else part,
        programs,
        tiles.images // tiles.groups,
        x_channels=tiles.channels(x),
        q_channels=tiles.channels(out),
        stats_channels=1 if stats is None else stats.stride(-2),
        ACTIVATE=stats is not None,
        BIAS=bias is not None,
        TRAIN=part is not None,
        num_warps=tuning.forward_warps,
        **_sizes(weight),
        **constants,
    )


@dataclass
class Gradient:
    """Where the gradient at a convolution's output q (B, O, A, D) comes from.

    Args:
        g: gradient behind what follows the convolution. With `join`: (B, 2, A, D) at the join's
            output.
        q: its output. None: g is at the output.
        stats, coef: of the BatchNorm that follows.
        join: (2, O) the join's weights of these channels.
    """

    g: Tensor
    q: Tensor | None = None
    stats: Tensor | None = None
    coef: Tensor | None = None
    join: Tensor | None = None

    def pointers(self) -> list[Tensor]:
        every = (self.g, self.q, self.stats, self.coef, self.join)
        return [self.g if tensor is None else tensor for tensor in every]

    def constants(self, tiles: Tiles) -> dict[str, int]:
        return {
            "q_channels": tiles.channels(self.g if self.q is None else self.q),
            "stats_channels": 1 if self.stats is None else self.stats.stride(-2),
            "JOIN": self.join is not None,
            "NORM": self.stats is not None,
        }


def backward(
    tiles: Tiles,
    gradient: Gradient,
    weight: Tensor,
    out: Tensor,
    *,
    before: Tensor | None = None,
    before_stats: Tensor | None = None,
    part: Tensor | None = None,
) -> None:
    """The gradient at a convolution's input into `out`; with a BatchNorm or a join for one group.

    Args:
        before: what is added; or, with `before_stats`, the output of the convolution before, whose
            BatchNorm has this table: then `out` is the gradient at that BatchNorm's output.
        part: room for that BatchNorm's sums.
    """
    programs, constants = tiles.runs(weight)
    convolve.conv_backward[(programs,)](
        *gradient.pointers(),
        weight,
        out if before is None else before,
        out if before_stats is None else before_stats,
        out,
        out if part is None else part,
        programs,
        tiles.images // tiles.groups,
        0,
        before_channels=tiles.channels(out),
        ACTIVATE=before_stats is not None,
        ADD=before is not None and before_stats is None,
        num_warps=tuning.backward_warps,
        **gradient.constants(tiles),
        **_sizes(weight),
        **constants,
    )


def weight_gradients(
    tiles: Tiles,
    gradient: Gradient,
    weight: Tensor,
    x: Tensor,
    *,
    x_stats: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """(U, O·I·KH·KW), and with `bias` its gradients behind, (U, O·I·KH·KW + O).

    Args:
        x: the convolution's input; with `x_stats` before this BatchNorm and a LeakyReLU.
    """
    sizes, groups = _sizes(weight), tiles.groups
    outputs, inputs = sizes["OUT"], sizes["IN"]
    size = outputs * inputs * sizes["KH"] * sizes["KW"] + outputs * bias
    images = tiles.images // groups
    rows, outs = triton.next_power_of_2(inputs), triton.next_power_of_2(outputs)
    columns = max(1, 32 * tuning.weight_warps // rows)
    chunks = images * tiles.chunks(weight, columns)
    programs = min(chunks, triton.cdiv(tuning.weight_programs, groups))
    part = torch.empty(groups * programs * size, device=x.device)
    weights.conv_weights[(groups * programs,)](
        *gradient.pointers(),
        x,
        x if x_stats is None else x_stats,
        part,
        programs,
        images,
        0,
        A=tiles.a,
        D=tiles.d,
        x_channels=tiles.channels(x),
        ACTIVATE=x_stats is not None,
        BIAS=bias,
        ROWS=rows,
        COLUMNS=columns,
        OUTS=outs,
        LEVELS=(4 * outs).bit_length() - 1,
        AHEAD=rows > 2,
        num_warps=tuning.weight_warps,
        maxnreg=tuning.weight_registers,
        **gradient.constants(tiles),
        **sizes,
    )
    out = torch.empty(groups, size, device=x.device)
    weights.finish_weights[(triton.cdiv(size, 32), groups)](
        part, programs, out, SIZE=size, COLUMNS=32, ROWS=32
    )
    return out
