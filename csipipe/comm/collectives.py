"""What all ranks agree on: ledgers, batch counts, sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from csipipe.comm.blame import EVERYONE, watch
from csipipe.comm.ledger import Ledger


def merged(ues: Ledger, bts: Ledger) -> Ledger:
    """The UEs' ledger, summed over all ranks; collective.

    Args:
        ues, bts: what this rank counted in each role; zeros in one that it doesn't have.

    Raises:
        RuntimeError: the BTS counted something else.
    """
    sides = torch.stack([ues.counts, bts.counts])
    with watch("comparing ledgers with all ranks", EVERYONE, "their ledgers"):
        dist.all_reduce(sides)
    if not torch.equal(sides[0], sides[1]):
        raise RuntimeError("the ledgers of the UEs and the BTS differ: a message was lost.")
    found = Ledger(ues.counts.shape[2])
    found.counts = sides[0]
    return found


def largest(values: Sequence[int]) -> list[int]:
    """Element-wise maximum over all ranks; collective."""
    tensor = torch.tensor(values, dtype=torch.int64)
    with watch("agreeing with all ranks", EVERYONE, "their values"):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def total(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place, of a tensor on the host; collective.

    Exact where each element is a number on one rank and zero on the others.
    """
    with watch("adding up over all ranks", EVERYONE, "their values"):
        dist.all_reduce(values)
    return values
