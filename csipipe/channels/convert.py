"""Any array of channels to csipipe's own format, block by block.

H[p, k] of port p and subcarrier k becomes an image of angles and delays: inverse DFT over k,
rolled by `shift`, the first D delays; DFT over the ports of the array, divided by A; scaled by a
peak magnitude to radius 0.5, plus 0.5. All of it can be undone but the truncation, against which
ρ and SGCS are measured: test rows keep all their subcarriers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from csipipe import __version__
from csipipe.channels import doctor, rawarray
from csipipe.channels.axes import Axes, parse
from csipipe.channels.cache import digest
from csipipe.channels.eigenvectors import images_of
from csipipe.channels.eigenvectors import to_image as to_vectors
from csipipe.channels.format import Description, SetPart
from csipipe.channels.rawarray import RawArray
from csipipe.channels.reading import guess
from csipipe.channels.source import Images
from csipipe.channels.transform import (
    RADIUS,
    ZERO,
    Complex,
    Geometry,
    to_image,
)
from csipipe.channels.writer import Writer

BLOCK = 16 << 20
"""Bytes of complex values that are converted at once."""
KEPT = 32
"""Delays that are kept by default, where there are more."""
LOOKED_AT = 2000
"""Training rows that the doctor sees."""
PARTS: tuple[SetPart, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How arrays become images."""

    axes: str | None = None
    """See `axes`; None: guessed."""
    key: str | None = None
    geometry: Geometry = field(default_factory=Geometry)
    delays: int = 0
    """0: all, at most 32."""
    shift: int = 0
    scaling: Literal["sample", "set"] = "sample"
    receive: Literal["rows", "strongest"] = "rows"
    time: Literal["samples", "first"] = "samples"
    offset: float | None = None
    """The value that stands for zero; None: 0, or 0.5 where pairs of reals lie in [0, 1]."""
    subbands: int | None = None
    """Eigenvectors of so many subbands instead of angles and delays, see `eigenvectors`."""
    split: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Shares of training, validation (if there are three) and test rows, by user."""
    seed: int = 0


@dataclass(frozen=True)
class Input:
    """One file, and the set that its rows go to."""

    path: Path
    environment: str
    part: SetPart | None
    """None: divided by `Plan.split`."""


@dataclass
class Tally:
    """What a conversion has seen."""

    rows: int = 0
    empty_rows: int = 0
    """Rows without energy, or without any inside the image: dropped."""
    users: int = 0
    empty_users: int = 0
    """Users none of whose rows was kept."""
    kept: float = 0.0
    """Sum over rows of the share of energy that is inside the image."""
    profile: NDArray[np.float64] | None = None
    """(K,) sum over rows of the share of energy in each delay, before rolling."""
    looked_at: list[Images] = field(default_factory=list)
    parts: dict[tuple[str, str], int] = field(default_factory=dict)
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


@dataclass(frozen=True)
class _Opened:
    array: RawArray
    axes: Axes
    given: Input
    zero: float
    part_of: NDArray[np.int8]
    """(users,) which of `PARTS` a user's rows go to."""


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
        opened = [_look(one, plan, stack, folder.parent) for one in inputs]
        first = opened[0]
        ports, frequencies = _size(first)
        for one in opened[1:]:
            if _size(one) != (ports, frequencies):
                raise ValueError(
                    f"{one.array}: {_size(one)[0]} ports x {_size(one)[1]} subcarriers or delays; "
                    f"{first.array.path} has {ports} x {frequencies}. Convert them into folders of "
                    "their own."
                )
            if _domain(one) != _domain(first):
                raise ValueError(
                    f"{one.array} has axes {one.axes.text!r}, {first.array.path} "
                    f"{first.axes.text!r}; expected both over tx or both over angle, and both over "
                    "subcarrier or both over delay. Convert them into folders of their own."
                )
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
        with _bar(opened, "converting") as bar:
            for one in opened:
                _add(one, plan, out, tally, common, subcarriers, bar)
        if not tally.rows:
            raise ValueError(f"none of the {tally.empty_rows} rows has energy; expected channels.")
        findings = []  # what the doctor knows is about angles and delays
        if plan.subbands is None:
            looked_at = np.concatenate(tally.looked_at)
            findings = doctor.judge(looked_at, linear=not plan.geometry.planar)
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


