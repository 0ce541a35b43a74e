"""NMSE and SGCS against feedback bits: trained models beside what needs no training of a network.

A UE's codeword is quantised as `csipipe export --bits` does it, with ranges learnt from its own
training rows. The baselines learn from the training rows of all UEs together, at most `_LEARN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from csipipe import plotting
from csipipe.channels import Source, Span
from csipipe.evaluation import baselines, codebook
from csipipe.evaluation.codebook import Codebook
from csipipe.evaluation.samples import COLUMNS
from csipipe.evaluation.testset import Rows
from csipipe.export.learning import learn
from csipipe.export.parts import Pair, trained_for
from csipipe.export.parts import run as through
from csipipe.export.quantiser import Quantiser
from csipipe.files import write_table
from csipipe.measure.metrics import to_complex, to_db
from csipipe.models import widths
from csipipe.run.trained import Autoencoder, Trained
from csipipe.settings.tables import KINDS

ENTRY = (1, 2, 3, 4, 6, 8)
"""Bits per entry of a trained codeword."""
_LEARN = 8000
"""Training rows from which the baselines learn, at most."""
_LOOKS = {"PCA": "s", "top bins": "^", "enhanced Type II": "D"}

Measure = Callable[[Sequence[nn.Module]], Tensor]
"""Modules (B, 2, A, D) → the same, to (modules, B, COLUMNS)."""


@dataclass(frozen=True)
class Point:
    """What some bits per channel gain; means over test rows and UEs."""

    what: str
    bits: float
    nmse_db: float | None
    """None: its phases are free, so that it says nothing."""
    sgcs: float | None
    note: str


class _Rounded(nn.Module):
    """A UE's model with its codeword quantised."""

    def __init__(self, pair: Pair, quantiser: Quantiser) -> None:
        super().__init__()
        self.encoder, self.decoder, self.quantiser = pair.encoder, pair.decoder, quantiser

    def forward(self, h_BAD: Tensor) -> Tensor:
        h_hat: Tensor = self.decoder(self.quantiser.rounded(self.encoder(h_BAD)))
        return h_hat


def curves(
    runs: Sequence[tuple[str, Trained, Sequence[Autoencoder]]], rows: Rows, measure: Measure
) -> list[Point]:
    """Points of every run, then of the baselines, which are the same for all.

    Raises:
        ValueError, OSError: a run's training rows can't be read, or aren't those that it had.
    """
    found = [point for run in runs for point in _of_run(*run, measure)]
    coders = list(_baselines(runs[0][1], rows, {round(point.bits) for point in found}))
    figures = measure([coder for _, _, coder, _ in coders])
    for (what, bits, coder, note), samples in zip(coders, figures, strict=True):
        point = _point(what, bits, samples[None], note)
        found.append(replace(point, nmse_db=None) if isinstance(coder, Codebook) else point)
    return found


def _of_run(
    name: str, run: Trained, models: Sequence[Autoencoder], measure: Measure
) -> Iterator[Point]:
    """Every UE's codeword with quantisers of its own; means over UEs."""
    source, ues = run.dealt()
    pairs = [Pair.of(model) for model in models]
    codewords = [
        through(pair.encoder, _rows(source, [spans], _LEARN))
        for pair, spans in zip(pairs, ues, strict=True)
    ]
    entries, _ = widths(run.settings.model)
    for bits in ENTRY:
        coders = [_Rounded(p, learn(z, bits)) for p, z in zip(pairs, codewords, strict=True)]
        note = f"{bits} bit{'s' if bits > 1 else ''} an entry"
        yield _point(name, entries * bits, measure(coders), note)
    own = [trained_for(model) for model in models]
    coders = [_Rounded(pair, q) for pair, q in zip(pairs, own, strict=True) if q is not None]
    if coders and own[0] is not None:
        bits = own[0].bits
        note = f"{bits} bits an entry, trained for"
        yield _point(f"{name}, trained for", entries * bits, measure(coders), note)


