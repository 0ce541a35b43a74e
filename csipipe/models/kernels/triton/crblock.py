"""CRBlock on a GPU by fused kernels: forward, input gradient, weight gradients.

Stored for the backward pass are the input, the convolutions' outputs before BatchNorm and the
join's output, in the input's type (float32 or bfloat16); everything else is computed again.
Arithmetic is float32 without shortened products; a BatchNorm's sums over tiles, and the weight
gradients' over programs, are float64 in a fixed order, so the same input gives the same bits. Not
to the bit like PyTorch's layers: sums are taken in another order. With bfloat16 what is stored is
rounded where autocast rounds too, and moments are of the rounded values.

Shapes: B rows, A angles, D delays, N = 7 · paths channels of the paths' ends; images are
(B, 2, A, D) unless noted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from csipipe.branches import Branches
from csipipe.models.crblock import CHANNELS, CRBlock
from csipipe.models.kernels.triton import host, pointwise
from csipipe.models.kernels.triton.batchnorm import finish_backward, finish_forward
from csipipe.models.layers import Conv2d


@dataclass
class Layer:
    """A convolution of a path, the BatchNorm behind it, and what the forward pass keeps of them.

    Attributes:
        q: (B, 7, A, D) the convolution's output; a path's last one is part of all paths' ends.
        stats: (4, 7) the BatchNorm's table.
    """

    conv: Conv2d
    norm: nn.BatchNorm2d
    q: Tensor
    stats: Tensor


@dataclass
class Saved:
    """What the backward pass needs of the forward pass.

    Attributes:
        paths: the layers of every path.
        ends, ends_stats: (B, N, A, D) and (4, N), of the paths' last layers.
        j, join_stats: (B, 2, A, D) and (4, 2), of the join.
    """

    x: Tensor
    paths: list[list[Layer]]
    ends: Tensor
    ends_stats: Tensor
    j: Tensor
    join_stats: Tensor
    training: bool


@dataclass
class Rest:
    """What the weight gradients need of the input gradient.

    Attributes:
        gradients: per path and layer.
        of_norms: gradients of weight and bias, per path and layer.
        of_join: of the join's convolution, (2, N), and of its BatchNorm's weight and bias.
    """

    of_join: tuple[Tensor, Tensor, Tensor]
    gradients: list[list[host.Gradient]] = field(default_factory=list)
    of_norms: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


def reason(block: CRBlock, x: Tensor) -> str | None:
    """Why these kernels can't compute this block on this input; None if they can."""
    if block.training and x.numel() == 2:
        return "BatchNorm needs more than one value per channel"
    return host.reason_against(block, x)


def forward(block: CRBlock, x: Tensor, training: bool) -> tuple[Tensor, Saved]:
    """(B, 2, A, D) → (B, 2, A, D); in training mode running statistics follow."""
    x = x.contiguous()
    tiles = _tiles(x)
    channels = CHANNELS * len(block.paths)
    ends = x.new_empty(len(x), channels, *x.shape[2:])
    ends_stats = torch.empty(4, channels, device=x.device)
    branches = Branches(x.device)
    paths = []
    for p, path in enumerate(block.paths):
        with branches.branch(p):
            own = slice(CHANNELS * p, CHANNELS * (p + 1))
            paths.append(_path(tiles, path, x, ends[:, own], ends_stats[:, own], training))
    branches.join()
    j, y = torch.empty_like(x), torch.empty_like(x)
    join_stats = torch.empty(4, 2, device=x.device)
    part = tiles.sums(2 * 2 + 1, x.device)
    grid = (tiles.programs,)
    pointwise.join_forward[grid](
        ends,
        ends_stats,
        _join(block).weight,
        j,
        part,
        tiles.programs,
        CHANNELS=channels,
        TRAIN=training,
        **tiles.block,
    )
    batch_norm = cast(nn.BatchNorm2d, block.join[1])
    finish_forward(tiles, tiles.programs, part, batch_norm, join_stats, training)
    pointwise.output_forward[grid](x, j, join_stats, y, **tiles.block)
    return y, Saved(x, paths, ends, ends_stats, j, join_stats, training)


def _path(
    tiles: host.Tiles,
    path: nn.Module,
    x: Tensor,
    end: Tensor,
    end_stats: Tensor,
    training: bool,
) -> list[Layer]:
    """One path's forward pass, its last output into `end` and `end_stats`."""
    part = tiles.sums(2 * CHANNELS + 1, x.device)
    pairs = [pair for pair in path.children() if isinstance(pair, nn.Sequential)]
    layers: list[Layer] = []
    source, source_stats = x, None
    for pair in pairs:
        conv, batch_norm = cast(Conv2d, pair[0]), cast(nn.BatchNorm2d, pair[1])
        if pair is pairs[-1]:
            q, stats = end, end_stats
        else:
            q = x.new_empty(len(x), CHANNELS, *x.shape[2:])
            stats = torch.empty(4, CHANNELS, device=x.device)
        host.forward(
            tiles,
            source,
            conv.weight,
            q,
            stats=source_stats,
            part=part if training else None,
        )
        programs, _ = tiles.runs(conv.weight)
        finish_forward(tiles, programs, part, batch_norm, stats, training)
        layers.append(Layer(conv, batch_norm, q, stats))
        source, source_stats = q, stats
    return layers


