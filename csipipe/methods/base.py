"""What every method's worker offers to the training loop, and what all methods share."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from csipipe.comm.ledger import Ledger
from csipipe.comm.world import World
from csipipe.measure.clock import Clock
from csipipe.measure.figures import Figures
from csipipe.measure.probe import Probe
from csipipe.methods.adam import Adam
from csipipe.methods.state import Unit
from csipipe.settings.config import TrainSettings

EvalRows = Literal["holdout", "test"]
"""Rows of an evaluation: each UE's own held-out training rows, or the common test set."""


class Worker(Protocol):
    """One rank's share of a method. Rank 0's worker returns figures, the others None."""

    parameters: dict[str, int]
    """Trainable scalars of `encoder`, `tail` and `head`."""
    notes: list[str]
    """What rank 0 tells the user before training, line by line."""
    device: torch.device
    """Where it computes."""
    clock: Clock
    """Where this rank's time goes while it trains."""
    probe: Probe
    """Shows this rank's gradients and reconstructions, on request."""
    dropped: list[int]
    """Training iterations that each UE was left out of; rank 0's count."""

    @property
    def has_holdout(self) -> bool:
        """Whether any UE holds out rows for choosing the best weights."""

    def train_iteration(self, iteration: int) -> Figures | None:
        """One iteration; figures of the UEs' batches before the step."""

    def evaluate(self, part: EvalRows) -> Figures | None:
        """Figures on `part`, BatchNorm by running statistics."""

    def agree(self, decision: bool) -> bool:
        """Rank 0's decision, on every rank."""

    def save_weights(self, folder: Path) -> None:
        """Write this rank's parts into `folder`."""

    def units(self) -> dict[str, Unit]:
        """What a checkpoint holds of this rank, by the part's name."""

    def exchanged(self) -> Ledger:
        """What crossed between UEs and BTS so far; collective."""

    def restore_ledger(self, ledger: Ledger) -> None:
        """Continue counting from what `exchanged` returned on all ranks."""


Builder = Callable[[World], Worker]
"""What a method prepares on a rank before the ranks meet."""


_FACTOR = "factor"


def adam(parts: Mapping[str, Iterable[nn.Parameter]], train: TrainSettings) -> Adam:
    """The optimiser of some parts (paper, eqs. 6–8); the loop sets the rate per iteration.

    Args:
        parts: parameters by the name of the part.
    """
    groups = [group(name, parameters, train) for name, parameters in parts.items()]
    return Adam(
        [one for one in groups if one["params"]],
        lr=train.lr,
        betas=train.betas,
        eps=1e-8,
        fused=True,
    )


def group(part: str, parameters: Iterable[nn.Parameter], train: TrainSettings) -> dict[str, Any]:
    """A part's parameters with its rate, to be added to an optimiser."""
    factor = train.rate_of(part)
    return {"params": list(parameters), "lr": train.lr * factor, _FACTOR: factor}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set Adam's rate for the next step: every part's, by its factor.

    On a GPU a rate is a tensor that stays where it is, so that a recorded step sees it change.
    """
    for one in optimizer.param_groups:
        rate, device = lr * one[_FACTOR], one["params"][0].device
        if isinstance(one["lr"], Tensor):
            one["lr"].fill_(rate)
        elif device.type == "cuda" and isinstance(optimizer, Adam):
            one["lr"] = torch.full((), rate, device=device)
        else:
            one["lr"] = rate


def adam_of_ues(parts: Mapping[str, Iterable[nn.Parameter]], train: TrainSettings) -> Adam:
    """The same with moments kept as `train.moments` says: of all UEs there may be many."""
    optimizer = adam(parts, train)
    optimizer.moments = {"fp32": None, "bf16": torch.bfloat16}[train.moments]
    return optimizer


def freeze(parts: nn.ModuleDict | Mapping[str, nn.Module], frozen: Container[str]) -> None:
    """No gradients for the parameters of the parts that are frozen."""
    for name, part in parts.items():
        if name in frozen:
            part.requires_grad_(False)


def learning(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of some parts that aren't frozen, be it by their own model."""
    return [p for part in parts for p in part.parameters() if p.requires_grad]


def shared_tensors(parts: Iterable[nn.Module]) -> list[list[Tensor]]:
    """What is exchanged of some parts: parameters that learn; BatchNorm's statistics, if any.

    How many batches those have seen is the same at every UE and isn't exchanged.
    """
    parts = list(parts)
    statistics = [b for part in parts for b in part.buffers() if b.is_floating_point()]
    found: list[list[Tensor]] = [[*learning(parts)], statistics]
    return [tensors for tensors in found if tensors]


def batches_of(rows: int, batch_size: int) -> int:
    """Batches that cover `rows`, the last one padded."""
    return -(-rows // batch_size)


def padded(h: Tensor, start: int, rows: int) -> Tensor:
    """Rows start … start+rows of `h` (B, 2, A, D), padded with zeros past its end."""
    part = h[start : start + rows]
    if len(part) == rows:
        return part
    return torch.cat([part, part.new_zeros(rows - len(part), *h.shape[1:])])
