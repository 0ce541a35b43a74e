"""Linear layers only: what PCA can reach, by gradient descent, in seconds.

The best such model with c1 codeword entries projects on the first c1 principal components.
Shapes: B rows, A angles, D delays.
"""

from __future__ import annotations

from torch import nn

from csipipe.models.layers import Linear
from csipipe.settings.config import ModelSettings


def encoder(model: ModelSettings) -> nn.Sequential:
    """(B, 2, A, D) → (B, c1)."""
    return nn.Sequential(nn.Flatten(), Linear(model.reals, model.c1))


def tail(model: ModelSettings) -> list[nn.Module]:
    """(B, c1) → (B, 2·A·D), in two layers so that there may be two stages."""
    return [Linear(model.c1, model.c1), Linear(model.c1, model.reals)]


def head(model: ModelSettings) -> nn.Sequential:
    """The image, as it is: (B, 2·A·D) → (B, 2, A, D), not limited to [0, 1]."""
    return nn.Sequential(nn.Unflatten(1, model.image))
