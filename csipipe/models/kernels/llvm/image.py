"""What kernels do with one image of some channels: load it, convolve it, sum over it.

Shapes: C channels, A angles, D delays, L lanes; an image is (C, A, D), as PyTorch has it. What is
convolved lies in a frame of zeros, in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from csipipe.models.kernels.llvm.language import Array, Function, Index, Sum, Vector

Size = tuple[int, int]
"""Size of a convolution's kernel: angles, delays; both odd."""
Place = Index | int
Load = Callable[[Place, int], Vector]
"""Values of a channel, by the index of the first and the number of lanes."""
TOGETHER = 3
"""Rows of a convolution, or taps of its weight gradient, that go through the registers at a time:
what hides the latency of products with 16 registers."""
_LINE = 16
"""Floats in a cache line."""
STREAMS = 4
"""Independent parts of a sum over a channel, which hide the latency of sums."""


@dataclass(frozen=True)
class Image:
    """An image's size."""

    angles: int
    delays: int

    @property
    def size(self) -> int:
        return self.angles * self.delays

    def rows(self, f: Function, rows: int) -> Iterator[tuple[Place, int]]:
        """The angles in blocks: first and number."""
        return _blocks(f, self.angles, rows)

    def columns(self, f: Function) -> Iterator[tuple[Place, int]]:
        """A row vector by vector: first delay and number of delays."""
        return _blocks(f, self.delays, f.lanes)

    def parts(self, f: Function) -> Iterator[list[tuple[Place, int]]]:
        """A channel from end to end, `STREAMS` vectors at a time: first index and lanes of each."""
        for first, number in _blocks(f, self.size, STREAMS * f.lanes):
            yield [(first + n, min(f.lanes, number - n)) for n in range(0, number, f.lanes)]


def _blocks(f: Function, number: int, block: int) -> Iterator[tuple[Place, int]]:
    """First and length of the blocks of 0 … number: a loop over whole ones, then the rest."""
    whole = number // block * block
    if whole:
        with f.loop(0, whole, block) as first:
            yield first, block
    if whole < number:
        yield whole, number - whole


