"""What `csipipe leak` does: how well a curious BTS reconstructs a UE's channels from messages."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csipipe import channels
from csipipe.comm import codec
from csipipe.comm.codec import Rounding
from csipipe.comm.ledger import Kind
from csipipe.device import set_threads
from csipipe.entry import refusing
from csipipe.evaluation import attack
from csipipe.evaluation.attack import WHAT, Decoder
from csipipe.files import write_file
from csipipe.measure.metrics import centred_nmse, paper_loss, to_db
from csipipe.methods.cost import message_bytes
from csipipe.methods.objective import Objective
from csipipe.models import widths
from csipipe.run import trained
from csipipe.run.trained import Autoencoder, Trained
from csipipe.settings import commandline
from csipipe.settings.config import Settings

ABOUT = """Trains decoders from what the BTS sees of a UE (smashed data, gradients) to the UE's
channels, with the UE's encoder known and unknown, and prints the NMSE that they reach. The
attacker's own channels are the training rows of the other UEs."""
_OWN = 4000
"""Rows of the attacker, at most."""
_KINDS = (Kind.SMASHED, Kind.OUTPUT_GRADIENT)
"""What the BTS sees of a row; as wide as c1 and c2."""
_VICTIM = 1000
"""Rows of the UE that are reconstructed, at most."""


@dataclass(frozen=True)
class Row:
    """What a run gives away; NMSE in dB."""

    run: str
    noise: float
    codecs: str
    """Those of smashed data and of gradients at the head's input; —: not sent."""
    loss: float
    """The UE's own, on the rows that are reconstructed: what the noise costs."""
    own: float
    """NMSE of the UE's own reconstruction, which the BTS never sees."""
    known: dict[str, float | None]
    """By what is used of the messages; None: it isn't sent."""
    unknown: dict[str, float | None]


@refusing(OSError, ValueError)
def main(arguments: list[str]) -> int:
    """Attack runs; returns the exit code."""
    parser = commandline.RunParser("python -m csipipe leak", ABOUT)
    add_arguments(parser)
    options, changes = parser.parse(arguments)
    run(options, changes)
    return 0


