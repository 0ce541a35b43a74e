"""Process groups of the BTS stages: by NCCL or by gloo, and the stages' first contact in one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from csipipe.comm.patience import group_timeout
from csipipe.comm.world import World


def bts_group(world: World, stages: int, device: torch.device, timeout: float) -> dist.ProcessGroup:
    """Process group of the BTS ranks: NCCL where each of them owns a GPU, else gloo.

    Called on BTS ranks only. One stage alone has nobody to talk to: gloo, which needs nothing.
    """
    owner = stages > 1 and device.type == "cuda" and world.local_rank < torch.cuda.device_count()
    world.store.set(f"owns a GPU/{world.rank}", str(owner and dist.is_nccl_available()))
    owners = [
        world.read(f"owns a GPU/{rank}", rank, "whether it owns a GPU") == "True"
        for rank in range(stages)
    ]
    backend = "nccl" if all(owners) else "gloo"
    group: dist.ProcessGroup | None = dist.new_group(
        range(stages),
        timeout=group_timeout(backend, timeout),
        backend=backend,
        use_local_synchronization=True,
    )
    assert group is not None
    return group


def detours(stages: int, device: torch.device, group: dist.ProcessGroup) -> list[str]:
    """A note for the user if stages on GPUs communicate through the host."""
    if device.type == "cpu" or stages == 1 or dist.get_backend(group) == "nccl":
        return []
    reason = "NCCL refuses two ranks on one GPU"
    if not dist.is_nccl_available():
        reason = "this torch has no NCCL"
    return [
        f"the {stages} stages send activations through the host (gloo): {reason}. On one GPU "
        "topology.stages 1 is faster; on several, give each stage its own GPU."
    ]


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
