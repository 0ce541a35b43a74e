"""Whether a tensor from another party may be used: finite, and not absurdly large.

Its shape and type are those of the receive that was posted for it. A message that is too short
leaves the NaN that `mark` put at the end of the buffer, and a codec makes its scalars NaN. One pass
over the values is enough: the norm is finite only if all of them are (and, in fp32, none is above
1e19).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_postponed: list[Tensor] | None = None
"""Where the verdicts of checks go that nobody waits for; None: all are waited for."""


class BadMessage(ConnectionError):
    """A peer sent something that can't be used, and the run must stop."""


@contextlib.contextmanager
def postponed() -> Iterator[list[Tensor]]:
    """Within it all checks pass at once, and a device isn't waited for.

    Gives a list to which each check adds a truth value on its device: whether it holds.
    """
    global _postponed
    _postponed, before = [], _postponed
    try:
        yield _postponed
    finally:
        _postponed = before


def _holds(verdict: Tensor) -> bool:
    """Whether a check holds, as far as anybody waits for it."""
    if _postponed is None:
        return bool(verdict)
    _postponed.append(verdict)
    return True


def each_holds(verdicts: Tensor) -> list[bool]:
    """Which of some checks hold, (N,), as far as anybody waits for them."""
    if _postponed is None:
        found: list[bool] = verdicts.tolist()
        return found
    _postponed.append(verdicts.all())
    return [True] * len(verdicts)


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


def _rms(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=dtype).double()
    return norm / math.sqrt(max(1, rows.numel()))


def rms(rows: Tensor) -> float:
    """Root mean square of any tensor; NaN or infinite if one of its values is."""
    return float(_rms(rows))


def sound(rows: Tensor, limit: float) -> bool:
    """Whether a tensor is finite and its root mean square at most `limit`."""
    return _holds(_rms(rows) <= limit)


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
    if not named or _holds(torch.nn.utils.get_total_norm([grad for _, grad in named]).isfinite()):
        return
    for name, grad in named:
        if not math.isfinite(rms(grad)):  # or its square would be infinite in Adam's moments
            finite = grad.isfinite().all()
            what = f"values up to {float(grad.abs().max()):.3g}" if finite else fault(grad, 0.0)[6:]
            raise FloatingPointError(
                f"the gradient of {whose} {name} holds {what}; stopped before the optimiser's "
                "step. A lower train.lr usually helps."
            )


def check_loss(whose: str, loss: Tensor, parts: nn.Module) -> None:
    """Refuse an optimiser step after a loss that isn't finite.

    Not every such loss shows in the gradients: that of a hard sigmoid is 0 at NaN.

    Args:
        parts: what computed the loss, in order.

    Raises:
        FloatingPointError: naming the first layer whose weights aren't finite either.
    """
    if _holds(loss.isfinite().all()):
        return
    named = (*parts.named_parameters(), *parts.named_buffers())
    layer = next((f"{name} isn't finite" for name, t in named if not t.isfinite().all()), None)
    raise FloatingPointError(
        f"the loss of {whose} is {float(loss.detach().sum())} "
        f"({layer or 'its weights are finite'}); stopped before the optimiser's "
        "step. A lower train.lr usually helps."
    )
