"""From assigned rows to rows in memory: what a UE trains on and holds out, and the test set."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from csipipe.channels import accepted
from csipipe.channels.doctor import Finding
from csipipe.channels.layout import ROUNDING
from csipipe.channels.source import Images, Source, Span
from csipipe.channels.split import Deal
from csipipe.channels.transform import ZERO
from csipipe.settings.config import Verdict

_LOOKED_AT = 1000
"""Rows whose values are looked at."""


def load_ue(source: Source, deal: Deal, ue: int, holdout: float) -> tuple[Images, Images]:
    """Training rows and held-out rows of a UE, each (n, 2, A, D) float32 in [0, 1].

    Of n rows, round(holdout n) are held out, at most n - 1: the last ones of each span, in
    proportion, so that a mixture's held-out rows are a mixture. Where users have several rows, they
    are all rows of the last users whose rows no other UE has: as near to that number as whole users
    come, one user at least. There may be none.

    Args:
        source: where the rows come from.
        deal: which rows each UE gets.
        ue: number of the UE, from 0.
        holdout: share held out, in [0, 1).

    Raises:
        FileNotFoundError, ValueError: the source can't give the rows.
    """
    train, kept = hold_out(source, deal.ues[ue], holdout)
    return rows_of(source, train), rows_of(source, kept)


def hold_out(
    source: Source, spans: tuple[Span, ...], holdout: float
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """A UE's spans, cut into those it trains on and those it holds out (see `load_ue`)."""
    counts = _held_counts([span.size for span in spans], holdout)
    train: list[Span] = []
    kept = []
    for span, count in zip(spans, counts, strict=True):
        start, stop = span.stop - count, span.stop
        borders = source.user_borders(span.environment, span.part)
        if count and borders is not None:
            start, stop = _whole_users(span, count, borders)
        train.append(span._replace(stop=start))
        if stop < span.stop:  # rows of a user of whom the next UE has some, too
            train.append(span._replace(start=stop))
        kept.append(span._replace(start=start, stop=stop))
    return tuple(train), tuple(kept)


def _whole_users(span: Span, count: int, borders: NDArray[np.int64]) -> tuple[int, int]:
    """Rows of the last users that lie in a span, about `count`; (stop, stop) where no user does,
    or nothing would be left to train on."""
    inside = borders[(span.start <= borders) & (borders <= span.stop)]
    stop = int(inside[-1]) if len(inside) else span.stop
    starts = inside[:-1]
    if stop == span.stop:
        starts = starts[starts > span.start]
    if not len(starts):
        return span.stop, span.stop
    return int(starts[np.abs(starts - (stop - count)).argmin()]), stop


def _held_counts(counts: list[int], holdout: float) -> list[int]:
    """Rows to hold out of each span, in proportion; of two spans, at least one each if possible."""
    total = sum(counts)
    held = min(round(holdout * total), total - 1)
    upto = [round(held * count / total) for count in accumulate(counts)]
    if len(counts) == 2 and held >= 2:
        upto[0] = min(max(upto[0], 1), held - 1)
    return [stop - start for start, stop in pairwise([0, *upto])]


def rows_of(source: Source, spans: tuple[Span, ...]) -> Images:
    """The rows of all spans, in their order: (n, 2, A, D) float32 in [0, 1].

    Rows of a single span are what the source gives, which may be mapped and not copied.

    Raises:
        ValueError: the source gives something else.
    """
    rows = [_asked(source, span) for span in spans]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _asked(source: Source, span: Span) -> Images:
    rows = source.rows(*span)
    wanted = (span.size, 2, *source.size)
    if rows.shape != wanted or rows.dtype != np.float32:
        raise ValueError(
            f"{type(source).__name__}.rows({', '.join(map(repr, span))}) gives {rows.dtype} of "
            f"shape {rows.shape}; expected float32 of shape {wanted}: rows, real and imaginary "
            "part, angles, delays."
        )
    return rows


def check_values(rows: Images, what: str, accept: Verdict) -> None:
    """Look at some rows: files are examined when they are first used, other sources only here.

    Args:
        what: whose rows they are, for the error.
        accept: see `data.accept`.

    Raises:
        ValueError: values outside of [0, 1].
    """
    some = rows[:_LOOKED_AT]
    least, most = float(some.min(initial=ZERO)), float(some.max(initial=ZERO))
    if not (least >= -ROUNDING and most <= 1 + ROUNDING):
        found = f"values from {least:.3g} to {most:.3g}, where 0.5 stands for zero"
        repair = "let the source's rows lie in [0, 1], such as h / (2·max|h|) + 0.5"
        accepted.check(what, [Finding("unusable", found, repair)], accept)
