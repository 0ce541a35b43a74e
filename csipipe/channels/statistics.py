"""Statistics of channels: the same for generated ones and for files, side by side.

Energies are shares of a sample's own energy, averaged over samples, so that a sample's scale
doesn't matter. Shapes: B rows, A angles, D delays; everything linear except PCA figures, in dB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csipipe.channels.source import Images
from csipipe.channels.transform import ZERO, to_complex
from csipipe.measure.metrics import centred_nmse, column_sgcs, floor_loss, to_db

Reals = NDArray[np.float64]

DELAYS = (1, 2, 4, 8, 16)
BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COMPONENTS = (64, 128, 256)
MOST_ROWS = 6500
"""Most rows that are looked at, evenly spaced. A PCA of them takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Figures of a set of images."""

    rows: int
    """Rows looked at: those with energy, at most `MOST_ROWS`."""
    power: float
    """Mean square of a centred real, E (h - 0.5)^2."""
    delay_profile: Reals
    """(D,) mean share of the energy in each delay bin."""
    angle_profile: Reals
    """(A,) mean share of the energy in each angular bin."""
    first_delays: Mapping[int, float]
    """Mean share of the energy in the first delays, by their number."""
    best_bins: Mapping[int, float]
    """Mean share of the energy in each sample's strongest bins, by their number."""
    near_zero: float
    """Share of the reals within 0.01 of 0.5."""
    floor: float
    """The paper's loss of a constant 0.5, mean over samples."""


def measure(images: Images) -> Statistics:
    """Figures of images, at least one of them with energy.

    Args:
        images: (B, 2, A, D) float32 in [0, 1]; rows that are 0.5 throughout are left out.

    Raises:
        ValueError: no row has energy.
    """
    some = spaced(images, MOST_ROWS)
    some = some[(some != np.float32(ZERO)).any(axis=(1, 2, 3))]
    if not len(some):
        raise ValueError(
            f"none of {len(images)} rows has energy: all are {ZERO}; expected channels. Check how "
            "they were scaled."
        )
    power_BAD = np.abs(to_complex(some)) ** 2
    share_BAD = power_BAD / power_BAD.sum(axis=(1, 2), keepdims=True)
    delay_profile = share_BAD.sum(axis=1).mean(axis=0, dtype=np.float64)
    upto_delay = delay_profile.cumsum()
    strongest = np.sort(share_BAD.reshape(len(some), -1), axis=1)[:, ::-1]
    upto_bin = strongest.mean(axis=0, dtype=np.float64).cumsum()
    return Statistics(
        rows=len(some),
        power=float(power_BAD.mean(dtype=np.float64) / 2),
        delay_profile=delay_profile,
        angle_profile=share_BAD.sum(axis=2).mean(axis=0, dtype=np.float64),
        first_delays={n: float(upto_delay[n - 1]) for n in DELAYS if n <= len(upto_delay)},
        best_bins={n: float(upto_bin[n - 1]) for n in BINS if n <= len(upto_bin)},
        near_zero=float((np.abs(some - np.float32(ZERO)) < 0.01).mean()),
        floor=float(floor_loss(torch.from_numpy(some)).double().mean()),
    )


def pca_db(
    train: Images,
    test: Images,
    components: Sequence[int] = COMPONENTS,
    most: int = MOST_ROWS,
    weighted: bool = False,
) -> dict[int, float]:
    """Centred NMSE in dB that the first so many principal components leave.

    It is what the best linear code of that many reals reaches; a model worth training does better.

    Args:
        most, weighted: see `by_components`.

    Returns:
        Components to dB; see `by_components`.
    """
    return {
        n: to_db(float(centred_nmse(torch.from_numpy(again), torch.from_numpy(of)).double().mean()))
        for n, again, of in by_components(train, test, components, most, weighted)
    }


def pca_sgcs(train: Images, test: Images) -> dict[int, float]:
    """SGCS of the columns of images of eigenvectors, from so many components; as `pca_db`."""
    return {
        n: float(column_sgcs(torch.from_numpy(again), torch.from_numpy(of)).double().mean())
        for n, again, of in by_components(train, test)
    }


