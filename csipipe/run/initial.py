"""Where a run's weights come from if not from its seed: another run's, or a file's (`train.init`).

Everything else is the new run's: rows, draws, Adam's moments, rates, codec, topology, method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from csipipe import models
from csipipe.methods import Worker
from csipipe.methods.cost import exchanged_parts
from csipipe.methods.state import BTS, whose
from csipipe.run import trained
from csipipe.run.trained import Trained
from csipipe.settings.commandline import argument
from csipipe.settings.config import ModelSettings, Settings

_ENDS = "encoder", "head"
_FREE = ("kernels_by", "start")
"""Settings of a model that may differ: they say how it is computed, and where its weights began."""


@dataclass(frozen=True)
class Initial:
    """Trained weights, for the UEs and the tail of another run."""

    source: Trained
    settings: Settings

    @property
    def known(self) -> range:
        """UEs of this run that the other one has."""
        return range(min(self.source.own.topology.ues, self.settings.topology.ues))

    @property
    def private(self) -> list[str]:
        """Which of encoder and head each UE has for itself; the others' start is the first UE's."""
        if not self.settings.spec.crosses:  # in one process, one model
            return []
        common = exchanged_parts(self.settings)
        return [part for part in _ENDS if part not in common]

    @property
    def note(self) -> str:
        """What is taken from where, in words."""
        ues, train = self.settings.topology.ues, self.settings.train
        private = self.private
        words = f"weights of {self.source.folder} ({self.source.state}): the tail"
        if common := [part for part in _ENDS if part not in private]:
            words += f", {' and '.join(common)} of UE 0 for all"
        if private:
            parts = f"{' and '.join(private)} of " if common else ""
            taken = f"UEs 0-{len(self.known) - 1}" if len(self.known) > 1 else "UE 0"
            words += f", {parts}{taken}"
        if private and ues > len(self.known):
            how = {"mean": "their mean", "fresh": "drawn by train.seed"}[train.newcomers]
            last = f"-{ues - 1}" if ues - 1 > len(self.known) else ""
            words += f"; {'UEs' if last else 'UE'} {len(self.known)}{last}: {how}"
        if train.frozen:
            words += f"; frozen: {', '.join(train.frozen)}"
        return words

    def give(self, worker: Worker) -> None:
        """Set this rank's share of the run up.

        Raises:
            ValueError: weights that are missing, damaged or of another model.
        """
        for name, unit in worker.units().items():
            (ue, layer), own = whose(name), unit.state()
            if name == BTS:  # what the UEs of a federated method have in common
                state = as_ranged(self._ue(0) | self._tail, own)
            elif ue is None:
                start = f"tail.{layer}."
                state = {
                    f"layer.{key.removeprefix(start)}": tensor
                    for key, tensor in self._tail.items()
                    if key.startswith(start)
                }
            else:
                state = (self._ue(ue) or own) | self._shared(ue) | self._tail
                state = as_ranged(state, own)
            try:
                unit.begin(state)
            except ValueError as error:
                raise ValueError(
                    f"train.init {self.source.source} doesn't fit this run: {error}."
                ) from error

    def _ue(self, ue: int) -> dict[str, Tensor]:
        """Encoder and head of a UE; of a fresh one none."""
        if ue in self.known:
            return self.source.ue_weights(ue)
        return self._mean if self.settings.train.newcomers == "mean" else {}

    def _shared(self, ue: int) -> dict[str, Tensor]:
        """What all UEs of this run's method exchange: the first UE's. What is frozen they keep."""
        common = tuple(f"{part}." for part in exchanged_parts(self.settings))
        return {k: v for k, v in self._ue(0).items() if k.startswith(common)} if ue else {}

    @cached_property
    def _tail(self) -> dict[str, Tensor]:
        return self.source.tail_weights()

    @cached_property
    def _mean(self) -> dict[str, Tensor]:
        """Of the known UEs; of a count the first one's."""
        every = [self.source.ue_weights(ue) for ue in self.known]
        return {
            name: torch.stack([one[name] for one in every]).mean(0)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in every[0].items()
        }


def as_ranged(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UE's weights for an encoder with a range (`csipipe.models.ranged`), or without one.

    Args:
        own: what the UE has; a range of its own is found in its first mini-batch.
    """
    mark = "encoder.learnt"
    if (mark in state) == (mark in own):
        return state
    if mark in own:
        inner = {k.replace("encoder.", "encoder.inner.", 1): v for k, v in state.items()}
        return {k: v for k, v in own.items() if k.startswith("encoder.")} | inner
    return {k.replace("encoder.inner.", "encoder.", 1): v for k, v in state.items()}


def read(settings: Settings) -> Initial | None:
    """What `train.init` names, if it names something; only settings are read yet.

    Raises:
        ValueError: no run, or weights of another model.
    """
    if settings.train.init is None:
        return None
    try:
        source = trained.read(Path(settings.train.init))
    except ValueError as error:
        raise ValueError(f"train.init: {error}") from error
    _check(source.own.model, settings.model, source.folder)
    return Initial(source, settings)


def _check(theirs: ModelSettings, ours: ModelSettings, folder: Path) -> None:
    """Refuse (ValueError) weights of another model."""
    for name, found in vars(theirs).items():
        wanted = getattr(ours, name)
        same = models.widths(theirs) == models.widths(ours) if name == "c2" else found == wanted
        if not same and name not in _FREE:
            raise ValueError(
                f"train.init {folder} holds a model with model.{name} {argument(found)}, this "
                f"run's has {argument(wanted)}. Give the same, or another train.init."
            )
