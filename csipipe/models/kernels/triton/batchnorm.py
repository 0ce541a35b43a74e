"""BatchNorm of one module, or of several stacked, on a GPU, in training mode.

PyTorch gives each channel one of a GPU's multiprocessors; here all of them add up tiles. Sums are
float64 in a fixed order, as in `triton.crblock`.

Shapes: B images, U modules, C channels, A angles, D delays: x is (B, C, A, D), or (U, B, C, A, D)
with parameters and statistics (U, C).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe.models.kernels.triton import host, norm, normalise

_CHUNK = 1024


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
    norm.finish_forward[(channels, tiles.groups)](
        part,
        tiles.programs // tiles.groups,
        tiles.programs,
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        stats,
        tiles.values,
        C=channels,
        stats_channels=channels,
        MOMENTUM=module.momentum,
        EPS=module.eps,
        TRAIN=True,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    normalise.normalise[grid](x, stats, y, tiles.images // tiles.groups, **tiles.block)
    return y, (x, stats)


def input_gradient(
    module: nn.BatchNorm2d, saved: tuple[Tensor, ...], dy: Tensor, wanted: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient at the input, if it is wanted; those of weight and bias."""
    (x, stats), dy = saved, dy.contiguous()
    tiles, channels = _tiles(x), x.shape[-3]
    part, grid = tiles.sums(2 * channels, x.device), (tiles.programs, channels)
    share = tiles.images // tiles.groups
    normalise.gradient_sums[grid](dy, x, stats, part, tiles.programs, share, **tiles.block)
    coef = torch.empty(tiles.groups, 2, channels, device=x.device)
    of_weight, of_bias = (torch.empty(tiles.groups, channels, device=x.device) for _ in range(2))
    norm.finish_backward[(channels, tiles.groups)](
        part,
        tiles.programs // tiles.groups,
        tiles.programs,
        stats,
        coef,
        of_weight,
        of_bias,
        part,
        tiles.values,
        C=channels,
        EXTRA=0,
        TRAIN=True,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    rest = [of_weight.view_as(module.weight), of_bias.view_as(module.bias)]
    if not wanted:
        return None, rest
    dx = torch.empty_like(x)
    normalise.gradient[grid](dy, x, stats, coef, dx, share, **tiles.block)
    return dx, rest


def weight_gradients(
    module: nn.BatchNorm2d, saved: tuple[Tensor, ...], rest: list[Tensor]
) -> list[Tensor]:
    """Of weight and bias."""
    return rest


def _tiles(x: Tensor) -> host.Tiles:
    groups = len(x) if x.dim() == 5 else 1
    return host.Tiles(x.shape[-4] * groups, x.shape[-2], x.shape[-1], groups)