def input_gradient(
    block: CRBlock, saved: Saved, dy: Tensor, wanted: bool = True
) -> tuple[Tensor, Rest]:
    """The gradient at the block's input, wanted or not."""
    x, dy = saved.x, dy.contiguous()
    tiles, grid = _tiles(x), (len(x) * _tiles(x).block["TILES"],)
    dz, dj, dx = (torch.empty_like(x) for _ in range(3))
    part = tiles.sums(4 * saved.ends.shape[1], x.device)
    pointwise.output_backward[grid](
        dy, x, saved.j, saved.join_stats, dz, part, tiles.programs, **tiles.block
    )
    join = finish_backward(tiles, tiles.programs, part, saved.join_stats, 0, saved.training)
    pointwise.join_backward[grid](
        saved.ends,
        saved.ends_stats,
        saved.j,
        saved.join_stats,
        join.coef[0],
        dz,
        _join(block).weight,
        dj,
        part,
        tiles.programs,
        CHANNELS=saved.ends.shape[1],
        **tiles.block,
    )
    ends = finish_backward(tiles, tiles.programs, part, saved.ends_stats, 2, saved.training)
    rest = Rest((ends.further, join.of_weight[0], join.of_bias[0]))
    branches = Branches(x.device)
    for p, path in enumerate(saved.paths):
        own = slice(CHANNELS * p, CHANNELS * (p + 1))
        weights = _join(block).weight.detach().flatten(1)[:, own]
        last = path[-1]
        gradient = host.Gradient(dj, last.q, last.stats, ends.coef[0, :, own], weights)
        of_norm = ends.of_weight[0, own], ends.of_bias[0, own]
        with branches.branch(p):
            gradients, of_norms = _path_back(tiles, path, gradient, of_norm, saved.training)
        rest.gradients.append(gradients)
        rest.of_norms.append(of_norms)
    branches.join()
    added = dz
    for path, gradients in zip(saved.paths, rest.gradients, strict=True):
        host.backward(tiles, gradients[0], path[0].conv.weight, dx, before=added)
        added = dx
    return dx, rest


def _path_back(
    tiles: host.Tiles,
    path: list[Layer],
    gradient: host.Gradient,
    of_norm: tuple[Tensor, Tensor],
    training: bool,
) -> tuple[list[host.Gradient], list[tuple[Tensor, Tensor]]]:
    """The way back through one path, from its end to its first convolution: of all its layers."""
    part = tiles.sums(2 * CHANNELS, gradient.g.device)
    gradients, of_norms = [gradient], [of_norm]
    for k in range(len(path) - 1, 0, -1):
        before, g = path[k - 1], torch.empty_like(path[k - 1].q)
        host.backward(
            tiles,
            gradients[0],
            path[k].conv.weight,
            g,
            before=before.q,
            before_stats=before.stats,
            part=part,
        )
        programs, _ = tiles.runs(path[k].conv.weight)
        found = finish_backward(tiles, programs, part, before.stats, 0, training)
        gradients.insert(0, host.Gradient(g, before.q, before.stats, found.coef[0]))
        of_norms.insert(0, (found.of_weight[0], found.of_bias[0]))
    return gradients, of_norms


def weight_gradients(block: CRBlock, saved: Saved, rest: Rest) -> list[Tensor]:
    """The gradients of all parameters, in the order of `block.parameters()`."""
    tiles = _tiles(saved.x)
    found: list[Tensor] = []
    branches = Branches(saved.x.device)
    for p, (path, gradients) in enumerate(zip(saved.paths, rest.gradients, strict=True)):
        x, x_stats = saved.x, None
        with branches.branch(p):
            for layer, gradient, of_norm in zip(path, gradients, rest.of_norms[p], strict=True):
                weight = layer.conv.weight
                found.append(host.weight_gradients(tiles, gradient, weight, x, x_stats=x_stats)[0])
                found += of_norm
                x, x_stats = layer.q, layer.stats
    branches.join()
    found += rest.of_join
    return [g.view_as(p) for g, p in zip(found, block.parameters(), strict=True)]


def _tiles(x: Tensor) -> host.Tiles:
    return host.Tiles(len(x), *x.shape[2:])


def _join(block: CRBlock) -> Conv2d:
    return cast(Conv2d, block.join[0])
