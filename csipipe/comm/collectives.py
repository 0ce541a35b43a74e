"""What all ranks agree on: ledgers, batch counts, sums; and the stages' first contact."""

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


def connect_stages(
    rank: int, stages: int, device: torch.device, group: dist.ProcessGroup, backward: bool
) -> None:
    """Connect neighbouring stages, pair by pair, the way that messages go in `group`.

    NCCL connects two ranks at their first transfer and holds both up until it has; met in another
    order than the neighbour's, two stages would wait for each other forever.
    """
    greeting = torch.zeros(1, device=device if dist.get_backend(group) == "nccl" else "cpu")
    for source, target in greetings(stages, backward):
        if rank == source:
            dist.send(greeting, target, group)
        elif rank == target:
            dist.recv(greeting, source, group)


def greetings(stages: int, backward: bool) -> list[tuple[int, int]]:
    """(from, to) of the first message between neighbouring stages, pair by pair.

    NCCL connects each direction by itself: a greeting has to go the way that the group's messages
    will.
    """
    pairs = [(stage, stage + 1) for stage in range(stages - 1)]
    return [(later, earlier) for earlier, later in pairs] if backward else pairs