def _look(given: Input, plan: Plan, stack: ExitStack, scratch: Path) -> _Opened:
    """Open a file and read its axes, and its users' parts."""
    array = stack.enter_context(rawarray.opened(given.path, plan.key, scratch))
    axes = parse(plan.axes) if plan.axes else guess(array)
    try:
        sizes = axes.sizes(array.shape)
    except ValueError as error:
        raise ValueError(f"{array}: {error}") from error
    is_complex = array.dtype.startswith("complex")
    if is_complex == axes.has("part"):
        remedy = "leave the axis part out" if is_complex else "name the axis of real and imaginary "
        remedy += "" if is_complex else "parts: part"
        raise ValueError(f"{array}, --axes {axes.text!r}: the values are {array.dtype}; {remedy}.")
    users = math.prod(size for word, size in sizes if word == axes.identity)
    return _Opened(
        array, axes, given, _zero(array, plan), _parts(given, users, plan.split, plan.seed)
    )


def _size(one: _Opened) -> tuple[int, int]:
    sizes = dict(one.axes.sizes(one.array.shape))
    return (
        sizes.get("tx", sizes.get("angle", 1)),
        sizes.get("subcarrier", sizes.get("delay", 1)),
    )


def _domain(one: _Opened) -> tuple[bool, bool]:
    """Whether it is in angles, and in delays."""
    return one.axes.has("angle"), one.axes.has("delay")


def _zero(array: RawArray, plan: Plan) -> float:
    if plan.offset is not None:
        return plan.offset
    if array.dtype.startswith("complex"):
        return 0.0
    some = array.cut(0, 0, min(array.shape[0], 64))
    inside = some.min() >= 0 and some.max() <= 1 and abs(float(np.median(some)) - ZERO) < 0.1
    return ZERO if inside else 0.0


def _parts(given: Input, users: int, split: Sequence[float], seed: int) -> NDArray[np.int8]:
    """Which of `PARTS` each user's rows go to."""
    if given.part is not None:
        return np.full(users, PARTS.index(given.part), np.int8)
    names = (0, 1, 2) if len(split) == 3 else (0, 2)
    edges = [round(users * share) for share in np.cumsum(split)]
    found = np.empty(users, np.int8)
    order = np.random.default_rng(np.random.SeedSequence((seed, users))).permutation(users)
    start = 0
    for name, share, edge in zip(names, split, edges, strict=True):
        if share and edge <= start:
            raise ValueError(
                f"{given.path} has {users} user(s), too few for {PARTS[name]} rows of --split "
                f"{'/'.join(f'{s:g}' for s in split)}; a user's rows stay together. Give the sets "
                "as files with --sets, or other shares."
            )
        found[order[start:edge]] = name
        start = edge
    return found


