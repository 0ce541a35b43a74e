"""What a run has learnt: every UE's encoder, decoder tail and head, from the run's directory.

A run that ended left `weights/`. One that is in progress or was interrupted has checkpoints, of
which the newest complete one is taken. Only reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import channels, checkpoint, models
from csipipe.channels import Manifest, Source, Span
from csipipe.methods.common import shared_modules
from csipipe.methods.replica import split
from csipipe.methods.state import BTS, layer_name, meant, ue_name
from csipipe.models.ranged import ranged
from csipipe.run import card
from csipipe.run.resuming import BEFORE, CONFIG, ended
from csipipe.settings import commandline
from csipipe.settings.commandline import argument
from csipipe.settings.config import ModelSettings, Settings

LAST, BEST = "last", "best"
HANDED_ON = "handed on"


class Autoencoder(nn.Module):
    """One UE's whole model, unsplit: (B, 2, A, D) in [0, 1] → the same."""

    def __init__(self, model: ModelSettings, tail: nn.Sequential, bits: int | None = None) -> None:
        """`bits`: those for which every entry of the codeword was trained; None: for none."""
        super().__init__()
        entries, _ = models.widths(model)
        self.encoder = ranged(models.build_encoder(model, 0), entries, bits)
        self.tail = tail
        self.head = models.build_head(model, 0)

    def forward(self, h_BAD: Tensor) -> Tensor:
        """(B, 2, A, D) → (B, 2, A, D)."""
        h_hat: Tensor = self.head(self.tail(self.encoder(h_BAD)))
        return h_hat


