"""The unsplit model in one process, eager: what parity tests and all methods are compared with.

It runs what CSILocal computes, without a wire: every UE's encoder on its whole mini-batch, the
tail on the same micro-batches (rows of every UE, ordered by UE number), heads and losses. With
one encoder and head shared by all UEs it is centralised training on all data; with private ones
it is CSILocal unsplit, with which the tests compare.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from csipipe import checkpoint, models
from csipipe.comm import trust
from csipipe.comm.ledger import Ledger
from csipipe.device import autocast
from csipipe.measure.clock import Clock
from csipipe.measure.figures import WIDTH, Figures
from csipipe.measure.probe import Probe
from csipipe.methods.base import Builder, EvalRows, adam, batches_of, freeze, padded, set_rate
from csipipe.methods.objective import Objective
from csipipe.methods.roster import evaluated
from csipipe.methods.rows import load
from csipipe.methods.state import AdamMoments, Unit, layer_units, ue_name
from csipipe.methods.ue import UserEquipment, losses
from csipipe.settings.config import Settings


def prepare(settings: Settings, rank: int, world_size: int, device: torch.device) -> Builder:
    """As `csipipe.methods.prepare`."""
    if world_size != 1 or settings.topology.stages is not None:
        raise ValueError(
            f"method centralised runs the unsplit model in one process without BTS stages, but "
            f"there are {world_size} process(es) and topology.stages is "
            f"{settings.topology.stages}; start it with torchrun --nproc_per_node=1 and leave "
            "topology.stages out."
        )
    ues, test = load(settings, range(settings.topology.ues), device)
    return lambda world: Centralised(settings, ues, test, device)


class Centralised:
    """All UEs' data and the unsplit model on one rank.

    Args:
        ues: every UE; with `shared`, all use the encoder and head of the first.
        test: (B, 2, A, D) the common test set.
        shared: one encoder and head for all, and the mean of the UEs' losses; otherwise private
            ones, and the sum (CSILocal's objective, eq. 2).
    """

    def __init__(
        self,
        settings: Settings,
        ues: list[UserEquipment],
        test: Tensor,
        device: torch.device,
        shared: bool = True,
    ) -> None:
        self.settings = settings
        self.device = device
        self.ues = ues
        self.test = test
        self.shared = shared
        if shared:
            models.start(settings.model, ues[0].encoder, ues[0].head, [ue.rows for ue in ues])
            for ue in ues[1:]:
                ue.encoder, ue.head = ues[0].encoder, ues[0].head
        # as on a UE rank: one product per head instead of one per micro-batch
        self.pending = models.put_off(ue.head for ue in ues if "head" not in ue.frozen)
        self.tail = nn.Sequential(*models.build_tail(settings.model, settings.train.seed))
        self.tail.to(device)
        freeze({"tail": self.tail}, settings.train.frozen)
        self.optimizer = adam({"tail": self.tail.parameters()}, settings.train)
        self.parameters = models.count_parts(settings.model)
        with autocast(settings.train.precision, device):
            self.notes = models.kernels_notes(settings.model, device)
        self.objective = Objective.of(settings, device)
        self.clock = Clock()
        self.probe = Probe(evaluated(settings)[0])
        self.dropped = [0] * len(ues)
        self.has_holdout = any(len(ue.holdout) for ue in ues)

    def train_iteration(self, iteration: int) -> Figures:
        """One Adam step on the UEs' mini-batches."""
        train = self.settings.train
        owners = self.ues[:1] if self.shared else self.ues
        for ue in owners:
            ue.train(True)
            set_rate(ue.optimizer, train.lr_at(iteration))
        self.tail.train("tail" not in train.frozen)
        set_rate(self.optimizer, train.lr_at(iteration))
        self.clock.begin("compute", "draw mini-batches")
        sums = self.run(self.ues, [ue.batch(ue.draw(train.batch_size)) for ue in self.ues])
        self.clock.begin("compute", "step")
        for ue, figures in zip(self.ues, sums, strict=True):
            ue.check_loss(figures)
        trust.check_gradients("the tail's", self.tail.named_parameters())
        self.probe.gradients({"tail": self.tail})
        for ue in owners:
            self.probe.gradients({"encoder": ue.encoder, "head": ue.head})
            ue.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.stop()
        return Figures(sums)

    def evaluate(self, part: EvalRows) -> Figures:
        """Figures on `part`; a shared model is the same for every UE."""
        size = self.settings.train.batch_size
        common = part == "test" and self.shared
        chosen = evaluated(self.settings)
        ues = [self.ues[ue] for ue in (chosen[:1] if common else chosen)]
        rows = [self.test if part == "test" else ue.holdout for ue in ues]
        sums = torch.zeros(len(ues), WIDTH, dtype=torch.float64)
        for ue in self.ues:
            ue.train(False)
        self.tail.eval()
        with torch.no_grad():
            for start in range(0, batches_of(max(map(len, rows)), size) * size, size):
                valid = [min(size, max(0, len(h) - start)) for h in rows]
                sums += self.run(ues, [padded(h, start, size) for h in rows], valid)
        everyone = torch.zeros(len(self.ues), WIDTH, dtype=torch.float64)
        everyone[chosen] = sums
        return Figures(everyone)

    def run(
        self, ues: list[UserEquipment], h_UBAD: list[Tensor], valid: list[int] | None = None
    ) -> Tensor:
        """Forward and, where gradients are on, backward pass over a mini-batch per UE.

        As at the BTS, micro-batches hold rows of every UE, ordered by UE number. Each is finished
        before the next one starts, while its activations are still in the cache.

        Args:
            h_UBAD: mini-batches of `ues`.
            valid: how many rows of each are counted; None: all.

        Returns:
            (UEs, WIDTH) sums over the rows that count.
        """
        train = self.settings.train
        rows = train.batch_size // train.micro_batches
        training = torch.is_grad_enabled()
        sums = torch.zeros(len(ues), WIDTH, dtype=torch.float64, device=self.device)
        clock = self.clock if training else Clock()
        clock.begin("compute", "encode")
        with autocast(train.precision, self.device):
            z_UBC = [ue.encoder(h) for ue, h in zip(ues, h_UBAD, strict=True)]
        leaves = [z.detach().requires_grad_(training) for z in z_UBC]
        for m, first in enumerate(range(0, train.batch_size, rows)):
            part = slice(first, first + rows)
            clock.begin("compute", "forward", m)
            with autocast(train.precision, self.device):
                y = self.tail(torch.cat([z[part] for z in leaves]))
                h_hats = [ue.head(y_RC) for ue, y_RC in zip(ues, y.split(rows), strict=True)]
            total = torch.zeros((), device=self.device)
            for u, (h_hat, h) in enumerate(zip(h_hats, h_UBAD, strict=True)):
                counted = rows if valid is None else min(rows, max(0, valid[u] - first))
                loss, figures = losses(self.objective, h_hat, h[part], counted)
                total = total + loss.sum() / train.batch_size
                sums[u] += figures
                if not training:
                    self.probe.reconstructed(ues[u].number, h[part][:counted], h_hat[:counted])
            if training:
                clock.begin("compute", "backward", m)
                torch.autograd.backward(total / (len(ues) if self.shared else 1))
        if training:
            clock.begin("compute", "weight gradients")
            models.accumulate(models.joined(self.pending))
            self.pending.clear()
            clock.begin("compute", "encode backward")
            if "encoder" not in train.frozen:
                models.backward(z_UBC, [z.grad for z in leaves if z.grad is not None])
        return sums.cpu()

    def agree(self, decision: bool) -> bool:
        return decision

    def save_weights(self, folder: Path) -> None:
        """The same files as CSILocal's: every UE has the shared encoder and head."""
        checkpoint.save(checkpoint.tail_file(folder), {"tail": self.tail.state_dict()})
        for ue in self.ues:
            ue.save(folder)

    def units(self) -> dict[str, Unit]:
        """Shared encoder and head belong to the first UE; the others have their draws."""
        owners = self.ues[:1] if self.shared else self.ues
        units = {ue_name(ue.number): ue.unit() for ue in owners}
        for ue in self.ues[len(owners) :]:
            units[ue_name(ue.number)] = Unit({}, AdamMoments(ue.optimizer), ue.generator)
        return units | layer_units(self.tail, 0, AdamMoments(self.optimizer))

    def exchanged(self) -> Ledger:
        """Nothing crosses."""
        return Ledger(len(self.ues))

    def restore_ledger(self, ledger: Ledger) -> None:
        """Nothing has crossed."""