def by_components(
    train: Images,
    test: Images,
    components: Sequence[int] = COMPONENTS,
    most: int = MOST_ROWS,
    weighted: bool = False,
) -> Iterator[tuple[int, Images, Images]]:
    """How many principal components, what they make of the test rows, and those rows.

    The components are those of `train`, around its mean; only numbers below half of `train`'s
    rows, as more would be fitted to single rows.

    Args:
        most: rows of each set that are looked at, evenly spaced.
        weighted: what is smallest is the mean NMSE of `train`, in which every row weighs as one
            over its energy; else its mean squared error.
    """
    train, test = spaced(train, most), spaced(test, most)
    known = train.reshape(len(train), -1)
    weight_B1 = np.ones((len(known), 1), known.dtype)
    if weighted:
        size_B1 = np.linalg.norm(known - np.float32(ZERO), axis=1, keepdims=True)
        weight_B1 = np.divide(1, size_B1, out=np.zeros_like(size_B1), where=size_B1 > 0)
    mean = np.average(known, axis=0, weights=weight_B1[:, 0].astype(np.float64) ** 2 + 1e-30)
    mean = mean.astype(known.dtype)
    known = (known - mean) * weight_B1
    counts = [n for n in components if 2 * n < len(known) and n < known.shape[1]]
    if not counts or not len(test):
        return
    wide = known.shape[1] > len(known)  # then the rows' products are the smaller matrix
    products = known @ known.T if wide else known.T @ known
    basis = _strongest(products, max(counts))
    if wide:
        basis = known.T @ basis
        basis /= np.linalg.norm(basis, axis=0)
    code = (test.reshape(len(test), -1) - mean) @ basis  # ascending: the strongest come last
    for n in counts:
        again = mean + code[:, -n:] @ basis[:, -n:].T
        yield n, again.reshape(test.shape), np.ascontiguousarray(test)


def _strongest(products: Images, number: int) -> NDArray[Any]:
    """The eigenvectors of a symmetric matrix's `number` largest eigenvalues, ascending.

    SciPy finds them alone, NumPy all: 2 to 5 times slower, but training needs no SciPy.
    """
    try:
        from scipy import linalg
    except ImportError:
        return np.linalg.eigh(products)[1][:, -number:]
    last = len(products) - 1
    found: NDArray[Any] = linalg.eigh(products, subset_by_index=[last - number + 1, last])[1]
    return found


def four_fifths(images: Images) -> tuple[Images, Images]:
    """(training, test) rows of a set that has no test rows of its own: the first 80 %, the rest."""
    cut = len(images) * 4 // 5
    return images[:cut], images[cut:]


def spaced(rows: NDArray[Any], most: int) -> NDArray[Any]:
    """At most `most` rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    some: NDArray[Any] = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    return some


def bars(profile: Reals) -> str:
    """A profile as a line of blocks, one per bin, the highest for the strongest bin."""
    blocks = " ▁▂▃▄▅▆▇█"
    levels = np.ceil(profile / profile.max() * (len(blocks) - 1) - 0.05).astype(int)
    return "".join(blocks[level] for level in levels)


def table(rows: Mapping[str, tuple[Images, Images]], similarity: bool = False) -> str:
    """Statistics of training rows and what their principal components leave of the test rows.

    Args:
        rows: both, a column each, by heading.
        similarity: they are eigenvectors, of which SGCS is shown too.
    """
    sets = [(measure(train), pca_db(train, test)) for train, test in rows.values()]
    lines = [("", *rows)]
    lines.append(("rows looked at", *(f"{s.rows:,}" for s, _ in sets)))
    lines.append(("power per real", *(f"{s.power:.2e}" for s, _ in sets)))
    lines.append(("reals within 0.01 of 0.5", *(f"{s.near_zero:.3f}" for s, _ in sets)))
    lines.append(("floor of the paper's loss", *(f"{s.floor:.2e}" for s, _ in sets)))
    for n in DELAYS:
        lines.append((f"energy in the first {n}", *_shares(n, [s.first_delays for s, _ in sets])))
    for n in BINS:
        lines.append(
            (f"energy in the strongest {n} bins", *_shares(n, [s.best_bins for s, _ in sets]))
        )
    for n in COMPONENTS:
        found = [f"{pca[n]:.1f} dB" if n in pca else "too few rows" for _, pca in sets]
        lines.append((f"NMSE of PCA-{n}", *found))
    if similarity:
        similar = [pca_sgcs(*some) for some in rows.values()]
        for n in COMPONENTS:
            found = [f"{sgcs[n]:.3f}" if n in sgcs else "too few rows" for sgcs in similar]
            lines.append((f"SGCS of PCA-{n}", *found))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def _shares(n: int, found: list[Mapping[int, float]]) -> list[str]:
    return [f"{shares[n]:.3f}" if n in shares else "-" for shares in found]