def _blocks(one: _Opened, plan: Plan, bar: Any) -> Iterator[tuple[Complex, NDArray[np.int64]]]:
    """Rows (n, ports, frequencies) and their users (n,).

    Raises:
        ValueError: a value that isn't finite.
    """
    array, axes = one.array, one.axes
    axis = 0 if array.in_order else axes.streamed(array.shape)
    sizes = axes.sizes(array.shape)
    total = array.shape[axis]
    step = max(1, BLOCK // max(1, 8 * math.prod(size for _, size in sizes) // total))
    for start in range(0, total, step):
        stop = min(total, start + step)
        values = array.cut(axis, start, stop)
        _check_finite(array, values, axis, start)
        if one.zero:
            values = values - values.dtype.type(one.zero)
        channel = axes.arrange(values)
        users = np.broadcast_to(axes.users(array.shape, axis, start, stop), channel.shape[:5])
        if plan.time == "first":
            channel, users = channel[:, :, :1], users[:, :, :1]
        if plan.receive == "strongest":
            power = np.square(np.abs(channel)).sum(axis=(5, 6))
            best = power.argmax(axis=4)[..., None]
            channel = np.take_along_axis(channel, best[..., None, None], axis=4)
            users = users[..., :1]
        if plan.subbands is not None:  # those of all receive antennas together
            users = users[..., 0]
            channel = channel.reshape(-1, *channel.shape[4:])
        else:
            channel = channel.reshape(-1, *channel.shape[5:])
        yield channel, users.reshape(-1)
        bar.update(values.nbytes)


def _largest(opened: Sequence[_Opened], plan: Plan) -> float:
    """The largest magnitude in the images of all rows."""
    largest = 0.0
    with _bar(opened, "measuring") as bar:
        for one in opened:
            for rows, _ in _blocks(one, plan, bar):
                image = to_image(rows, plan.geometry, plan.delays, plan.shift, *_domain(one)).image
                largest = max(largest, float(np.abs(image).max(initial=0.0)))
    return largest


def _check_finite(array: RawArray, values: NDArray[Any], axis: int, start: int) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        total = values.sum(dtype=np.complex128)
    if np.isfinite(total) or np.isfinite(values).all():
        return
    place = np.argwhere(~np.isfinite(values))[0]
    place[axis] += start
    raise ValueError(
        f"{array} holds NaN or infinite values, first at {tuple(map(int, place))} (counted from "
        "0). Remove such samples or generate them again; a link that is blocked may be all zero."
    )


def _add(
    one: _Opened,
    plan: Plan,
    out: Writer,
    tally: Tally,
    common: float | None,
    subcarriers: int | None,
    bar: Any,
) -> None:
    in_angle, in_delay = _domain(one)
    alive = np.zeros(len(one.part_of), bool)
    before = one.given.path.stat()
    for rows, users in _blocks(one, plan, bar):
        if plan.subbands is not None:
            _add_vectors(one, plan, rows, users, out, tally, alive)
            continue
        made = to_image(rows, plan.geometry, plan.delays, plan.shift, in_angle, in_delay)
        peak = np.abs(made.image).max(axis=(1, 2))
        good = peak > 0
        tally.empty_rows += int((~good).sum())
        # a DFT over ports leaves the energy of a delay as it is, but for a factor
        power = np.square(np.abs(made.delays[good])).sum(axis=1, dtype=np.float64)
        shares = power / power.sum(axis=1, keepdims=True)
        tally.rows += len(shares)
        tally.kept += float(shares[:, : plan.delays].sum())
        profile = np.roll(shares.sum(axis=0), -plan.shift)
        tally.profile = profile if tally.profile is None else tally.profile + profile
        scale = (peak / np.float32(RADIUS) if common is None else np.full_like(peak, common))[good]
        images = np.empty((len(scale), 2, *made.image.shape[1:]), np.float32)
        ratio = made.image[good] / scale[:, None, None]
        images[:, 0], images[:, 1] = ratio.real, ratio.imag
        images += np.float32(ZERO)
        np.clip(images, 0, 1, out=images)  # rounding may put the peak one ulp outside
        mine = users[good]
        alive[mine] = True
        for part, chosen in _by_part(one, mine, tally):
            frequency = None
            if part == "test" and subcarriers is not None:
                whole = np.fft.fft(made.delays[good][chosen], axis=-1).astype(np.complex64)
                frequency = plan.geometry.angles(whole, in_angle)
            out.add(one.given.environment, part, images[chosen], scale[chosen], frequency)
        if sum(map(len, tally.looked_at)) < LOOKED_AT:
            tally.looked_at.append(images[:: max(1, len(images) // 256)])
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


def _check_vectors(one: _Opened, subbands: int, frequencies: int) -> None:
    """Refuse (ValueError) what has no eigenvectors of so many subbands."""
    if any(_domain(one)):
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
    one: _Opened,
    plan: Plan,
    rows: Complex,
    users: NDArray[np.int64],
    out: Writer,
    tally: Tally,
    alive: NDArray[np.bool_],
) -> None:
    """Add eigenvectors of (n, rx, ports, subcarriers) rows; with a silent subband: dropped."""
    assert plan.subbands is not None
    silent = [(part == 0).all(axis=(1, 2, 3)) for part in np.array_split(rows, plan.subbands, 3)]
    good = ~np.any(silent, axis=0)
    tally.empty_rows += int((~good).sum())
    mine = users[good]
    alive[mine] = True
    flat = rows[good].reshape(-1, *rows.shape[2:])
    ordered = plan.geometry.angles(flat, in_angle=True).reshape(-1, *rows.shape[1:])
    images = to_vectors(images_of(ordered, plan.subbands))
    tally.rows += len(images)
    tally.kept += len(images)
    for part, chosen in _by_part(one, mine, tally):
        out.add(one.given.environment, part, images[chosen])


def _by_part(
    one: _Opened, users: NDArray[np.int64], tally: Tally
) -> Iterator[tuple[SetPart, NDArray[np.bool_]]]:
    """Each set that rows of these users go to, and which rows; counts them."""
    parts = one.part_of[users]
    for number, part in enumerate(PARTS):
        chosen = parts == number
        if chosen.any():
            key = one.given.environment, part
            tally.parts[key] = tally.parts.get(key, 0) + int(chosen.sum())
            yield part, chosen


def _bar(opened: Sequence[_Opened], what: str) -> Any:
    total = 0
    for one in opened:
        itemsize = 8 if one.array.dtype == "complex" else np.dtype(one.array.dtype).itemsize
        total += math.prod(one.array.shape) * itemsize
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, leave=False)
