"""Whether two results are the same to the last bit, and where they aren't."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def difference(one: Any, other: Any, place: str = "") -> str:
    """Where two results differ first, such as `/losses/3`; empty if they are the same.

    Args:
        one, other: tensors, numbers and texts, in dictionaries and lists of any depth.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{place}: only one has {sorted(one.keys() ^ other.keys())}"
        names = list(one)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{place}: {len(one)} and {len(other)} entries"
        names = list(range(len(one)))
    else:
        return "" if _same(one, other) else place or "/"
    inner = (difference(one[name], other[name], f"{place}/{name}") for name in names)
    return next(filter(None, inner), "")


def assert_same(one: Any, other: Any, *keys: str) -> None:
    """Two results are there and the same; of dictionaries with `keys`, these entries are."""
    if keys:
        one, other = ({key: result[key] for key in keys} for result in (one, other))
        assert all(len(value) for value in one.values()), "there is nothing to compare"
    assert not difference(one, other), difference(one, other)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    if not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)  # of bytes: NaN is NaN, and -0 isn't 0