def add_arguments(parser: ArgumentParser) -> None:
    """The command's own options; settings are what is left."""
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="more runs, a line each"
    )
    parser.add_argument(
        "--ue", type=int, default=0, metavar="N", help="whose channels to reconstruct (0)"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="of training the attacker's networks (1000)"
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (RUN/leak)")


def run(options: Namespace, changes: Sequence[str]) -> None:
    """Attack every run; print and write the table.

    Raises:
        ValueError, OSError: runs, data or options that can't be used.
    """
    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps}; it must be at least 1.")
    runs = [
        trained.read(Path(folder), changes, options.weights)
        for folder in (options.run, *options.compare)
    ]
    for one in runs:
        _check(one, options.ue)
    set_threads(runs[0].settings.train.threads, ranks_on_node=1)
    rows = [_attack(one, options.ue, options.steps) for one in runs]
    text = table(rows, options.ue)
    print(text, flush=True)
    out = Path(options.out) if options.out else Path(options.run) / "leak"
    write_file(out / "leak.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    write_file(out / "leak.txt", text + "\n")
    print(f"\nwritten:      {out}/leak.json, leak.txt", flush=True)


def _check(one: Trained, ue: int) -> None:
    ues = one.settings.topology.ues
    if one.status == trained.HANDED_ON:
        raise ValueError(
            f"{one.folder} holds weights that were handed on, and doesn't say which rows each UE "
            "had, nor which the others; give the run that they are of."
        )
    if not one.settings.spec.pipelined:
        raise ValueError(
            f"{one.folder} was trained by {one.settings.method}, which sends no smashed data; give "
            "a run of csilocal."
        )
    if not 0 <= ue < ues:
        raise ValueError(f"--ue is {ue}; the run has UEs 0 … {ues - 1}.")
    if ues < 2:
        raise ValueError(
            f"{one.folder} has one UE, and the attacker's channels are those of the others; give "
            "a run with several."
        )


def _attack(one: Trained, ue: int, steps: int) -> Row:
    settings = one.settings
    source, spans = one.dealt()

    def rows(ues: Sequence[int], most: int) -> Tensor:
        each = -(-most // len(ues))
        parts = [np.asarray(channels.rows_of(source, spans[n]))[:each] for n in ues]
        return torch.from_numpy(np.concatenate(parts))

    others = [n for n in range(settings.topology.ues) if n != ue]
    victim, own = rows([ue], _VICTIM), rows(others, _OWN)
    [model] = one.models([ue])
    model.requires_grad_(False)
    crossing, objective = Crossing(settings, ue), Objective.of(settings)
    seen = attack.messages(model, objective, victim, crossing)
    with torch.no_grad():
        h_hat = torch.cat([model(part) for part in torch.split(victim, 128)])

    def reached(ends: Autoencoder) -> dict[str, float | None]:
        """NMSE (dB) by what is used, with decoders learnt from the messages of these ends."""
        pairs = attack.messages(ends, objective, own, crossing)
        found: dict[str, float | None] = dict.fromkeys(WHAT)
        for what in WHAT if _sends_gradients(settings) else ("smashed",):
            decoder = Decoder(pairs.of(what), own, steps)
            found[what] = to_db(attack.nmse(decoder, seen.of(what), victim))
        return found

    return Row(
        run=one.folder.resolve().name,
        noise=crossing.noise,
        codecs=_codecs(settings),
        loss=float(paper_loss(h_hat, victim).mean()),
        own=to_db(float(centred_nmse(h_hat, victim).double().nanmean())),
        known=reached(model),
        unknown=reached(attack.shadow(settings, model.tail, own, steps)),
    )


class Crossing:
    """What arrives of a UE's messages, by the settings of a run: noise and codecs are in it."""

    def __init__(self, settings: Settings, ue: int) -> None:
        comm, train = settings.comm, settings.train
        self.noise, self._ue = comm.noise, ue
        self._rows = train.batch_size // train.micro_batches
        names = codec.chosen(comm, train.precision)
        self._codecs = {
            kind: codec.of_rows(
                names[kind.name.lower()], comm, self._rows, width, kind is Kind.SMASHED
            )
            for kind, width in zip(_KINDS, widths(settings.model), strict=True)
        }
        self._rounding = Rounding(train.seed, comm.rounding == "stochastic")
        self._rounding.iteration = 0

    def __call__(self, rows: Tensor, kind: Kind) -> Tensor:
        """(N, C) → (N, C): message by message, the last one filled up."""
        missing = -len(rows) % self._rows
        whole = torch.cat([rows, rows[-1:].expand(missing, -1)])
        found = [self._message(part, kind) for part in torch.split(whole, self._rows)]
        return torch.cat(found)[: len(rows)]

    def _message(self, message: Tensor, kind: Kind) -> Tensor:
        assert self._rounding.iteration is not None
        self._rounding.iteration += 1
        owners, one = [self._ue], self._codecs[kind]
        if self.noise and kind is Kind.SMASHED:
            message = self._rounding.blur(message, self.noise, kind.value, 0, owners)
        noise = None
        if one.rounds:
            noise = self._rounding.noise(kind.value, 0, owners, message.numel())
        return one.decode(one.encode(message, noise)).float()


def _sends_gradients(settings: Settings) -> bool:
    """Whether UEs send the gradient at the head's input: something before the head learns."""
    return message_bytes(settings, Kind.OUTPUT_GRADIENT) > 0


def _codecs(settings: Settings) -> str:
    names = codec.chosen(settings.comm, settings.train.precision)
    gradient = names["output_gradient"] if _sends_gradients(settings) else "—"
    return f"{names['smashed']}, {gradient}"


def _decibels(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def table(rows: Sequence[Row], ue: int) -> str:
    """What is printed."""
    heads = ["run", "codecs", "noise", "loss", "UE", *WHAT, *WHAT]
    cells = [
        [
            *(row.run, row.codecs, f"{row.noise:g}", f"{row.loss:.3e}", f"{row.own:.2f}"),
            *(_decibels(found[what]) for found in (row.known, row.unknown) for what in WHAT),
        ]
        for row in rows
    ]
    wide = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    first = sum(wide[:5]) + 2 * 5
    lines = [
        f"NMSE (dB) at which the BTS reconstructs the training channels of UE {ue}; 0: nothing",
        "",
        " " * first + f"{'encoder known':<{sum(wide[5:8]) + 6}}encoder unknown",
        *(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, wide, strict=True))
            )
            for line in (heads, *cells)
        ),
    ]
    lines += [
        "",
        "loss, UE: the UE's own reconstruction of these rows, which the BTS doesn't see.",
    ]
    return "\n".join(lines)
