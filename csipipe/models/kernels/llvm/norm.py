"""BatchNorm between kernels: sums over the mini-batch in float64, and what follows from them.

Shapes: B images, C channels, L lanes. A BatchNorm's arrays are its `scale`, `shift` and running
`mean` and `variance` (C), and the `norm` (6, C) that other kernels read (`sources`).
"""

from __future__ import annotations

from csipipe.models.kernels.llvm.image import Image, lane_counts
from csipipe.models.kernels.llvm.language import Function, Index, Sum, Vector
from csipipe.models.kernels.llvm.sources import (
    CONSTANT,
    INVERSE,
    MEAN,
    OF_Z,
    SCALE,
    SHIFT,
    Norm,
)


def of_batch(f: Function, image: Image, channels: int, eps: float, momentum: float) -> None:
    """The norm by the mini-batch's own statistics; the running ones follow them.

    `sums` (B, 2, C, L) are the images' `moments`.
    """
    counts = f.constants(lane_counts(image, f.lanes)).doubles()
    values = (f.rows * image.size).doubles()
    with f.shared(channels) as c:
        total, squares = _zero(f), _zero(f)
        with f.loop(0, f.rows) as b:
            total.add(_sums(f, 2, channels, b, 0, c))
        mean = (total.value * counts).total() / values
        with f.loop(0, f.rows) as b:
            away = _sums(f, 2, channels, b, 0, c) - mean
            squares.add(_sums(f, 2, channels, b, 1, c) + away * away * counts)
        variance = squares.value.total() / values
        for name, found in (("mean", mean), ("variance", variance * (values / (values - 1.0)))):
            before = f.array(name).everywhere(c)
            f.array(name).store(c, before + (found.floats() - before) * momentum, 1)
        _keep(f, channels, c, mean, variance, eps)


def of_running(f: Function, channels: int, eps: float) -> None:
    """The norm by the running statistics."""
    with f.shared(channels) as c:
        mean, variance = (f.array(name).everywhere(c).doubles() for name in ("mean", "variance"))
        _keep(f, channels, c, mean, variance, eps)


def backward(f: Function, image: Image, channels: int, paths: int, path: int) -> None:
    """What the gradient at the BatchNorm's input needs, and the gradients `of scale`, `of shift`.

    `sums` (B, 2, C, L) are an image's of q and of q·(z − mean).

    Args:
        paths, path: with paths, `sums` is (B, 4, C, L): two more go to the join's weight gradient
            `of join` (2, paths · C), the part of a path.
    """
    values = (f.rows * image.size).doubles()
    number = 4 if paths else 2
    with f.shared(channels) as c:
        totals = [_zero(f) for _ in range(number)]
        with f.loop(0, f.rows) as b:
            for n, total in enumerate(totals):
                total.add(_sums(f, number, channels, b, n, c))
        of_one, of_away, *of_join = (total.value.total() for total in totals)
        norm = Norm(f.array("norm"), c, channels)
        scale, mean, inverse = (norm[row].doubles() for row in (SCALE, MEAN, INVERSE))
        of_scale = of_away * inverse
        slope = scale * of_scale * inverse / values
        norm.store(OF_Z, slope * -1.0)
        norm.store(CONSTANT, slope * mean - scale * of_one / values)
        f.array("of scale").store(c, of_scale.floats(), 1)
        f.array("of shift").store(c, of_one.floats(), 1)
        for o, of_weight in enumerate(of_join):
            place = c + (o * paths + path) * channels
            f.array("of join").store(place, of_weight.floats(), 1)


def _keep(f: Function, channels: int, c: Index, mean: Vector, variance: Vector, eps: float) -> None:
    deviation = (variance + eps).root()
    scale = f.array("scale").everywhere(c).doubles() / deviation
    norm = Norm(f.array("norm"), c, channels)
    norm.store(SCALE, scale)
    norm.store(SHIFT, f.array("shift").everywhere(c).doubles() - mean * scale)
    norm.store(MEAN, mean)
    norm.store(INVERSE, f.constants([1.0] * f.lanes).doubles() / deviation)


def _zero(f: Function) -> Sum:
    return Sum(f, f.constants([0.0] * f.lanes).doubles())


def _sums(f: Function, number: int, channels: int, b: Index, n: int, c: Index) -> Vector:
    """Lanes of the n-th of `number` sums of an image's channel."""
    return f.array("sums").load(((b * number + n) * channels + c) * f.lanes).doubles()
