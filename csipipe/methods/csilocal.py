"""CSILocal (Algorithm 1) on one rank, before the ranks meet: a BTS stage, UEs, or both."""

from __future__ import annotations

import os
from functools import partial
from types import ModuleType

import torch

from csipipe import models
from csipipe.comm.topology import Topology
from csipipe.methods import rank as ranks
from csipipe.methods.base import Builder
from csipipe.methods.csilocal_bts import BtsHalf
from csipipe.methods.csilocal_ue import UeHalf
from csipipe.methods.ends import decide
from csipipe.methods.rows import load
from csipipe.pipeline import schedule
from csipipe.pipeline import settings as deepspeed_settings
from csipipe.pipeline.schedule import Attempts, Instruction
from csipipe.settings.config import Settings


def plans(settings: Settings, topology: Topology) -> list[Attempts[Instruction]]:
    """An iteration, for every role."""
    train = settings.train
    return schedule.split_training(
        train.schedule,
        topology.stages,
        len(topology.ue_roles),
        train.micro_batches,
        train.on_bad_ue == "drop",
        train.frozen,
    )


def prepare(
    settings: Settings,
    rank: int,
    world_size: int,
    device: torch.device,
    stage: type[BtsHalf] = BtsHalf,
    end: type[UeHalf] = UeHalf,
    iteration: ranks.Plans = plans,
) -> Builder:
    """As `csipipe.methods.prepare`.

    Args:
        stage, end: what a method makes of a BTS stage, and of UEs.
        iteration: what they do, for every role.
    """
    models.check_stages(settings.model, settings.stages)
    role = partial(_role, stage, end)
    return ranks.prepare(role, iteration, settings, rank, world_size, device)


def _role(
    stage: type[BtsHalf],
    end: type[UeHalf],
    settings: Settings,
    topology: Topology,
    role: int,
    device: torch.device,
) -> ranks.Role:
    way = decide(settings, topology, device)
    if topology.is_bts(role):
        deepspeed = deepspeed_settings.load(settings.train.deepspeed, settings.train.precision)
        deepspeed = deepspeed_settings.on(deepspeed, device)
        engine, cuts = import_engine(device), cut_tail(settings)
        return partial(stage, deepspeed=deepspeed, engine=engine, way=way, cuts=cuts)
    ues, test = load(settings, topology.ues_of(role), device)
    return partial(end, ues=ues, test=test, way=way)


def cut_tail(settings: Settings) -> list[int] | None:
    """First layer of every stage, then the number of layers; None: to be measured.

    Call it after `import_engine`: it is DeepSpeed that cuts.

    Raises:
        ValueError: a stage without layers or without parameters.
    """
    if settings.partition == "measured":
        return None
    from csipipe.pipeline import partition

    return partition.cuts(models.sketch_tail(settings.model), settings.stages, settings.partition)


def import_engine(device: torch.device) -> ModuleType:
    """Import DeepSpeed, on BTS ranks only, before the ranks meet: on a shared disk it is slow."""
    os.environ["DS_ACCELERATOR"] = device.type  # read at import
    # DeepSpeed takes the local rank as the index of a GPU, and wants one without torchrun too
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    from csipipe.pipeline import engine

    return engine
