"""A look at what a rank computes, where it computes it, and only on request.

Nothing is copied, waited for or changed unless a figure is requested, so a run computes the same
with and without probing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


class Probe:
    """What the methods show of one rank.

    Args:
        ue: the UE whose reconstructions are kept.

    Attributes:
        apart: iterations from one look at gradients to the next, at least: they may cost much.
        gradients_wanted: record the gradients of the optimiser's next steps.
        unseen: nobody looks at anything between the next iteration and the one after it, not even
            at gradients of the latter: a rank may begin it before it has the figures of the former.
        rows_wanted: how many reconstructions to keep from here on; 0: none.
        seconds: what probing has taken so far.
    """

    def __init__(self, ue: int = 0) -> None:
        self.ue = ue
        self.apart = 1
        self.gradients_wanted = False
        self.unseen = False
        self.rows_wanted = 0
        self.seconds = 0.0
        self._norms: dict[str, list[Tensor]] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def gradients(self, parts: Mapping[str, nn.Module]) -> None:
        """Record gradients by part; called right before a step, once for each UE of the rank."""
        if not self.gradients_wanted:
            return
        started = time.perf_counter()
        for name, part in parts.items():
            found = [p.grad for p in part.parameters() if p.grad is not None]
            if found:
                self._norms.setdefault(name, []).append(get_total_norm(found))
        self.seconds += time.perf_counter() - started

    def norms(self) -> dict[str, float]:
        """L2 norm of each part's gradient, mean over what was recorded since the last call."""
        noted, self._norms = self._norms, {}
        return {name: float(torch.stack(norms).mean()) for name, norms in noted.items()}

    def reconstructed(self, ue: int, h_BAD: Tensor, h_hat_BAD: Tensor) -> None:
        """Record rows (B, 2, A, D) of an evaluation and their reconstructions."""
        if ue != self.ue or self.rows_wanted <= 0 or not len(h_BAD):
            return
        started = time.perf_counter()
        rows = slice(0, self.rows_wanted)
        self._pairs.append((h_BAD[rows].clone(), h_hat_BAD[rows].detach().float().clone()))
        self.rows_wanted -= len(self._pairs[-1][0])
        self.seconds += time.perf_counter() - started

    def reconstructions(self) -> tuple[Tensor, Tensor] | None:
        """The recorded rows and their reconstructions, on the host; None: there are none.

        They are forgotten afterwards.
        """
        pairs, self._pairs, self.rows_wanted = self._pairs, [], 0
        if not pairs:
            return None
        h, h_hat = (torch.cat(side).cpu() for side in zip(*pairs, strict=True))
        return h, h_hat