@dataclass(frozen=True)
class Frame:
    """Where an image lies in memory that holds the zeros around it that a convolution needs.

    Zeros at the right of a row are also those at the left of the next, zeros below a channel
    those above the next.
    """

    image: Image
    channels: int
    kernel: Size
    lanes: int

    @property
    def row(self) -> int:
        return _up(self.image.delays + self.kernel[1] // 2, self.lanes)

    @property
    def channel(self) -> int:
        return (self.image.angles + self.kernel[0] // 2) * self.row

    @property
    def origin(self) -> int:
        return self._above + _up(self.kernel[1] // 2, self.lanes)

    @property
    def size(self) -> int:
        """Floats of the whole frame; vectors may be read that begin in the last row."""
        after = self._above + _up(self.kernel[1], self.lanes) + self.lanes
        return _up(self.origin + self.channels * self.channel + after, _LINE)

    @property
    def taps(self) -> list[int]:
        """Where a convolution's factors find their inputs, from an output's place in channel 0."""
        high, wide = self.kernel
        return [
            i * self.channel + (h - high // 2) * self.row + w - wide // 2
            for i in range(self.channels)
            for h in range(high)
            for w in range(wide)
        ]

    @property
    def _above(self) -> int:
        return (self.kernel[0] // 2) * self.row

    def memory(self, f: Function, name: str) -> Array:
        """A thread's frame."""
        return f.own(name, self.size)

    def place(self, channel: Place, angle: Place, delay: Place) -> Place:
        return channel * self.channel + (angle * self.row + (delay + self.origin))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Ahead:
    """Images of some channels that the next pass of a loop reads or writes."""

    array: Array
    channels: int
    written: bool = False

    def fetch(self, first: Place, values: int) -> None:
        """Have `values` of every channel fetched, from an index on."""
        for i in range(0, values * self.channels, _LINE):
            self.array.expect(first + i, self.written)


def fill(f: Function, frame: Frame, to: Array, values: Callable[[Place], Load]) -> None:
    """Put an image into its frame.

    Args:
        values: for a channel, its values.
    """
    with f.loop(0, frame.channels) as c:
        load = values(c)
        with f.loop(0, frame.image.angles) as a:
            row, place = to.at(frame.place(c, a, 0)), a * frame.image.delays
            for d in range(0, frame.image.delays, f.lanes):
                lanes = min(f.lanes, frame.image.delays - d)
                row.store(d, load(place + d, lanes).only(lanes))


def groups(outputs: int, registers: int) -> list[int]:
    """How many outputs to hold in registers at a time: `TOGETHER` sums of each, as many inputs,
    and a factor must fit."""
    number = -(-outputs // ((registers - 1 - TOGETHER) // TOGETHER))
    return [len(range(g, outputs, number)) for g in range(number)]


def convolve(
    f: Function,
    frame: Frame,
    outputs: int,
    stride: int,
    store: Callable[[int, Place, Vector, int], None],
    next_image: Sequence[Ahead],
    biased: bool = False,
) -> None:
    """Convolve what lies in the array `frame`.

    The array `taps` (taps, 2) holds, for each factor, where its input lies in the frame, and
    where it lies itself in the array `weights` for output 0.

    Args:
        stride: from an output's factor to the next output's.
        store: takes output channel, index in the channel, values and lanes.
        next_image: what is to be fetched meanwhile.
        biased: whether to add the array `bias` (outputs,).
    """
    image, first = frame.image, 0
    for width in groups(outputs, f.registers):
        for a, rows in image.rows(f, TOGETHER if width > 2 else TOGETHER + 1):
            for d, lanes in image.columns(f):
                for ahead in next_image if not first else ():
                    ahead.fetch((a * image.delays + d * rows) * ahead.channels, rows * lanes)
                cells = [
                    [
                        Sum(f, f.array("bias").everywhere(first + o) if biased else 0.0)
                        for _ in range(rows)
                    ]
                    for o in range(width)
                ]
                here = frame.memory(f, "frame").at(frame.place(0, a, d))
                with f.loop(0, len(frame.taps)) as t:
                    window = here.at(f.integers("taps")[t * 2])
                    factors = f.array("weights").at(f.integers("taps")[t * 2 + 1])
                    x = [window.load(r * frame.row) for r in range(rows)]
                    for o in range(width):
                        factor = factors.everywhere((first + o) * stride)
                        for r in range(rows):
                            cells[o][r].add(factor * x[r])
                for o in range(width):
                    for r in range(rows):
                        place = (a + r) * image.delays + d
                        store(first + o, place, cells[o][r].value, lanes)
        first += width


def padded(taps: int) -> int:
    """How many taps `correlate` goes through."""
    return _up(taps, TOGETHER)


def correlate(
    f: Function, frame: Frame, plain: Frame, sums: Array, next_image: Sequence[Ahead]
) -> None:
    """Add an image's share of a convolution's weight gradient to `sums` (taps, outputs, L).

    The convolution's input lies in the array `frame`, the gradient at its output in the array
    `plain`, a frame without zeros; `taps` are the frame's, `padded`. `next_image` is to be fetched
    meanwhile.
    """
    image, outputs = frame.image, plain.channels
    with f.loop(0, padded(len(frame.taps)), TOGETHER) as t:
        for ahead in next_image:
            share = -(-image.size // padded(len(frame.taps)))
            ahead.fetch(t * (share * ahead.channels), TOGETHER * share)
        places = [f.integers("taps")[(t + j) * 2] for j in range(TOGETHER)]
        windows = [frame.memory(f, "frame").at(place) for place in places]
        first = 0
        for width in groups(outputs, f.registers):
            at = [
                [((t + j) * outputs + (first + o)) * f.lanes for j in range(TOGETHER)]
                for o in range(width)
            ]
            cells = [[Sum(f, sums.load(place)) for place in row] for row in at]
            with f.loop(0, image.angles) as a:
                rows = [window.at(frame.place(0, a, 0)) for window in windows]
                given = plain.memory(f, "plain").at(plain.place(first, a, 0))
                for d in range(0, image.delays, f.lanes):
                    x = [row.load(d) for row in rows]
                    for o in range(width):
                        g = given.load(o * plain.channel + d)
                        for j in range(TOGETHER):
                            cells[o][j].add(g * x[j])
            for o in range(width):
                for j in range(TOGETHER):
                    sums.store(at[o][j], cells[o][j].value)
            first += width


class Total:
    """A sum over a channel, in `STREAMS` parts."""

    def __init__(self, f: Function) -> None:
        self.parts = [Sum(f, 0.0) for _ in range(STREAMS)]

    def add(self, part: int, value: Vector) -> None:
        self.parts[part].add(value)

    @property
    def value(self) -> Vector:
        first, *others = (part.value for part in self.parts)
        for other in others:
            first = first + other
        return first


def lane_counts(image: Image, lanes: int) -> list[int]:
    """How many values of a channel each lane sees from end to end."""
    return [len(range(lane, image.size, lanes)) for lane in range(lanes)]


def moments(f: Function, image: Image, channels: int, z: Array, out: Array) -> None:
    """Mean and sum of squares around it, per channel and lane of an image.

    Two passes over what is still in the cache: one would lose most digits where a channel varies
    little around a large mean.

    Args:
        z: (C, A, D).
        out: (2, C, L).
    """
    shares = f.constants([1 / max(n, 1) for n in lane_counts(image, f.lanes)])
    with f.loop(0, channels) as c:
        channel = z.at(c * image.size)
        total = Total(f)
        for part in image.parts(f):
            for n, (i, lanes) in enumerate(part):
                total.add(n, channel.load(i, lanes))
        mean = total.value * shares
        squares = Total(f)
        for part in image.parts(f):
            for n, (i, lanes) in enumerate(part):
                away = (channel.load(i, lanes) - mean).only(lanes)
                squares.add(n, away * away)
        out.store(c * f.lanes, mean)
        out.store((c + channels) * f.lanes, squares.value)
