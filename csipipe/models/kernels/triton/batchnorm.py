"""BatchNorm of one module, or of several stacked, on a GPU, in training mode.

A stacked one may have the LeakyReLU behind it with it: its `slope` isn't 1 then.

PyTorch gives each channel one of a GPU's multiprocessors; here all of them add up tiles. Sums are
float64 in a fixed order, as in `triton.crblock`.

Shapes: B images, U modules, C channels, A angles, D delays: x is (B, C, A, D), or (U, B, C, A, D)
with parameters and statistics (U, C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn

from csipipe.models.kernels.triton import host, norm, normalise

_CHUNK = 4096
"""Tiles whose sums one program reads at once."""


def reason(module: nn.BatchNorm2d, x: Tensor) -> str | None:
    """Why these kernels can't compute this layer on this input; None if they can."""
    if not module.training:
        return "they are for training mode"
    if not module.affine or not module.track_running_stats or module.momentum is None:
        return "they take a BatchNorm2d with weights, running statistics and a momentum"
    if x.shape[-4] * x.shape[-2] * x.shape[-1] == 1:
        return "BatchNorm needs more than one value per channel"
    return host.reason_against(module, x)


def forward(module: nn.BatchNorm2d, x: Tensor, training: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of x's shape; running statistics follow."""
    assert training
    x = x.contiguous()
    tiles, channels = _tiles(x), x.shape[-3]
    part, y = tiles.sums(2 * channels + 1, x.device), torch.empty_like(x)
    stats = torch.empty(tiles.groups, 4, channels, device=x.device)
    grid = (tiles.programs, channels)
    normalise.moments[grid](x, part, tiles.programs, **tiles.block)
    finish_forward(tiles, tiles.programs, part, module, stats, training)
    share, constants = tiles.images // tiles.groups, tiles.block | {"SLOPE": _slope(module)}
    normalise.normalise[grid](x, stats, y, share, **constants)
    return y, (x, stats)


def input_gradient(
    module: nn.BatchNorm2d, saved: tuple[Tensor, ...], dy: Tensor, wanted: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient at the input, if it is wanted; those of weight and bias."""
    (x, stats), dy = saved, dy.contiguous()
    tiles, channels = _tiles(x), x.shape[-3]
    part, grid = tiles.sums(2 * channels, x.device), (tiles.programs, channels)
    share, constants = tiles.images // tiles.groups, tiles.block | {"SLOPE": _slope(module)}
    normalise.gradient_sums[grid](dy, x, stats, part, tiles.programs, share, **constants)
    sums = finish_backward(tiles, tiles.programs, part, stats, 0, True)
    rest = [sums.of_weight.view_as(module.weight), sums.of_bias.view_as(module.bias)]
    if not wanted:
        return None, rest
    dx = torch.empty_like(x)
    normalise.gradient[grid](dy, x, stats, sums.coef, dx, share, **constants)
    return dx, rest


def weight_gradients(
    module: nn.BatchNorm2d, saved: tuple[Tensor, ...], rest: list[Tensor]
) -> list[Tensor]:
    """Of weight and bias."""
    return rest


def _slope(module: nn.BatchNorm2d) -> float:
    """Of the LeakyReLU that the module applies, too; 1: none."""
    slope: float = getattr(module, "slope", 1.0)
    return slope


def _tiles(x: Tensor) -> host.Tiles:
    groups = len(x) if x.dim() == 5 else 1
    return host.Tiles(x.shape[-4] * groups, x.shape[-2], x.shape[-1], groups)


def finish_forward(
    tiles: host.Tiles,
    programs: int,
    part: Tensor,
    module: nn.BatchNorm2d,
    stats: Tensor,
    training: bool,
) -> None:
    """Fill tables (U, 4, C), or (4, C), from tiles' moments, or from running statistics."""
    each = programs // tiles.groups
    norm.finish_forward[(module.weight.shape[-1], tiles.groups)](
        part,
        each,
        programs,
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        stats,
        tiles.values,
        C=module.weight.shape[-1],
        stats_channels=stats.stride(-2),
        MOMENTUM=module.momentum,
        EPS=module.eps,
        TRAIN=training,
        **_reading(each),
    )


@dataclass
class Sums:
    """What `finish_backward` finds: (U, 2, C), (U, C) twice, and the sums of the further rows."""

    coef: Tensor
    of_weight: Tensor
    of_bias: Tensor
    further: Tensor


def finish_backward(
    tiles: host.Tiles, programs: int, part: Tensor, stats: Tensor, further: int, training: bool
) -> Sums:
    """BatchNorms' coefficients and gradients from their tiles' sums."""
    channels, each = stats.shape[-1], programs // tiles.groups
    found = torch.empty(4 * tiles.groups + further, channels, device=part.device)
    u = tiles.groups
    coef, of_weight, of_bias = found[: 2 * u], found[2 * u : 3 * u], found[3 * u : 4 * u]
    more = found[4 * u :]
    norm.finish_backward[(channels, tiles.groups)](
        part,
        each,
        programs,
        stats,
        coef,
        of_weight,
        of_bias,
        more if further else part,
        tiles.values,
        C=channels,
        EXTRA=further,
        TRAIN=training,
        **_reading(each),
    )
    return Sums(coef.view(tiles.groups, 2, channels), of_weight, of_bias, more)


def _reading(programs: int) -> dict[str, int]:
    """How many tiles' sums are read at once, and by how many warps."""
    chunk = min(_CHUNK, triton.next_power_of_2(programs))
    return {"CHUNK": chunk, "num_warps": max(1, min(16, chunk // 128))}
