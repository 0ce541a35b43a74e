"""Which rows a rank's UEs get, and the common test set."""

from __future__ import annotations

import torch

from csipipe import channels
from csipipe.comm.topology import Topology
from csipipe.methods.ue import UserEquipment
from csipipe.settings.config import Settings


def load(
    settings: Settings, numbers: range, device: torch.device
) -> tuple[list[UserEquipment], torch.Tensor]:
    """The UEs' private rows, and the common test set (B, 2, A, D).

    Raises:
        ValueError, OSError: as `channels.load_ue` and `channels.check_values`.
    """
    source, deal = channels.dealt(settings)
    data = settings.data
    ues = []
    for n in numbers:
        train, held = channels.load_ue(source, deal, n, data.holdout)
        channels.check_values(train, f"data.source {data.source}, rows of UE {n}", data.accept)
        ues.append(UserEquipment(n, settings, train, held, device))
    test = channels.rows_of(source, deal.test)
    channels.check_values(test, f"data.source {data.source}, test rows", data.accept)
    return ues, torch.from_numpy(test).to(device)


def manifest(settings: Settings, rank: int, world_size: int) -> channels.Manifest | None:
    """Which rows belong to whom, on the rank that hosts UE 0; None on the others.

    A BTS rank may run where there is no data, so rank 0 can't tell.
    """
    if rank != Topology.first_host(settings, world_size):
        return None
    source, deal = channels.dealt(settings)
    return channels.manifest_of(deal, settings.data.holdout, source)
