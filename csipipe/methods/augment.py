"""Other channels from a UE's own, which its propagation could as well have made.

What is drawn comes from the UE's generator, so that it depends neither on the placement nor on a
resume. Shapes: B rows, A angles, D delays.
"""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import Tensor

ZERO = 0.5
"""What an image holds where the channel is zero."""


DRAWN = 2
"""Numbers that are drawn for a row: by how many angles it is shifted, and a phase in turns."""


def draw(ways: Container[str], angles: int, into: Tensor, generator: torch.Generator) -> None:
    """Shifts and phases for the `ways` of `train.augment` into (DRAWN, B); others stay."""
    rows = into.shape[1:]
    if "angle" in ways:
        into[0] = torch.randint(angles, rows, generator=generator)
    if "phase" in ways:
        into[1] = torch.rand(rows, generator=generator)


def augmented(h_BAD: Tensor, ways: Container[str], shift_B: Tensor, phase_B: Tensor) -> Tensor:
    """(B, 2, A, D) in [0, 1], each row changed by what was drawn for the `ways`."""
    if "angle" in ways:
        angles, by = h_BAD.shape[2], shift_B.long()
        places = (torch.arange(angles, device=h_BAD.device) - by[:, None]) % angles
        h_BAD = h_BAD.gather(2, places[:, None, :, None].expand_as(h_BAD))
    if "phase" in ways:
        by = 2 * math.pi * phase_B.float()
        real, imaginary = (h_BAD - ZERO).unbind(1)
        cosine, sine = by.cos()[:, None, None], by.sin()[:, None, None]
        turned = (cosine * real - sine * imaginary, sine * real + cosine * imaginary)
        # a strong real may leave the interval when it takes over the imaginary part's share
        h_BAD = (torch.stack(turned, 1) + ZERO).clamp(0, 1)
    return h_BAD
