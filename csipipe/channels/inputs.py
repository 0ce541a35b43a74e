"""Files that are converted, read block by block as rows of ports and subcarriers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from csipipe.channels import rawarray
from csipipe.channels.axes import Axes, parse
from csipipe.channels.format import SetPart
from csipipe.channels.rawarray import RawArray
from csipipe.channels.reading import guess
from csipipe.channels.transform import ZERO, Complex, Geometry

BLOCK = 16 << 20
"""Bytes of complex values that are converted at once."""
PARTS: tuple[SetPart, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How arrays become images."""

    axes: str | None = None
    """See `axes`; None: guessed."""
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

    @property
    def whole(self) -> tuple[str, ...]:
        """Axes of which a row needs all: they aren't read in pieces."""
        together = self.receive == "strongest" or self.subbands is not None
        return ("time",) * (self.time == "first") + ("rx",) * together


@dataclass(frozen=True)
class Input:
    """One array of a file, and the set that its rows go to."""

    path: Path
    environment: str
    part: SetPart | None
    """None: divided by `Plan.split`."""
    key: str | None = None
    """The array's name; None: the only one of the file."""


@dataclass(frozen=True)
class Opened:
    """An input whose axes are known.

    Attributes:
        zero: the value that stands for zero.
        part_of: (users,) which of `PARTS` a user's rows go to.
    """

    array: RawArray
    axes: Axes
    given: Input
    zero: float
    part_of: NDArray[np.int8]

    @property
    def size(self) -> tuple[int, int]:
        """Ports or angles, and subcarriers or delays."""
        sizes = dict(self.axes.sizes(self.array.shape))
        ports = sizes.get("tx", sizes.get("angle", 1))
        return ports, sizes.get("subcarrier", sizes.get("delay", 1))

    @property
    def domain(self) -> tuple[bool, bool]:
        """Whether it is in angles, and in delays."""
        return self.axes.has("angle"), self.axes.has("delay")

    def blocks(self, plan: Plan, bar: Any) -> Iterator[tuple[Complex, NDArray[np.int64]]]:
        """Rows (n, ports, frequencies) and their users (n,); rows of eigenvectors also have rx.

        Raises:
            ValueError: a value that isn't finite.
        """
        array, axes = self.array, self.axes
        cut = axes.streamed(array.shape, plan.whole, array.in_order)
        axis = cut or 0
        step = total = array.shape[axis]
        if cut is not None:
            step = max(1, BLOCK // max(1, 8 * math.prod(array.shape) // total))
        for start in range(0, total, step):
            stop = min(total, start + step)
            values = array.cut(axis, start, stop)
            _check_finite(array, values, axis, start)
            centred = values
            if self.zero:  # integers would wrap around, or cut off the offset's fraction
                centred = values.astype(np.result_type(values, np.float32)) - self.zero
            channel = axes.arrange(centred)
            users = np.broadcast_to(axes.users(array.shape, cut, start, stop), channel.shape[:5])
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


def look(given: Input, plan: Plan, stack: ExitStack, scratch: Path) -> Opened:
    """Open a file and read its axes, and its users' parts."""
    array = stack.enter_context(rawarray.opened(given.path, given.key, scratch))
    axes = parse(plan.axes) if plan.axes else guess(array)
    try:
        sizes = axes.sizes(array.shape)
    except ValueError as error:
        raise ValueError(f"{array}: {error}") from error
    is_complex = array.dtype.startswith("complex")
    if is_complex == axes.has("part"):
        remedy = "name the axis of real and imaginary parts: part"
        if is_complex:
            remedy = "leave the axis part out"
        raise ValueError(f"{array}, --axes {axes.text!r}: the values are {array.dtype}; {remedy}.")
    users = math.prod(size for word, size in sizes if word == axes.identity)
    return Opened(
        array, axes, given, _zero(array, plan), _parts(given, users, plan.split, plan.seed)
    )


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


def _check_finite(array: RawArray, values: NDArray[Any], axis: int, start: int) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        total = values.sum(dtype=np.complex128)
    if np.isfinite(total) or np.isfinite(values).all():
        return
    place = np.argwhere(~np.isfinite(values))[0]
    place[axis] += start
    inner = (*range(1, values.ndim),)
    raise ValueError(
        f"{array} holds NaN or infinite values, first at {tuple(map(int, place))} (counted from "
        "0). Remove such samples or generate them again; a link that is blocked may be all zero. "
        f"In Python, with samples first: array[numpy.isfinite(array).all({inner})]"
    )


def progress(opened: Sequence[Opened], what: str) -> Any:
    """A bar over the bytes of all inputs, with `update`."""
    total = 0
    for one in opened:
        itemsize = 8 if one.array.dtype == "complex" else np.dtype(one.array.dtype).itemsize
        total += math.prod(one.array.shape) * itemsize
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, leave=False)
