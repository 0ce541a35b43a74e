"""CSILocal (Algorithm 1) on one rank, before the ranks meet: BTS half or UE half."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from csipipe.comm.topology import Topology
from csipipe.methods.base import Builder
from csipipe.methods.csilocal_bts import BtsHalf
from csipipe.methods.csilocal_ue import UeHalf
from csipipe.methods.half import Seat
from csipipe.methods.rows import load
from csipipe.pipeline import settings as deepspeed_settings
from csipipe.settings.config import Settings


def prepare(settings: Settings, rank: int, world_size: int, device: torch.device) -> Builder:
    """As `csipipe.methods.prepare`."""
    topology = Topology(world_size, settings.stages, settings.topology.ues)
    deepspeed = deepspeed_settings.load(settings.train.deepspeed, settings.train.precision)
    if topology.is_bts(rank):
        engine = import_engine(device)
        return lambda world: BtsHalf(Seat(settings, topology, world, device), deepspeed, engine)
    ues, test = load(settings, topology.ues_of(rank), device)
    return lambda world: UeHalf(Seat(settings, topology, world, device), ues, test)


def import_engine(device: torch.device) -> ModuleType:
    """Import DeepSpeed, on BTS ranks only, before the ranks meet: on a shared disk it is slow."""
    os.environ["DS_ACCELERATOR"] = device.type  # read at import
    if device.index is not None:  # DeepSpeed takes the local rank as the index of a GPU
        os.environ["LOCAL_RANK"] = str(device.index)
    from csipipe.pipeline import engine

    return engine
