"""The methods that can train the autoencoder, by the name that `method` gives them.

`prepare` does what a rank can do alone (checks, data), so that every mistake of the user shows
before the ranks meet; what it returns builds the rank's worker once they have.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import torch

from csipipe import channels
from csipipe.comm.topology import Topology
from csipipe.comm.world import World
from csipipe.methods import federated
from csipipe.methods.base import EvalRows, Worker
from csipipe.methods.centralised import Centralised
from csipipe.methods.csilocal_bts import BtsHalf
from csipipe.methods.csilocal_ue import UeHalf
from csipipe.methods.half import Seat
from csipipe.methods.ue import UserEquipment
from csipipe.pipeline import settings as deepspeed_settings
from csipipe.settings.config import Settings

__all__ = [
    "Centralised",
    "EvalRows",
    "Worker",
    "import_engine",
    "load",
    "manifest",
    "prepare",
]

Builder = Callable[[World], Worker]


def prepare(settings: Settings, rank: int, world_size: int, device: torch.device) -> Builder:
    """Check the topology, load this rank's data, and return what builds its worker.

    Raises:
        ValueError, OSError: settings, files or data that can't be used.
    """
    if settings.method == "centralised":
        return _prepare_centralised(settings, world_size, device)
    if settings.method != "csilocal":
        return _prepare_federated(settings, rank, world_size, device)
    topology = Topology(world_size, settings.stages, settings.topology.ues)
    deepspeed = deepspeed_settings.load(settings.train.deepspeed, settings.train.precision)
    if topology.is_bts(rank):
        engine = import_engine(device)
        return lambda world: BtsHalf(Seat(settings, topology, world, device), deepspeed, engine)
    ues, test = load(settings, topology.ues_of(rank), device)
    return lambda world: UeHalf(Seat(settings, topology, world, device), ues, test)


def _prepare_federated(
    settings: Settings, rank: int, world_size: int, device: torch.device
) -> Builder:
    if settings.stages != 1:
        raise ValueError(
            f"method {settings.method} aggregates on one BTS rank, but topology.stages is "
            f"{settings.topology.stages}; leave topology.stages out, or set it to 1."
        )
    topology = Topology(world_size, settings.stages, settings.topology.ues)
    if topology.is_bts(rank):
        return lambda world: federated.BtsHalf(Seat(settings, topology, world, device))
    ues, test = load(settings, topology.ues_of(rank), device)
    return lambda world: federated.UeHalf(Seat(settings, topology, world, device), ues, test)


def import_engine(device: torch.device) -> ModuleType:
    """DeepSpeed, on BTS ranks only, before the ranks meet: on a shared disk it takes a while."""
    os.environ["DS_ACCELERATOR"] = device.type  # read at import
    if device.index is not None:  # DeepSpeed takes the local rank for the number of a GPU
        os.environ["LOCAL_RANK"] = str(device.index)
    from csipipe.pipeline import engine

    return engine


def _prepare_centralised(settings: Settings, world_size: int, device: torch.device) -> Builder:
    if world_size != 1 or settings.topology.stages is not None:
        raise ValueError(
            f"method centralised runs the unsplit model in one process without BTS stages, but "
            f"there are {world_size} process(es) and topology.stages is "
            f"{settings.topology.stages}; start it with torchrun --nproc_per_node=1 and leave "
            "topology.stages out."
        )
    ues, test = load(settings, range(settings.topology.ues), device)
    return lambda world: Centralised(settings, ues, test, device)


def load(
    settings: Settings, numbers: range, device: torch.device
) -> tuple[list[UserEquipment], torch.Tensor]:
    """The UEs' private rows, and the common test set (B, 2, A, D)."""
    source, deal = _dealt(settings)
    ues = [
        UserEquipment(
            n, settings, *channels.load_ue(source, deal, n, settings.data.holdout), device
        )
        for n in numbers
    ]
    return ues, torch.from_numpy(channels.load_test(source, deal)).to(device)


def manifest(settings: Settings, rank: int, world_size: int) -> channels.Manifest | None:
    """Which rows are whose, on the rank that hosts UE 0; None on the others.

    A BTS rank may run where no data is, so rank 0 can't be the one.
    """
    if settings.method != "centralised":
        topology = Topology(world_size, settings.stages, settings.topology.ues)
        if rank != topology.ue_ranks[0]:
            return None
    source, deal = _dealt(settings)
    return channels.manifest_of(deal, settings.data.holdout, source)


def _dealt(settings: Settings) -> tuple[channels.Source, channels.Deal]:
    """Where the channels come from, and whose they are; no values are read yet."""
    data, model = settings.data, settings.model
    source = channels.open_source(data, model.angles, model.delays)
    return source, channels.deal(data, settings.topology.ues, source.available)
