"""BatchNorm of few channels, as fast on a GPU as its memory allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe.models import kernels
from csipipe.models.layers import Pending, fused
from csipipe.settings.config import KernelsBy


class BatchNorm2d(nn.BatchNorm2d):
    """(B, C, A, D) → (B, C, A, D), numbers and state as PyTorch's.

    On a GPU by a fused kernel where there is one. cuDNN gives each channel of an image one of a
    GPU's multiprocessors: with 4000 images of 7 channels an H100 takes 7.5 ms forward and
    backward, and 0.8 ms with the channels last.
    """

    kernels_by: KernelsBy = "auto"
    pending: list[Pending] | None = None
    """None: its weights' gradients don't wait."""
    wide = True

    @property
    def shape(self) -> int:
        return self.num_features

    def fresh(self) -> BatchNorm2d:
        """A new layer of this shape."""
        return BatchNorm2d(self.num_features, self.eps, self.momentum)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            backend = kernels.choose(self, x).backend
            if backend is not None:
                return fused(self, backend, x)
            if x.device.type == "cuda":
                return self.channels_last(x)
        return super().forward(x)

    def channels_last(self, x: Tensor) -> Tensor:
        """The same by way of images whose channels lie side by side."""
        y = super().forward(x.contiguous(memory_format=torch.channels_last))
        return y.contiguous()