def _baselines(
    run: Trained, rows: Rows, budgets: set[int]
) -> Iterator[tuple[str, float, nn.Module, str]]:
    """Name, bits a channel, coder and remark of each."""
    source, ues = run.dealt()
    books = [
        (book, float(book.bits(book.encode(to_complex(rows.h_BAD))).double().mean()))
        for book in _codebooks(source)
    ]
    for book, bits in books:
        yield "enhanced Type II", bits, book, f"paramCombination {book.number}"
    learnt = _rows(source, ues, _LEARN)
    pca = baselines.Pca(learnt)
    for total in sorted(budgets | {round(bits) for _, bits in books}):
        yield "PCA", total, pca.with_bits(total), ""
        if chosen := baselines.top_bins(learnt, total):
            used, coder = chosen
            note = f"{coder.bins} bins, {coder.quantiser.bits} bits a real"
            yield "top bins", used, coder, note


def _rows(source: Source, ues: Sequence[tuple[Span, ...]], most: int) -> Tensor:
    """The first training rows of each UE, as many of all, `most` together at most."""
    each = -(-most // len(ues))
    parts = [
        source.rows(span.environment, span.part, span.start, min(span.stop, span.start + share))
        for spans in ues
        for span in spans
        if (share := -(-each * span.size // sum(one.size for one in spans)))
    ]
    return torch.from_numpy(np.concatenate(parts))


def _codebooks(source: Source) -> list[Codebook]:
    """3GPP's, where the images are eigenvectors of an array for which it is defined."""
    columns, rows, polarisations = source.array
    fits = polarisations == 2 and (columns, rows) in codebook.ARRAYS
    if not (KINDS[source.kind].similarity and fits):
        return []
    subbands = source.size[1]
    return [Codebook(columns, rows, subbands, n) for n in codebook.allowed(columns, rows)]


def _point(what: str, bits: float, samples: Tensor, note: str) -> Point:
    """From (UEs, B, COLUMNS)."""
    mean = dict(zip(COLUMNS, samples.nanmean((0, 1)).tolist(), strict=True))
    sgcs = mean["sgcs"]
    return Point(what, bits, to_db(mean["nmse"]), None if math.isnan(sgcs) else sgcs, note)


def table(points: Sequence[Point]) -> str:
    """What is printed."""
    wide = max(len("feedback"), *(len(point.what) for point in points))
    lines = [f"{'feedback':<{wide}}  {'bits':>7}  {'NMSE (dB)':>9}  {'SGCS':>7}"]
    for point in points:
        nmse = "—" if point.nmse_db is None else f"{point.nmse_db:.2f}"
        sgcs = "—" if point.sgcs is None else f"{point.sgcs:.4f}"
        line = f"{point.what:<{wide}}  {point.bits:>7,.0f}  {nmse:>9}  {sgcs:>7}   {point.note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def write(points: Sequence[Point], title: str, folder: Path) -> None:
    """`bits.csv` and `bits.png`."""
    write_table(
        folder / "bits.csv",
        ["what", "bits", "nmse_db", "sgcs", "note"],
        [[p.what, p.bits, p.nmse_db, p.sgcs, p.note] for p in points],
    )
    shown = [("nmse_db", "centred NMSE (dB)"), ("sgcs", "SGCS")]
    shown = [(name, label) for name, label in shown if getattr(points[0], name) is not None]
    figure = Figure(figsize=(4.8 * len(shown), 3.8), layout="constrained")
    plotting.entitle(figure, title)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (name, label) in zip(axes, shown, strict=True):
        for number, what in enumerate(dict.fromkeys(point.what for point in points)):
            mine = [(p.bits, getattr(p, name)) for p in points if p.what == what]
            mine = sorted(pair for pair in mine if pair[1] is not None)
            if mine:
                axis.plot(*zip(*mine, strict=True), label=what, **_look(what, number))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("feedback per channel (bits)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize="small")
    plotting.save(figure, folder / "bits.png")


def _look(what: str, number: int) -> dict[str, Any]:
    """Baselines in grey with a marker of their own, runs in black."""
    if what in _LOOKS:
        return {"color": "0.5", "marker": _LOOKS[what], "linestyle": "--", "markersize": 4}
    return {"color": "black", "marker": "o", "linestyle": ("-", "-.", ":")[number % 3]}
