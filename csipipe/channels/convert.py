"""Any array of channels to csipipe's own format, block by block.

H[p, k] of port p and subcarrier k becomes an image of angles and delays: inverse DFT over k,
rolled by `shift`, the first D delays; DFT over the ports of the array, divided by A; scaled by a
peak magnitude to radius 0.5, plus 0.5. All of it can be undone but the truncation, against which
ρ and SGCS are measured: test rows keep all their subcarriers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe import __version__
from csipipe.channels import doctor
from csipipe.channels.cache import digest
from csipipe.channels.eigenvectors import images_of
from csipipe.channels.eigenvectors import to_image as to_vectors
from csipipe.channels.format import Description, SetPart
from csipipe.channels.inputs import PARTS, Input, Opened, Plan, look, progress
from csipipe.channels.source import Images
from csipipe.channels.transform import RADIUS, ZERO, Complex, to_image
from csipipe.channels.writer import Writer

KEPT = 32
"""Delays that are kept by default, where there are more."""
LOOKED_AT = 2000
"""Training rows that the doctor sees."""


@dataclass
class Tally:
    """What a conversion has seen."""

    rows: int = 0
    empty_rows: int = 0
    """Rows without energy, or without any inside the image, as float32 holds it: dropped."""
    users: int = 0
    empty_users: int = 0
    """Users none of whose rows was kept."""
    kept: float = 0.0
    """Sum over rows of the share of energy that is inside the image."""
    profile: NDArray[np.float64] | None = None
    """(K,) sum over rows of the share of energy in each delay, before rolling."""
    looked_at: list[Images] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """Mean share of a row's energy that truncation loses."""
        return 1 - self.kept / self.rows

    def best_shift(self, delays: int) -> tuple[int, float]:
        """The shift that loses least, and the share that it loses."""
        assert self.profile is not None
        shares = self.profile / self.profile.sum()
        around = np.concatenate([shares, shares[: delays - 1]])
        inside = np.convolve(around, np.ones(delays), "valid")
        starts = np.flatnonzero(inside >= inside.max() - 1e-3)
        turns = [-start if start <= len(shares) // 2 else len(shares) - start for start in starts]
        shift = int(min(turns, key=abs))
        return shift, max(0.0, 1 - float(inside[-shift % len(shares)]))


def convert(
    inputs: Sequence[Input], folder: Path, plan: Plan, about: Mapping[str, Any] | None = None
) -> tuple[Description, Tally]:
    """Convert files into a folder, which appears when it is complete.

    Args:
        about: what else the description says about how it was made.

    Raises:
        FileNotFoundError, FileExistsError, BlockingIOError, OSError: see `writer`, `rawarray`.
        ValueError: see `rawarray`, `axes`, `reading`; ports that don't multiply to the array's,
            fewer subcarriers than delays, values that aren't finite, files of different sizes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, Writer(folder) as out:
        opened = [look(one, plan, stack, folder.parent) for one in inputs]
        first = opened[0]
        for one in opened[1:]:
            _check_alike(one, first)
        ports, frequencies = first.size
        delays = plan.delays or min(KEPT, frequencies)
        plan = replace(plan, delays=delays, geometry=plan.geometry.of(ports))
        if plan.subbands is not None:
            _check_vectors(first, plan.subbands, frequencies)
            delays = plan.subbands
        if delays > frequencies:
            raise ValueError(
                f"{first.array}: --delays {delays}, but there are {frequencies} subcarriers or "
                f"delays. Set it to 1 … {frequencies}."
            )
        unknown = plan.subbands or (first.axes.has("delay") and delays == frequencies)
        subcarriers = None if unknown else frequencies
        common = None
        if plan.scaling == "set" and plan.subbands is None:
            common = _largest(opened, plan) / RADIUS
        tally = Tally()
        with progress(opened, "converting") as bar:
            for one in opened:
                _add(one, plan, out, tally, common, subcarriers, bar)
        if not tally.rows:
            raise ValueError(f"none of the {tally.empty_rows} rows has energy; expected channels.")
        findings = []  # what the doctor knows is about angles and delays
        if plan.subbands is None:
            looked_at = np.concatenate(tally.looked_at)
            findings = doctor.judge_converted(looked_at, linear=not plan.geometry.planar)
        described = out.finish(
            lambda sets: Description(
                angles=ports,
                delays=delays,
                sets=sets,
                columns=plan.geometry.columns,
                rows=plan.geometry.rows,
                polarisations=plan.geometry.polarisations,
                subcarriers=subcarriers,
                shift=plan.shift,
                kind="eigenvectors" if plan.subbands is not None else "channel",
                scaling="unit" if plan.subbands is not None else plan.scaling,
                made=_made(plan, tally, findings) | dict(about or {}),
            )
        )
    return described, tally


def _check_alike(one: Opened, first: Opened) -> None:
    """Refuse (ValueError) inputs whose images can't be of one folder."""
    if one.size != first.size:
        ports, frequencies = first.size
        raise ValueError(
            f"{one.array}: {one.size[0]} ports x {one.size[1]} subcarriers or delays; "
            f"{first.array.path} has {ports} x {frequencies}. Convert them into folders of "
            "their own."
        )
    if one.domain != first.domain:
        raise ValueError(
            f"{one.array} has axes {one.axes.text!r}, {first.array.path} "
            f"{first.axes.text!r}; expected both over tx or both over angle, and both over "
            "subcarrier or both over delay. Convert them into folders of their own."
        )


def _made(plan: Plan, tally: Tally, findings: list[doctor.Finding]) -> dict[str, Any]:
    return {
        "csipipe": __version__,
        "split": list(plan.split),
        "seed": plan.seed,
        "receive": plan.receive,
        "time": plan.time,
        "order_of_ports": list(plan.geometry.order),
        "energy_lost": tally.lost,
        "rows_dropped": tally.empty_rows,
        "users": tally.users,
        "users_dropped": tally.empty_users,
        "findings": [[one.verdict, one.what, one.repair] for one in findings],
        "sources": tally.sources,
    }


def _largest(opened: Sequence[Opened], plan: Plan) -> float:
    """The largest magnitude in the images of all rows."""
    largest = 0.0
    with progress(opened, "measuring") as bar:
        for one in opened:
            for rows, _ in one.blocks(plan, bar):
                image = to_image(rows, plan.geometry, plan.delays, plan.shift, *one.domain).image
                largest = max(largest, float(np.abs(image).max(initial=0.0)))
    return largest


def _add(
    one: Opened,
    plan: Plan,
    out: Writer,
    tally: Tally,
    common: float | None,
    subcarriers: int | None,
    bar: Any,
) -> None:
    """Add the rows of one input, and say where they are from."""
    alive = np.zeros(len(one.part_of), bool)
    before = one.given.path.stat()
    for rows, users in one.blocks(plan, bar):
        if plan.subbands is not None:
            good = _add_vectors(one, plan, rows, users, out, tally)
        else:
            good = _add_images(one, plan, rows, users, out, tally, common, subcarriers)
        tally.empty_rows += int((~good).sum())
        alive[users[good]] = True
    after = one.given.path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ValueError(f"{one.given.path} changed while it was read; start again.")
    tally.users += len(alive)
    tally.empty_users += int((~alive).sum())
    tally.sources.append(
        {
            "name": os.fsencode(one.given.path.name).decode("utf-8", "backslashreplace"),
            "bytes": before.st_size,
            "sha256": digest(one.given.path),
            "key": one.array.key,
            "shape": list(one.array.shape),
            "dtype": one.array.dtype,
            "axes": one.axes.text,
            "guessed": plan.axes is None,
            "offset": one.zero,
        }
    )


def _add_images(
    one: Opened,
    plan: Plan,
    rows: Complex,
    users: NDArray[np.int64],
    out: Writer,
    tally: Tally,
    common: float | None,
    subcarriers: int | None,
) -> NDArray[np.bool_]:
    """Add images of (n, ports, subcarriers) rows; which of them have energy inside the image."""
    in_angle, in_delay = one.domain
    made = to_image(rows, plan.geometry, plan.delays, plan.shift, in_angle, in_delay)
    peak = np.abs(made.image).max(axis=(1, 2))
    scale = peak / np.float32(RADIUS) if common is None else np.full_like(peak, common)
    scale[scale == 0] = 1
    images = np.empty((len(scale), 2, *made.image.shape[1:]), np.float32)
    ratio = made.image / scale[:, None, None]
    images[:, 0], images[:, 1] = ratio.real, ratio.imag
    images += np.float32(ZERO)  # beside which a common scale may leave nothing of a weak row
    np.clip(images, 0, 1, out=images)  # rounding may put the peak one ulp outside
    good: NDArray[np.bool_] = (images != np.float32(ZERO)).any(axis=(1, 2, 3))
    images, scale = images[good], scale[good]
    # a DFT over ports leaves the energy of a delay as it is, but for a factor
    power = np.square(np.abs(made.delays[good])).sum(axis=1, dtype=np.float64)
    shares = power / power.sum(axis=1, keepdims=True)
    tally.rows += len(shares)
    tally.kept += float(shares[:, : plan.delays].sum())
    profile = np.roll(shares.sum(axis=0), -plan.shift)
    tally.profile = profile if tally.profile is None else tally.profile + profile
    for part, chosen in _by_part(one, users[good]):
        frequency = None
        if part == "test" and subcarriers is not None:
            whole = np.fft.fft(made.delays[good][chosen], axis=-1).astype(np.complex64)
            frequency = plan.geometry.angles(whole, in_angle)
        user = tally.users + users[good][chosen]  # another file's users are other ones
        out.add(one.given.environment, part, images[chosen], scale[chosen], frequency, user)
    if sum(map(len, tally.looked_at)) < LOOKED_AT:
        tally.looked_at.append(images[:: max(1, len(images) // 256)])
    return good


def _check_vectors(one: Opened, subbands: int, frequencies: int) -> None:
    """Refuse (ValueError) what has no eigenvectors of so many subbands."""
    if any(one.domain):
        raise ValueError(
            f"{one.array}, --axes {one.axes.text!r}: eigenvectors are of ports and subcarriers; "
            "give channels over tx and subcarrier."
        )
    if not 1 <= subbands <= frequencies:
        there = f"there are {frequencies} subcarriers" if subbands > 0 else "expected at least one"
        raise ValueError(
            f"{one.array}: {subbands} subbands, but {there}. Set --subbands to 1 … {frequencies}."
        )


def _add_vectors(
    one: Opened,
    plan: Plan,
    rows: Complex,
    users: NDArray[np.int64],
    out: Writer,
    tally: Tally,
) -> NDArray[np.bool_]:
    """Add eigenvectors of (n, rx, ports, subcarriers) rows; which have no silent subband."""
    assert plan.subbands is not None
    silent = [(part == 0).all(axis=(1, 2, 3)) for part in np.array_split(rows, plan.subbands, 3)]
    good: NDArray[np.bool_] = ~np.any(silent, axis=0)
    flat = rows[good].reshape(-1, *rows.shape[2:])
    ordered = plan.geometry.angles(flat, in_angle=True).reshape(-1, *rows.shape[1:])
    images = to_vectors(images_of(ordered, plan.subbands))
    tally.rows += len(images)
    tally.kept += len(images)
    for part, chosen in _by_part(one, users[good]):
        user = tally.users + users[good][chosen]
        out.add(one.given.environment, part, images[chosen], user=user)
    return good


def _by_part(one: Opened, users: NDArray[np.int64]) -> Iterator[tuple[SetPart, NDArray[np.bool_]]]:
    """Each set that rows of these users go to, and which rows."""
    parts = one.part_of[users]
    for number, part in enumerate(PARTS):
        chosen = parts == number
        if chosen.any():
            yield part, chosen