@dataclass(frozen=True)
class Trained:
    """A run's weights on disk.

    Attributes:
        folder: the run's directory.
        settings: the run's, with the caller's changes.
        own: the run's.
        source: where the weights are: a folder of weights, or of a checkpoint.
        iteration: after which they were taken; None: unknown (weights without a summary, or a copy
            of `checkpoints/best` that is no link any more).
        status: finished, stopped, or unfinished: in progress, or interrupted; or handed on: it is
            no run, but a folder of weights with a card.
    """

    folder: Path
    settings: Settings
    own: Settings
    source: Path
    iteration: int | None
    status: str

    @property
    def state(self) -> str:
        """Which weights these are, in words."""
        if self.iteration is None:
            return f"{self.source.name}, run {self.status}"
        of = self.settings.train.iterations
        return f"iteration {self.iteration} of {of}, run {self.status}"

    @property
    def finished(self) -> bool:
        """Whether training has come to its end."""
        of = self.settings.train.iterations
        whole = self.status == HANDED_ON and self.iteration is not None and self.iteration >= of
        return whole or self.status == "finished"

    @property
    def elsewhere(self) -> bool:
        """Whether the caller's changes put it on other data than it was trained on; more or fewer
        rows, or another seed, are no other data."""
        mine, theirs = self.own.data, self.settings.data
        names = ("source", "path", "where", "kind")
        return any(getattr(mine, name) != getattr(theirs, name) for name in names)

    def dealt(self) -> tuple[Source, tuple[tuple[Span, ...], ...]]:
        """Where its rows come from, and which of them every UE trained on.

        Weights that were handed on don't say which rows were whose: they are dealt anew.

        Raises:
            ValueError, OSError: the rows can't be read, or aren't those that the run had.
        """
        if self.status == HANDED_ON:
            source, deal = channels.dealt(self.settings)
            return source, deal.ues
        data, model = self.settings.data, self.settings.model
        source = channels.open_source(data, model.angles, model.delays)
        manifest = Manifest.read(self.folder)
        manifest.check(source)
        return source, manifest.train

    def models(self, ues: Sequence[int] | None = None) -> list[Autoencoder]:
        """Models of some UEs (None: all), in evaluation mode on the CPU; the tail is one object.

        UEs whose weights equal the first one's share its model.

        Raises:
            ValueError: weights that are missing, damaged or of another model; the file is named, or
                the caller's change that makes it another model.
        """
        model = self.settings.model
        tail = nn.Sequential(*models.build_tail(model, 0))
        ues = range(self.settings.topology.ues) if ues is None else ues
        self._fill(tail, self._tail_state(), "tail", self.source)
        found: list[Autoencoder] = []
        for ue in ues:
            mine = Autoencoder(model, tail, self.settings.feedback_bits)
            state, file = self._ue_state(ue)
            for part in ("encoder", "head"):
                self._fill(getattr(mine, part), state, part, file)
            same = bool(found) and _equal(mine.state_dict(), found[0].state_dict())
            found.append(found[0] if same else mine.eval())
        return found

    def _fill(self, module: nn.Module, state: dict[str, Tensor], part: str, file: Path) -> None:
        """As `checkpoint.fill`, which can't know that the caller's changes are why it fails."""
        try:
            checkpoint.fill(module, state, part, file)
        except ValueError as error:
            mine, own = asdict(self.settings.model), asdict(self.own.model)
            changed = [n for n in mine if mine[n] != own[n] and n != "kernels_by"]
            if not changed:
                raise
            words = "; ".join(
                f"model.{n} is {argument(mine[n])}, but the run has {argument(own[n])}"
                for n in changed
            )
            raise ValueError(
                f"{self.folder} was trained as another model: {words}. Leave out what differs."
            ) from error

    def ue_weights(self, ue: int) -> dict[str, Tensor]:
        """Encoder and head of a UE, by `<part>.<name>`; raises as `models`."""
        state, _ = self._ue_state(ue)
        return {k: v for k, v in state.items() if k.startswith(("encoder.", "head."))}

    def tail_weights(self) -> dict[str, Tensor]:
        """The tail, by `tail.<layer>.<name>`; raises as `models`."""
        state = self._tail_state()
        return {k: v for k, v in state.items() if k.startswith("tail.")}

    @cached_property
    def _snapshot(self) -> checkpoint.Snapshot | None:
        whole = self.source.name.isdigit()
        return checkpoint.Snapshot(self.source) if whole else None

    def _tail_state(self) -> dict[str, Tensor]:
        snapshot = self._snapshot
        if snapshot is None:
            return checkpoint.read(checkpoint.tail_file(self.source))
        state: dict[str, Tensor] = {}
        for layer in range(len(models.tail_shapes(self.settings.model)) - 1):
            if layer_name(layer) in snapshot.content["parts"]:
                part = meant(snapshot.tensors(layer_name(layer)))
                state |= {
                    f"tail.{layer}.{k.removeprefix('layer.')}": v
                    for k, v in part.items()
                    if k.startswith("layer.")
                }
        # federated methods: a tail at every UE, of which none may be up to date
        return state or meant(snapshot.tensors(ue_name(0))) | self._common

    def _ue_state(self, ue: int) -> tuple[dict[str, Tensor], Path]:
        """Encoder and head of a UE, and the file that they come from."""
        snapshot = self._snapshot
        if snapshot is None:
            file = checkpoint.ue_file(self.source, ue)
            return checkpoint.read(file), file
        file = checkpoint.ue_file(snapshot.folder, ue)
        state = meant(snapshot.tensors(ue_name(ue)))
        if ue and not any(key.startswith("encoder.") for key in state):
            return self._ue_state(0)  # centralised: the first UE's are everyone's
        if self.own.spec.pipelined:  # a UE has moved since the last averaging
            return state | self._caught_up(state), file
        return state | self._common, file

    @cached_property
    def _common(self) -> dict[str, Tensor]:
        """What the UEs have in common, where a UE may be behind: parts of a snapshot's BTS."""
        snapshot = self._snapshot
        if snapshot is None or BTS not in snapshot.content["parts"]:
            return {}
        state = meant(snapshot.tensors(BTS))
        return {k: v for k, v in state.items() if k.startswith(("encoder.", "tail.", "head."))}

    def _caught_up(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a UE's state that are averaged, with what the UE missed while it was
        absent, as the run itself evaluates and saves it."""
        if not self._common:
            return {}
        parts = nn.ModuleDict(shared_modules(self.own, torch.device("cpu")))
        statistics = {n: b for n, b in parts.named_buffers() if b.is_floating_point()}
        found: dict[str, Tensor] = {}
        for kind, tensors in (
            ("values", {n: p for n, p in parts.named_parameters() if p.requires_grad}),
            ("statistics", statistics),
        ):
            if tensors:
                knew = split(state[f"agreed.{kind}"], list(tensors.values()))
                for name, known in zip(tensors, knew, strict=True):
                    found[name] = state[name] + (self._common[name] - known)
        return found


def read(folder: Path, changes: Sequence[str] = (), weights: str = LAST) -> Trained:
    """Find a run's weights.

    Args:
        folder: the run's directory.
        changes: settings to change, as on the command line (`--data.source csinet …`).
        weights: `last`; `best`, those of `checkpoints/best`; or the number of a checkpoint.

    Raises:
        ValueError: no run, or one without such weights; lists those that exist.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run's directory: it has no {CONFIG}.")
    mine = ["--config", str(folder / CONFIG)]
    try:
        own = _settings(mine)
    except ValueError as error:  # says which setting, but not whose
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    # the GPU that trained it need not be here
    here = [] if torch.cuda.is_available() else ["--train.device", "auto"]
    settings = _settings([*mine, *here, *changes])
    return Trained(folder, settings, own, *_find(folder, own, weights))


def _find(folder: Path, own: Settings, weights: str) -> tuple[Path, int | None, str]:
    """`source`, `iteration` and `status` of `Trained`; raises as `read`."""
    if (folder / card.CARD).is_file() and weights == LAST:
        told = card.check(folder, own.topology.ues)
        return folder / card.WEIGHTS, told["iterations"], HANDED_ON
    status, done = ended(folder) or ("unfinished", None)
    checkpoints = folder / "checkpoints"
    if weights == BEST:
        best = checkpoints / BEST
        if not best.is_dir():
            raise ValueError(
                f"{folder} has no best weights: with data.holdout 0, where no UE has rows of two "
                "users, or before the first evaluation, none are chosen. Leave --weights out for "
                "the last ones."
            )
        return best, checkpoint.switched(best), status
    if weights != LAST:
        return _numbered(checkpoints, weights), int(weights), status
    if done is not None:
        return folder / "weights", done, status
    newest = checkpoint.newest(checkpoints)
    if newest is not None:
        return newest, int(newest.name), status
    if not (folder / "weights").is_dir():
        raise ValueError(
            f"{folder} has no weights and no complete checkpoint yet; a run writes its first one "
            f"after run.save_every ({own.save_every}) iterations."
        )
    return folder / "weights", None, "of unknown state"


def _settings(arguments: list[str]) -> Settings:
    settings = commandline.read(arguments)
    kind = settings.data.kind or BEFORE["data.kind"]
    return replace(settings, data=replace(settings.data, kind=kind))


def _numbered(checkpoints: Path, number: str) -> Path:
    chosen = checkpoints / number
    if not number.isdigit() or not (chosen / checkpoint.MANIFEST).is_file():
        there = sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())
        raise ValueError(
            f"--weights {number}: {checkpoints} has no such checkpoint; it has {there or 'none'}. "
            f"Give one of them, {LAST} or {BEST}."
        )
    return chosen


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())
