"""CRBlock: CRNet's residual block of parallel convolution paths.

Source: Lu, Wang, Song, "Multi-resolution CSI feedback with deep learning in massive MIMO
system", ICC 2020 (reference [28] of the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe.models import kernels
from csipipe.models.layers import Conv2d, Deferring, Pointwise, fused
from csipipe.models.norm import BatchNorm2d
from csipipe.settings.config import Kernel, KernelsBy

CHANNELS = 7
"""Channels inside a CRBlock's paths, as in CRNet."""
SLOPE = 0.3
"""Negative slope of every LeakyReLU in the model."""


def conv_bn(
    inputs: int, outputs: int, kernel: Kernel, kernels_by: KernelsBy = "torch"
) -> nn.Sequential:
    """Convolution that keeps the image's size, then BatchNorm (which makes a bias unnecessary)."""
    if kernel == (1, 1):
        return nn.Sequential(Pointwise(inputs, outputs), BatchNorm2d(outputs))
    convolution = Conv2d(inputs, outputs, kernel, bias=False, kernels_by=kernels_by)
    return nn.Sequential(convolution, BatchNorm2d(outputs))


class CRBlock(Deferring):
    """Parallel paths of convolutions, joined by a 1×1 convolution, added to the input.

    Computed by fused kernels where there are some (`csipipe.models.kernels`), else by PyTorch's
    layers. There activations overwrite their input, which isn't needed again (BatchNorm keeps its
    own input): the same numbers, with a third less memory for the backward pass.

    (B, 2, A, D) → (B, 2, A, D), with A angles and D delays. 1,425 parameters with CRNet's
    kernels (3×3, 1×9, 9×1 beside 1×5, 5×1).
    """

    in_channels = 2

    def __init__(
        self, paths: tuple[tuple[Kernel, ...], ...], kernels_by: KernelsBy = "auto"
    ) -> None:
        super().__init__()
        self.kernels_by = kernels_by
        self.shape = tuple(tuple((high, wide) for high, wide in path) for path in paths)
        self.paths = nn.ModuleList(self._path(path) for path in paths)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.join = conv_bn(CHANNELS * len(paths), 2, (1, 1))

    def fresh(self) -> CRBlock:
        """A new block of this shape."""
        return CRBlock(self.shape, self.kernels_by)

    @staticmethod
    def _path(kernels: tuple[Kernel, ...]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            if i:  # an activation between convolutions; the one after the path is applied jointly
                layers.append(nn.LeakyReLU(SLOPE, inplace=True))
            layers.append(conv_bn(CHANNELS if i else 2, CHANNELS, kernel))
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        backend = kernels.choose(self, x).backend
        if backend is not None:
            return fused(self, backend, x)
        joined = self.join(self.act(torch.cat([path(x) for path in self.paths], dim=1)))
        out: Tensor = self.act(joined.add_(x))
        return out
