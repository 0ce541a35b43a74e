"""Makes DeepSpeed believe that the BTS ranks are the whole world.

`PipelineModule` takes the world's size as the pipeline's; in ours, UE ranks share the world.
DeepSpeed sends everything through one backend object, so a subclass that answers with the BTS
group wherever no group is named is enough. The BTS has ranks 0 … S-1, so ranks have the same
numbers inside and outside, and nothing is translated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed.comm.comm as ds_comm
import torch
import torch.distributed as dist
from deepspeed.comm.backend import Backend
from deepspeed.comm.torch import TorchBackend

from csipipe.comm.patience import group_timeout


class SubWorld(TorchBackend):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's communication backend, confined to the BTS's process group."""

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        # not TorchBackend.__init__: it compiles an extension and initialises a world of its own
        Backend.__init__(self, name="csipipe", rank=dist.get_rank(group), size=group.size())
        self.group = group
        self.timeout = group_timeout(dist.get_backend(group), timeout)
        self.all_gather_function = self.get_all_gather_function()
        self.reduce_scatter_function = self.get_reduce_scatter_function()
        self.initialized = True

    def get_rank(self, group: dist.ProcessGroup | None = None) -> int:
        return dist.get_rank(group or self.group)

    def get_world_size(self, group: dist.ProcessGroup | None = None) -> int:
        return dist.get_world_size(group or self.group)

    def get_world_group(self) -> dist.ProcessGroup:
        return self.group

    def new_group(self, ranks: Iterable[int]) -> dist.ProcessGroup | None:
        members = list(ranks)
        if dist.get_rank() not in members:
            return None
        group: dist.ProcessGroup | None = dist.new_group(
            members,
            timeout=self.timeout,  # groups don't inherit it
            backend=dist.get_backend(self.group),
            use_local_synchronization=True,  # the UE ranks don't take part
        )
        return group

    def barrier(self, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
        return dist.barrier(group or self.group, **kwargs)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        staged = self._stage(tensor, group)
        work = dist.all_reduce(
            staged, self._reduce_op(op), group or self.group, async_op and staged is tensor
        )
        self._unstage(tensor, staged)
        return work

    def broadcast(
        self,
        tensor: torch.Tensor,
        src: int,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        staged = self._stage(tensor, group)
        work = dist.broadcast(staged, src, group or self.group, async_op and staged is tensor)
        self._unstage(tensor, staged)
        return work

    def send(
        self, tensor: torch.Tensor, dst: int, group: dist.ProcessGroup | None = None, tag: int = 0
    ) -> None:
        dist.send(self._stage(tensor, group), dst, group or self.group, tag)

    def recv(
        self,
        tensor: torch.Tensor,
        src: int | None = None,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
    ) -> int:
        staged = self._stage(tensor, group)
        source = dist.recv(staged, src, group or self.group, tag)
        self._unstage(tensor, staged)
        return source

    def _stage(self, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Host copy of a GPU tensor if the group is gloo's, which can't send those."""
        gloo = dist.get_backend(group or self.group) == "gloo"
        return tensor.cpu() if gloo and tensor.is_cuda else tensor

    @staticmethod
    def _unstage(tensor: torch.Tensor, staged: torch.Tensor) -> None:
        if staged is not tensor:
            tensor.copy_(staged)


def install(group: dist.ProcessGroup, timeout: float) -> None:
    """Confine DeepSpeed's communication to the BTS ranks of `group`."""
    ds_comm.cdb = SubWorld(group, timeout)
