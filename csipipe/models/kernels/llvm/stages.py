"""The stages of CRBlock and of convolutions, as kernels.

Each goes once through the images that it is given. Activations are never stored: a stage computes
them on load from what came out of the convolution before it (`sources`). What BatchNorm needs of
the whole mini-batch is left per image, channel and lane, to be summed in float64 (`norm`).

Shapes and names as in `sources`; L lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from csipipe.models.kernels.llvm import image as images
from csipipe.models.kernels.llvm.image import Frame, Image, Place, Size, Total
from csipipe.models.kernels.llvm.language import Function, Index, Sum, Vector
from csipipe.models.kernels.llvm.sources import (
    MEAN,
    SCALE,
    SHIFT,
    Images,
    Source,
    leaky,
    leaky_backward,
)

PIECE = 8
"""Images whose weight gradients are summed in float32; pieces are in float64."""
Number = TypeVar("Number", int, Index)


def pieces(rows: Number) -> Number:
    """How many pieces so many images have."""
    return (rows + (PIECE - 1)) // PIECE


def convolution(
    f: Function,
    image: Image,
    source: Source,
    channels: int,
    size: Size,
    outputs: int,
    biased: bool,
    moments: bool,
) -> None:
    """z = convolution(source), with a bias or not; and with its `moments` (B, 2, C, L) or not."""
    frame = Frame(image, channels, size, f.lanes)
    with f.shared(f.rows) as b:
        here = Images(f, image, channels, "", b)
        there = Images(f, image, outputs, "out ", b)
        z = there.array("z", 0)
        images.fill(f, frame, frame.memory(f, "frame"), lambda c: here.values(source, c))
        images.convolve(
            f,
            frame,
            outputs,
            channels * size[0] * size[1],
            lambda o, i, value, lanes: z.store(o * image.size + i, value, lanes),
            [*here.source_ahead(source), *there.ahead("z", written=True)],
            biased,
        )
        if moments:
            sums = f.array("sums").at(b * (2 * outputs * f.lanes))
            images.moments(f, image, outputs, z, sums)


def join(f: Function, image: Image, paths: int, channels: int, moments: bool) -> None:
    """The 1×1 convolution of all paths' activations to z (B, 2, A, D); moments as `convolution`."""
    with f.shared(f.rows) as b:
        z = Images(f, image, 2, "", b).array("z", 0)
        for part in image.parts(f):
            cells = [[Sum(f, 0.0) for _ in part] for _ in range(2)]
            for path in range(paths):
                here = Images(f, image, channels, f"{path} ", b)
                with f.loop(0, channels) as c:
                    load, factors = here.active(c), here.factors(c)
                    for n, (i, lanes) in enumerate(part):
                        active = load(i, lanes)
                        for o in range(2):
                            cells[o][n].add(active * factors[o])
            for o in range(2):
                for n, (i, lanes) in enumerate(part):
                    z.store(o * image.size + i, cells[o][n].value, lanes)
        if moments:
            images.moments(f, image, 2, z, f.array("sums").at(b * (2 * 2 * f.lanes)))


def residual(f: Function, image: Image) -> None:
    """A block's output: LeakyReLU of BatchNorm of the join's z, plus the block's input."""
    with f.shared(f.rows) as b, f.loop(0, 2) as c:
        here = Images(f, image, 2, "", b)
        z, x, out, norm = here.load("z", c), here.load("x", c), here.array("out", c), here.norm(c)
        scale, shift = norm[SCALE], norm[SHIFT]
        for part in image.parts(f):
            for i, lanes in part:
                out.store(i, leaky(z(i, lanes) * scale + shift + x(i, lanes)), lanes)


def output_backward(f: Function, image: Image, channels: int) -> None:
    """q from the gradient dy at `out`, a LeakyReLU's output; q's sums with 1 and z − mean."""
    with f.shared(f.rows) as b, f.loop(0, channels) as c:
        here = Images(f, image, channels, "", b)
        out, dy, z, q = (here.array(name, c) for name in ("out", "dy", "z", "q"))
        mean = here.norm(c)[MEAN]
        totals = Total(f), Total(f)
        for part in image.parts(f):
            for n, (i, lanes) in enumerate(part):
                value = leaky_backward(out.load(i, lanes), dy.load(i, lanes))
                q.store(i, value, lanes)
                totals[0].add(n, value)
                totals[1].add(n, value * (z.load(i, lanes) - mean))
        _keep(f, totals, channels, b, c, "sums")


def join_backward(f: Function, image: Image, paths: int, channels: int) -> None:
    """dz at the join's output, and per path: q's sums with 1 and z − mean, dz's with the
    activations (the join's weight gradient)."""
    with f.shared(f.rows) as b:
        here = Images(f, image, 2, "", b)
        dz = here.array("dz", 0)
        with f.loop(0, 2) as c:
            load, channel = here.normed(c), here.array("dz", c)
            for part in image.parts(f):
                for i, lanes in part:
                    channel.store(i, load(i, lanes), lanes)
        for path in range(paths):
            path_here = Images(f, image, channels, f"{path} ", b)
            with f.loop(0, channels) as c:
                end, mean = path_here.path_end(c), path_here.norm(c)[MEAN]
                totals = [Total(f) for _ in range(4)]
                for part in image.parts(f):
                    for n, (i, lanes) in enumerate(part):
                        z, y, q = end(i, lanes)
                        totals[0].add(n, q)
                        totals[1].add(n, q * (z - mean))
                        active = leaky(y)
                        for o in range(2):
                            totals[2 + o].add(n, dz.load(o * image.size + i, lanes) * active)
                _keep(f, totals, channels, b, c, f"{path} sums")


