"""What PCA of a run's own rows reaches: near the ceiling of a model whose decoder ends linearly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from csipipe import channels, models
from csipipe.channels import statistics
from csipipe.channels.source import Images, Span
from csipipe.files import DAMAGED
from csipipe.settings.config import Settings

MOST = 20_000
"""Most training rows that it is fitted to. On 100,000 generated indoor ones, PCA-256 differs from
that of all by 0.1 dB."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """A PCA beside a model.

    Attributes:
        components: of a model that ends linearly, as many as confine it; else c1.
        bound: fitted to unlimited rows, the model couldn't beat it; it can beat that of few.
        rows: training rows that it is fitted to, of all UEs.
        nmse_db: centred NMSE on the test rows, in dB; it is fitted to the NMSE, too. None: the rows
            are too few for so many components.
    """

    components: int
    bound: bool
    rows: int
    nmse_db: float | None


def find(settings: Settings, test: Images | None = None) -> Ceiling | None:
    """The PCA that a run is to be compared with; None: as many components as a row has reals.

    Args:
        settings: the run's, with sizes of images.
        test: (B, 2, A, D) rows that it is measured on; None: the run's.

    Raises:
        ValueError, OSError: the rows can't be read.
    """
    confined = models.ceiling(settings.model)
    components = confined or models.widths(settings.model)[0]
    if components >= settings.model.reals:
        return None
    source, deal = channels.dealt(settings)
    test = channels.rows_of(source, deal.test) if test is None else test
    found = pca(settings, test, [components])
    return Ceiling(
        components=components,
        bound=confined is not None,
        rows=sum(span.size for span in fitted([span for ue in deal.ues for span in ue])),
        # the last digits depend on the number of threads with which a library multiplies
        nmse_db=round(found[components], 6) if components in found else None,
    )


def noted(folder: Path) -> Ceiling | None:
    """What a finished run wrote into its summary; None: nothing that can be read, or no NMSE."""
    try:
        found = Ceiling(**json.loads((folder / "summary.json").read_text())["ceiling"])
    except (OSError, *DAMAGED):
        return None
    return None if found.nmse_db is None else found


def pca(settings: Settings, test: Images, components: Sequence[int]) -> dict[int, float]:
    """NMSE in dB of PCA by its number of components, fitted to the training rows of all UEs.

    Numbers that are too large for so many rows are left out. Raises as `find`.
    """
    source, deal = channels.dealt(settings)
    spans = fitted([span for ue in deal.ues for span in ue])
    if 2 * min(components) >= sum(span.size for span in spans):
        return {}
    known = channels.rows_of(source, tuple(spans))
    return statistics.pca_db(known, test, components, most=MOST, weighted=True)


def fitted(spans: Sequence[Span], most: int = MOST) -> list[Span]:
    """The first rows of each span, `most` in all and in proportion: a stream has no order."""
    upto = [0, *accumulate(span.size for span in spans)]
    if upto[-1] > most:
        upto = [most * count // upto[-1] for count in upto]
    sizes = [stop - start for start, stop in pairwise(upto)]
    return [s._replace(stop=s.start + size) for s, size in zip(spans, sizes, strict=True)]
