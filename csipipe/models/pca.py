"""Where a model starts from each UE's own principal components instead of random weights.

The encoder projects a row on the leading components of the UE's rows, the tail passes codewords on
as they are, and the head puts the row together again: all that PCA reaches without any exchange,
from which training goes on. Bases differ between UEs; the tail need not know them. Every
non-linear step starts on a side where it changes nothing: LeakyReLUs see positive values, CRBlocks
add nothing yet. Shapes: B rows, A angles, D delays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe.models.crblock import CRBlock
from csipipe.models.layers import Conv2d, Linear
from csipipe.models.norm import BatchNorm2d

ROWS = 8192
"""Rows that components are found from, at most."""
_SPREAD = 0.3
"""Root mean square of a codeword's entries."""
_IMAGE, _SHIFT = 0.14, 0.5
"""Root mean square and mean of the values inside the tail. Adam moves all weights of a sum
alike at first, by as much as the values have in common: small ones keep what training starts
from."""
_NORMED = 0.02
"""Factor of the encoder's BatchNorm, for the same reason."""
_MORE = 32
"""Components beyond those wanted, which a randomised search needs."""


def components(rows: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N,), leading components (N, number), orthonormal, and the variance along each.

    Where rows have fewer, the rest are any directions at right angles to them.

    Args:
        rows: (B, N).
    """
    rows = rows[:: -(-len(rows) // ROWS)]
    mean = rows.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = min(number + _MORE, *rows.shape)
        _, sizes, basis = torch.svd_lowrank(rows - mean, wanted, niter=4)
        if wanted < number:
            others = torch.randn(len(mean), number - wanted).to(rows)
            basis = torch.linalg.qr(torch.cat([basis, others], 1)).Q
            sizes = torch.cat([sizes, sizes.new_zeros(number - wanted)])
    return mean, basis[:, :number], sizes[:number].square() / len(rows)


@torch.no_grad()
def start_ends(encoder: nn.Module, head: nn.Module, rows: Tensor) -> None:
    """Set encoder and head of `csipipe.models.csilocal`, on any device, by a UE's rows.

    Args:
        rows: (B, 2, A, D) in [0, 1], on the CPU.
    """
    convolution, norm, _, _, project = encoder.children()
    rebuild = next(head.children())
    assert isinstance(convolution, Conv2d)
    assert isinstance(norm, BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert isinstance(project, Linear)
    assert isinstance(rebuild, Linear)
    codeword, known = project.out_features, min(project.out_features, rebuild.in_features)
    mean, basis, variance = components(rows.flatten(1) - 0.5, codeword)
    scale = _SPREAD * (codeword / variance.sum().clamp_min(1e-12)).sqrt()

    _pass_on(convolution)
    centre, spread = rows.mean((0, 2, 3)), rows.var((0, 2, 3)).add(norm.eps).sqrt()
    largest = ((rows - centre[:, None, None]).abs().amax((0, 2, 3)) / spread).max()
    norm.weight.fill_(_NORMED)
    shift = _NORMED * largest  # not read back from norm.bias, which may be on another device
    norm.bias.fill_(shift)
    norm.running_mean.copy_(centre)
    norm.running_var.copy_(spread.square())
    of_pixel = [x[:, None, None].expand(rows.shape[1:]).flatten() for x in (spread, centre)]
    back, offset = of_pixel[0] / _NORMED, of_pixel[1] - shift * of_pixel[0] / _NORMED
    project.weight.copy_(scale * basis.t() * back)
    project.bias.copy_(scale * (basis.t() @ (offset - 0.5 - mean)))

    rebuild.weight.zero_()
    rebuild.weight[:, :known] = 6 / scale * basis[:, :known]  # the hard-sigmoid is x/6 + 1/2
    rebuild.bias.copy_(6 * mean)


@torch.no_grad()
def start_tail(tail: list[nn.Module]) -> None:
    """Make the layers of `csipipe.models.csilocal`'s tail pass codewords on.

    Of c2 outputs that are more than c1, the others start as they were drawn: the heads begin
    without them. If they are fewer, the last entries of a codeword are left out.
    """
    spread, last = tail[0], tail[-1]
    assert isinstance(spread, Linear)
    assert isinstance(last, Linear)
    codeword, known = spread.in_features, min(spread.in_features, last.out_features)
    basis = torch.linalg.qr(spread.weight).Q
    factor = _IMAGE / _SPREAD * (len(basis) / codeword) ** 0.5
    spread.weight.copy_(factor * basis)
    spread.bias.fill_(_SHIFT)
    last.weight[:known] = basis.t()[:known] / factor
    last.bias[:known] = -_SHIFT * last.weight[:known].sum(1)
    for layer in tail:
        if isinstance(layer, Conv2d):
            _pass_on(layer)
        if isinstance(layer, CRBlock):
            norm = layer.join[1]
            assert isinstance(norm, BatchNorm2d)
            norm.weight.zero_()


def _pass_on(layer: Conv2d) -> None:
    """Let a convolution give back what it gets."""
    nn.init.dirac_(layer.weight)
    assert layer.bias is not None
    layer.bias.zero_()
