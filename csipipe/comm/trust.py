"""Whether a tensor from another party may be used: finite, and not absurdly large.

Its shape and type are those of the receive that was posted for it. A message that is too short
leaves the NaN that `mark` put at the end of the buffer, and a codec makes its scalars NaN. One pass
over the values is enough: the norm is finite only if all of them are (and, in fp32, none is above
1e19).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from csipipe.branches import Branches

Step = Callable[[Tensor | None], None]
"""An optimiser's step. Its argument lies on the device: 1 if nothing is to change, else 0; None:
everything is as it should be."""


class Postponed:
    """Checks whose verdicts nobody waits for, and what must only be done if they hold.

    Attributes:
        numbers: on their device; by the most that they may be, and their type.
        steps: optimisers' steps.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[float, torch.dtype], list[Tensor]] = {}
        self.steps: list[Step] = []

    def finish(self, sound: Tensor) -> None:
        """Do the steps, unless a check doesn't hold; neither the device nor a value is waited for.

        Args:
            sound: a truth value on the device; false afterwards if a check doesn't hold.
        """
        for (most, _), numbers in self.numbers.items():
            sound.logical_and_((torch.stack(numbers) <= most).all())
        bad = sound.logical_not().float()
        branches = Branches(sound.device)
        for number, step in enumerate(self.steps):
            with branches.branch(number):
                step(bad)
        branches.join()


_postponed: Postponed | None = None
"""Where checks go; None: they are waited for."""


class BadMessage(ConnectionError):
    """A peer sent something that can't be used, and the run must stop."""


@contextlib.contextmanager
def postponed() -> Iterator[Postponed]:
    """Within it all checks pass at once, and a device isn't waited for."""
    global _postponed
    _postponed, before = Postponed(), _postponed
    try:
        yield _postponed
    finally:
        _postponed = before


def if_sound(step: Step) -> None:
    """Do a step: now, as checks that didn't hold have raised errors, or once all have a verdict."""
    if _postponed is None:
        step(None)
    else:
        _postponed.steps.append(step)


def _at_most(number: Tensor, most: float = math.inf) -> bool:
    """Whether a number on a device is finite and so small, as far as anybody waits for it."""
    most = min(most, torch.finfo(number.dtype).max)
    if _postponed is None:
        return bool(number <= most)
    _postponed.numbers.setdefault((most, number.dtype), []).append(number)
    return True


def each_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Which of U are finite, of tensors (U, …), as far as anybody waits for it."""
    if _postponed is not None:
        _at_most(torch.nn.utils.get_total_norm(tensors))
        return [True] * len(tensors[0])
    norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in tensors]
    found: list[bool] = torch.stack(norms).isfinite().all(0).tolist()
    return found


def mark(rows: Tensor) -> None:
    """Make the last scalar of a buffer NaN, until a whole message overwrites it.

    Bytes end with a number in fp32.
    """
    _last(rows).fill_(float("nan"))


def unended(payload: Tensor) -> str:
    """A remark on bytes whose end hasn't been overwritten, or is no number; else nothing."""
    ended = payload.is_floating_point() or not _last(payload).isnan()
    return "" if ended else " (its last scale: it may be shorter than agreed)"


def _last(payload: Tensor) -> Tensor:
    """The last number of a payload."""
    flat = payload.view(-1)
    return flat[-1:] if payload.is_floating_point() else flat[-4:].view(torch.float32)


def _norm(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=dtype)
    return norm


def _root(rows: Tensor) -> float:
    """What a norm is of the root mean square."""
    return math.sqrt(max(1, rows.numel()))


def rms(rows: Tensor) -> float:
    """Root mean square of any tensor; NaN or infinite if one of its values is."""
    return float(_norm(rows)) / _root(rows)


def sound(rows: Tensor, limit: float) -> bool:
    """Whether a tensor is finite and its root mean square at most `limit`."""
    return _at_most(_norm(rows), limit * _root(rows))


def fault(rows: Tensor, limit: float) -> str:
    """What is wrong with a tensor that isn't sound."""
    where = (~rows.isfinite()).flatten().nonzero()
    if not len(where):
        return f"has root mean square {rms(rows.double()):.3g}, above train.max_rms {limit:.3g}"
    first = int(where[0])
    value = float(rows.flatten()[first])
    text = f"holds {value} in {len(where)} of {rows.numel()} scalars, first at scalar {first}"
    if where.numel() == 1 and first == rows.numel() - 1:
        text += " (the last: it may be shorter than agreed)"
    return text


def check_gradients(whose: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse an optimiser step with a gradient that isn't finite, or about 1e19; one norm over all.

    Raises:
        FloatingPointError: naming the first layer with such a gradient.
    """
    named = [(name, p.grad) for name, p in parameters if p.grad is not None]
    if not named or _at_most(torch.nn.utils.get_total_norm([grad for _, grad in named])):
        return
    for name, grad in named:
        if not math.isfinite(rms(grad)):  # or its square would be infinite in Adam's moments
            what = f"holds values up to {float(grad.abs().max()):.3g}"
            if not grad.isfinite().all():
                what = fault(grad, 0.0)
            raise FloatingPointError(
                f"the gradient of {whose} {name} {what}; stopped before the optimiser's step. A "
                "lower train.lr usually helps."
            )


def check_loss(whose: str, loss: Tensor, parts: nn.Module) -> None:
    """Refuse an optimiser step after a loss that isn't finite.

    Not every such loss shows in the gradients: that of a hard sigmoid is 0 at NaN.

    Args:
        parts: what computed the loss, in order.

    Raises:
        FloatingPointError: naming the first layer whose weights aren't finite either.
    """
    if _at_most(torch.linalg.vector_norm(loss.detach(), math.inf)):
        return
    named = (*parts.named_parameters(), *parts.named_buffers())
    layer = next((f"{name} isn't finite" for name, t in named if not t.isfinite().all()), None)
    raise FloatingPointError(
        f"the loss of {whose} is {float(loss.detach().sum())} "
        f"({layer or 'its weights are finite'}); stopped before the optimiser's "
        "step. A lower train.lr usually helps."
    )