def convolution_backward(
    f: Function, image: Image, source: Source, channels: int, size: Size, outputs: int
) -> None:
    """The gradient at a convolution's input, an activation of z: its q, and q's sums with 1 and
    z − mean, (B, 2, C, L).

    Args:
        source, channels: of the gradient at the convolution's output.
        outputs: channels of its input.
    """
    frame = Frame(image, channels, size, f.lanes)
    with f.shared(f.rows) as b:
        here, there = Images(f, image, channels, "", b), Images(f, image, outputs, "in ", b)
        images.fill(f, frame, frame.memory(f, "frame"), lambda c: here.values(source, c))
        q = there.array("q", 0)
        images.convolve(
            f,
            frame,
            outputs,
            size[0] * size[1],
            lambda o, i, value, lanes: q.store(o * image.size + i, value, lanes),
            [*here.source_ahead(source), *there.ahead("z"), *there.ahead("q", written=True)],
        )
        with f.loop(0, outputs) as c:
            z, q, norm = there.load("z", c), there.array("q", c), there.norm(c)
            scale, shift, mean = norm[SCALE], norm[SHIFT], norm[MEAN]
            totals = Total(f), Total(f)
            for part in image.parts(f):
                for n, (i, lanes) in enumerate(part):
                    value = z(i, lanes)
                    gradient = leaky_backward(value * scale + shift, q.load(i, lanes))
                    q.store(i, gradient, lanes)
                    totals[0].add(n, gradient)
                    totals[1].add(n, gradient * (value - mean))
            _keep(f, totals, outputs, b, c, "sums")


def input_backward(
    f: Function, image: Image, source: Source, channels: int, size: Size, outputs: int
) -> None:
    """Add the gradient at a convolution's input, an image that is stored as it is, to dx.

    Args:
        source, channels: of the gradient at the convolution's output.
        outputs: channels of its input.
    """
    frame = Frame(image, channels, size, f.lanes)
    with f.shared(f.rows) as b:
        here = Images(f, image, channels, "", b)
        there = Images(f, image, outputs, "", b)
        dx = there.array("dx", 0)
        images.fill(f, frame, frame.memory(f, "frame"), lambda c: here.values(source, c))

        def add(o: int, i: Place, value: Vector, lanes: int) -> None:
            place = i + o * image.size
            dx.store(place, dx.load(place, lanes) + value, lanes)

        next_image = [*here.source_ahead(source), *there.ahead("dx", written=True)]
        images.convolve(f, frame, outputs, size[0] * size[1], add, next_image)


def weight_gradient(
    f: Function,
    image: Image,
    source: Source,
    channels: int,
    size: Size,
    gradient: Source,
    outputs: int,
) -> None:
    """A convolution's weight gradient over pieces of a mini-batch: `sums` (P, taps, outputs, L).

    Args:
        source, channels: of the convolution's input.
        gradient, outputs: of the gradient at its output.
    """
    frame = Frame(image, channels, size, f.lanes)
    plain = Frame(image, outputs, (1, 1), f.lanes)
    cells = images.padded(len(frame.taps)) * outputs
    with f.shared(pieces(f.rows)) as piece:
        sums = f.array("sums").at(piece * (cells * f.lanes))
        with f.loop(0, cells) as cell:
            sums.store(cell * f.lanes, f.constants([0.0] * f.lanes))
        first = piece * PIECE
        with f.loop(first, (first + PIECE).smaller(f.rows)) as b:
            here, there = Images(f, image, channels, "in ", b), Images(f, image, outputs, "", b)
            images.fill(f, frame, frame.memory(f, "frame"), lambda c: here.values(source, c))
            images.fill(f, plain, plain.memory(f, "plain"), lambda c: there.values(gradient, c))
            next_image = [*here.source_ahead(source), *there.source_ahead(gradient)]
            images.correlate(f, frame, plain, sums, next_image)


def weight_total(f: Function, taps: int, outputs: int) -> None:
    """`weight` (outputs, taps) from the `sums` of all pieces."""
    cells = images.padded(taps) * outputs
    with f.shared(taps) as tap, f.loop(0, outputs) as o:
        total = Sum(f, f.constants([0.0] * f.lanes).doubles())
        with f.loop(0, pieces(f.rows)) as piece:
            total.add(f.array("sums").load((piece * cells + tap * outputs + o) * f.lanes).doubles())
        f.array("weight").store(o * taps + tap, total.value.total().floats(), 1)


def _keep(
    f: Function, totals: Sequence[Total], channels: int, b: Index, c: Index, name: str
) -> None:
    """Totals of channel `c` to (B, totals, C, L)."""
    for number, total in enumerate(totals):
        place = ((b * len(totals) + number) * channels + c) * f.lanes
        f.array(name).store(place, total.value)
