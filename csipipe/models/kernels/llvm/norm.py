"""BatchNorm between kernels: sums over a mini-batch in float64, and what follows from them.

In NumPy, whose operations on a few numbers take a fraction of PyTorch's time. Shapes: B images,
C channels, L lanes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from csipipe.models.kernels.llvm.sources import CONSTANT, MEAN, OF_Q, OF_Z, SCALE, SHIFT

Doubles = npt.NDArray[np.float64]


class Norm:
    """One BatchNorm over one mini-batch.

    Attributes:
        table: (6, C) float32, what kernels read (`sources`).
        of_weight, of_bias: (C,) gradients, once `backward` has been called.
    """

    def __init__(
        self, layer: nn.BatchNorm2d, mean: Doubles, variance: Doubles, values: int
    ) -> None:
        self.values, self.mean = values, mean
        self.inverse = 1 / np.sqrt(variance + layer.eps)
        self.scale = layer.weight.detach().numpy() * self.inverse
        self._table = np.empty((6, len(mean)), np.float32)
        self.table = torch.from_numpy(self._table)
        self._table[SCALE] = self.scale
        self._table[SHIFT] = layer.bias.detach().numpy() - mean * self.scale
        self._table[MEAN] = mean

    @classmethod
    def of_batch(cls, layer: nn.BatchNorm2d, moments: Tensor, counts: Doubles) -> Norm:
        """By the mini-batch's own statistics; the layer's running ones follow them.

        Args:
            moments: (B, 2, C, L) mean per image and lane, and sum of squares around it.
            counts: (L,) values in a lane of an image.
        """
        parts = moments.numpy()
        means, squares = parts[:, 0], parts[:, 1]
        values = int(counts.sum()) * len(means)
        mean = means.sum(0, dtype=np.float64) @ counts / values
        away = np.square(means - mean[:, None]).sum(0) @ counts
        variance = (squares.sum(0, dtype=np.float64).sum(-1) + away) / values
        _follow(layer.running_mean, mean, layer.momentum)
        _follow(layer.running_var, variance * (values / (values - 1)), layer.momentum)
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        return cls(layer, mean, variance, values)

    @classmethod
    def of_running(cls, layer: nn.BatchNorm2d) -> Norm:
        """By the layer's running statistics."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = layer.running_mean.numpy(), layer.running_var.numpy()
        return cls(layer, mean.astype(np.float64), variance.astype(np.float64), 0)

    def backward(self, of_one: Doubles, of_away: Doubles) -> None:
        """Take what the mini-batch's gradients sum up to.

        Args:
            of_one, of_away: (C,) sums of q and of q·(z − mean).
        """
        self.of_bias, self.of_weight = of_one, of_away * self.inverse
        slope = self.of_weight * self.inverse / self.values
        self._table[OF_Q] = self.scale
        self._table[OF_Z] = -self.scale * slope
        self._table[CONSTANT] = self.scale * (slope * self.mean - of_one / self.values)


def _follow(running: Tensor | None, found: Doubles, momentum: float | None) -> None:
    assert running is not None
    assert momentum is not None
    running.lerp_(torch.from_numpy(found.astype(np.float32)), momentum)


def totals(sums: Tensor) -> Doubles:
    """(…, C) totals over images and lanes of (B, …, C, L)."""
    found: Doubles = sums.numpy().sum(0, dtype=np.float64).sum(-1)
    return found
