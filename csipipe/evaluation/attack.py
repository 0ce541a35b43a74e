"""What a curious BTS can make of what it sees: a decoder from messages to the UE's channels.

The BTS follows the protocol and keeps what arrives: of each row of a UE's mini-batch the smashed
data z, and the gradient g at the head's input. It has channels of its own from the same cell, the
attacker's rows, and the decoder tail. With the UE's true encoder and head it can make the messages
of its own rows; without, it trains an encoder and a head for its tail, from the initial weights,
which everyone can draw from the seed, and uses those instead. From the pairs it learns a decoder: a
linear one by least squares, and a network that adds what the linear one misses.

Shapes: N rows, C = c1, c2 or their sum, F = 2·A·D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.comm.ledger import Kind
from csipipe.measure.metrics import centred_nmse
from csipipe.methods.objective import Objective
from csipipe.models.ranged import ranged
from csipipe.run.trained import Autoencoder
from csipipe.settings.config import Settings

HIDDEN = 1024
BATCH = 64
_CHECKS = 20
"""How often the decoder is looked at on rows that it doesn't learn from; the best one stays."""
_BLOCK = 128


@dataclass(frozen=True)
class Seen:
    """Messages of N rows as the BTS decodes them: smashed data (N, c1), gradients (N, c2)."""

    z: Tensor
    g: Tensor

    def of(self, what: str) -> Tensor:
        """Those of `smashed`, `gradient`, or both."""
        parts = {"smashed": [self.z], "gradient": [self.g], "both": [self.z, self.g]}
        return torch.cat(parts[what], 1)


WHAT = ("smashed", "gradient", "both")
Wire = Callable[[Tensor, Kind], Tensor]
"""What arrives of rows of that kind."""


def messages(model: Autoencoder, objective: Objective, h_NAD: Tensor, wire: Wire) -> Seen:
    """What a UE with this model sends for these rows, in evaluation mode."""
    z_parts, g_parts = [], []
    for h in torch.split(h_NAD, _BLOCK):
        with torch.no_grad():
            z = model.encoder(h)
            z = wire(z, Kind.SMASHED)
            y = model.tail(z)
        y = y.detach().requires_grad_()
        loss = objective(model.head(y), h).minimised
        # a row's share of the mean over a mini-batch, which is a factor common to all rows
        (g,) = torch.autograd.grad(loss.sum(), y)
        z_parts.append(z)
        g_parts.append(wire(g.flatten(1), Kind.OUTPUT_GRADIENT))
    return Seen(torch.cat(z_parts), torch.cat(g_parts))


def shadow(settings: Settings, tail: nn.Sequential, h_NAD: Tensor, steps: int) -> Autoencoder:
    """An encoder and a head for this tail, which is frozen, trained on the attacker's rows."""
    model = Autoencoder(settings.model, tail)
    seeded, (entries, _) = settings.train.seed, models.widths(settings.model)
    encoder = models.build_encoder(settings.model, seeded)
    model.encoder = ranged(encoder, entries, settings.feedback_bits)
    model.head = models.build_head(settings.model, seeded)
    parts = nn.ModuleList([model.encoder, model.head])
    objective = Objective.of(settings)
    _descend(
        parts,
        steps,
        len(h_NAD),
        lambda picks: objective(model(h_NAD[picks]), h_NAD[picks]).minimised.mean(),
        settings.train.lr,
        seed=0,
    )
    return model.eval()


class Decoder(nn.Module):
    """Messages (N, C) to images: least squares, and a network for the rest.

    Args:
        x_NC, h_NAD: pairs to learn from.
        steps: of the network's training.
    """

    def __init__(self, x_NC: Tensor, h_NAD: Tensor, steps: int) -> None:
        super().__init__()
        self.row = h_NAD.shape[1:]
        learn = len(x_NC) * 9 // 10
        self.mean, std = x_NC.mean(0), x_NC.std(0)
        # an entry that is constant here, but for rounding, teaches nothing: it is left out
        self.scale = std.masked_fill(std <= 1e-6 * self.mean.abs(), torch.inf)
        x = self._ready(x_NC)
        target = h_NAD.flatten(1)
        ones = torch.cat([x, torch.ones(len(x), 1)], 1)[:learn].double()
        gram = ones.T @ ones
        gram += 1e-3 * len(ones) * torch.eye(len(gram), dtype=gram.dtype)
        self.linear = torch.linalg.solve(gram, ones.T @ target[:learn].double()).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            last = nn.Linear(HIDDEN, target.shape[1])
            self.rest = nn.Sequential(
                *(nn.Linear(x.shape[1], HIDDEN), nn.ReLU()),
                *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), last),
            )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        best, kept = self._lost(x[learn:], h_NAD[learn:]), self._weights()
        each = max(1, steps // _CHECKS)

        def loss(picks: Tensor) -> Tensor:
            return centred_nmse(self._decoded(x[picks]), h_NAD[picks]).mean()

        for check in range(_CHECKS):
            _descend(self.rest, each, learn, loss, 1e-3, seed=check)
            lost = self._lost(x[learn:], h_NAD[learn:])
            if lost < best:
                best, kept = lost, self._weights()
        self.rest.load_state_dict(kept)

    def forward(self, x_NC: Tensor) -> Tensor:
        """(N, C) → (N, 2, A, D)."""
        return self._decoded(self._ready(x_NC))

    def _ready(self, x_NC: Tensor) -> Tensor:
        return (x_NC - self.mean) / self.scale

    def _decoded(self, x: Tensor) -> Tensor:
        h: Tensor = x @ self.linear[:-1] + self.linear[-1] + self.rest(x)
        return h.view(len(x), *self.row)

    def _lost(self, x: Tensor, h: Tensor) -> float:
        with torch.no_grad():
            return float(centred_nmse(self._decoded(x), h).nanmean())

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.rest.state_dict().items()}


def nmse(decoder: Decoder, x_NC: Tensor, h_NAD: Tensor) -> float:
    """Centred NMSE, linear, of what the decoder makes of messages."""
    with torch.no_grad():
        return float(centred_nmse(decoder(x_NC), h_NAD).double().nanmean())


def _descend(
    module: nn.Module,
    steps: int,
    rows: int,
    loss: Callable[[Tensor], Tensor],
    rate: float,
    seed: int,
) -> None:
    """Adam on random mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), rate)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss(torch.randint(rows, (BATCH,), generator=generator)))
        optimizer.step()
    module.eval()
