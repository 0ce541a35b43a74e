"""A model of one's own: what `--model.name mymodel:build` calls."""

from torch import nn

from csipipe.models.layers import Conv2d, Linear  # as PyTorch's, weight gradients can wait


class Block(nn.Module):
    """A residual block: (B, 2, A, D) → (B, 2, A, D)."""

    def __init__(self, channels):
        super().__init__()
        self.path = nn.Sequential(
            Conv2d(2, channels, (3, 3), bias=True),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout2d(0.05),
            Conv2d(channels, 2, (5, 5), bias=True),
        )

    def forward(self, x):
        return x + self.path(x)


def build(angles, delays, c1, c2):
    """Encoder, layers of the tail, head; c2 is None where model.c2 is null."""
    image, reals = (2, angles, delays), 2 * angles * delays
    encoder = nn.Sequential(nn.Flatten(), Linear(reals, c1))
    tail = [Linear(c1, reals), nn.Unflatten(1, image), Block(8), Block(8), nn.Flatten()]
    head = nn.Sequential(nn.Unflatten(1, image), Conv2d(2, 2, (3, 3), bias=True), nn.Sigmoid())
    return encoder, tail, head
