"""PyTorch's fused Adam, without what loads PyTorch's compiler.

In torch.optim a group's entry, `step` and `zero_grad` import torch._dynamo, only to tell it that
they aren't to be compiled: three seconds of CPU in each process. Numbers and state are
`torch.optim.Adam`'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from csipipe.comm import trust

_STATE = ("step", "exp_avg", "exp_avg_sq")
_COPIED = 2**24
"""Parameters whose moments are copied at once, where they are kept in another type."""


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` with `fused=True`; arguments as its.

    Attributes:
        moments: type in which the moments are kept between steps; None: their parameter's. A step
            is computed with their parameter's type, and only then are they rounded.
    """

    moments: torch.dtype | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `torch.optim.Optimizer`."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient; or later, see `trust.if_sound`."""
        assert closure is None
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            if gradients:
                trust.if_sound(partial(self._step, group, gradients))

    def _together(self, stepping: Iterable[nn.Parameter]) -> Iterator[list[Any]]:
        """Parameters that step at once: all, or few where their moments are copied for it."""
        some: list[Any] = []
        for p in stepping:
            some.append(p)
            if self.moments is not None and sum(q.numel() for q in some) >= _COPIED:
                yield some
                some = []
        if some:
            yield some

    @torch.no_grad()
    def _step(
        self, group: dict[str, Any], gradients: dict[Any, Tensor], bad: Tensor | None
    ) -> None:
        # in one step: steps that are put off may run at the same time, each with copies of its own
        for stepping in self._together(gradients):
            self._step_together(group, stepping, [gradients[p] for p in stepping], bad)

    def _step_together(
        self,
        group: dict[str, Any],
        stepping: list[Any],
        gradients: list[Tensor],
        bad: Tensor | None,
    ) -> None:
        for p in stepping:
            if not self.state[p]:
                zeros = (torch.zeros_like(p, dtype=self.moments) for _ in range(2))
                values = torch.zeros(()).to(p.device), *zeros
                self.state[p].update(zip(_STATE, values, strict=True))
        steps, *kept = ([self.state[p][name] for p in stepping] for name in _STATE)
        # the same tensors unless they are kept in another type
        averages, squares = (
            [moment.to(p.dtype) for moment, p in zip(moments, stepping, strict=True)]
            for moments in kept
        )
        if bad is None:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [1 - bad] * len(steps))
        torch._fused_adam_(
            stepping,
            gradients,
            averages,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=bad,
        )
        if self.moments is not None:
            torch._foreach_copy_(kept[0], averages)
            torch._foreach_copy_(kept[1], squares)
