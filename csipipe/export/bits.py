"""NMSE against feedback bits: what each bit per codeword entry gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from csipipe import plotting
from csipipe.export.parts import Pair, nmse_db, run
from csipipe.export.quantiser import Quantiser
from csipipe.files import write_table
from csipipe.run.trained import Autoencoder

SHOWN = range(1, 11)
"""Bits per entry of the table and the picture."""


@dataclass(frozen=True)
class Point:
    """One quantiser: bits per entry and per channel, centred NMSE on the test rows."""

    bits: int
    total: int
    nmse_db: float


def measure(
    model: Autoencoder, learn: Callable[[int], Quantiser], h_BAD: Tensor
) -> tuple[list[Point], float]:
    """A point for each of `SHOWN`, and the NMSE (dB) of the codeword as it is.

    Args:
        learn: makes a quantiser with that many bits, from training rows.
    """
    whole = Pair.of(model)
    z_BC = run(whole.encoder, h_BAD)
    points = []
    for bits in SHOWN:
        z_hat = learn(bits).rounded(z_BC)
        points.append(Point(bits, bits * z_BC.shape[1], nmse_db(run(whole.decoder, z_hat), h_BAD)))
    return points, nmse_db(run(whole.decoder, z_BC), h_BAD)


def table(points: Sequence[Point], unquantised: float) -> str:
    """What is printed."""
    lines = [f"{'bits per entry':>16}  {'per channel':>12}  {'NMSE (dB)':>10}  {'lost (dB)':>10}"]
    for point in points:
        lost = round(point.nmse_db - unquantised, 2) + 0.0  # no −0.00
        lines.append(f"{point.bits:>16}  {point.total:>12,}  {point.nmse_db:>10.2f}  {lost:>10.2f}")
    entries = points[0].total // points[0].bits
    lines.append(f"{'32 (as it is)':>16}  {32 * entries:>12,}  {unquantised:>10.2f}  {0.0:>10.2f}")
    return "\n".join(lines)


def write(points: Sequence[Point], unquantised: float, title: str, folder: Path) -> None:
    """`bits.csv` and `bits.png`."""
    write_table(
        folder / "bits.csv",
        ["bits_per_entry", "bits_per_channel", "nmse_db", "nmse_db_unquantised"],
        [[p.bits, p.total, p.nmse_db, unquantised] for p in points],
    )
    entries = points[0].total // points[0].bits
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(
        [p.bits for p in points],
        [p.nmse_db for p in points],
        "o-",
        color="black",
        label="quantised",
    )
    axis.axhline(unquantised, color="0.45", linestyle="--", label="codeword as it is (float32)")
    axis.set_xticks(list(SHOWN))
    axis.set_xlabel(f"bits per codeword entry ({entries} entries)")
    axis.set_ylabel("centred NMSE on the test set (dB)")
    top = axis.secondary_xaxis("top", functions=_per_channel(entries))
    top.set_xlabel("feedback per channel (bits)")
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    plotting.save(figure, folder / "bits.png")


def _per_channel(entries: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Bits per channel from bits per entry, and back."""
    return lambda bits: bits * entries, lambda bits: bits / entries
