"""Images that kernels read: as they are stored, or as they follow on load from what is stored.

Shapes: B images, C channels, A angles, D delays. `z` is what comes out of a convolution, `q` the
gradient at the output of its BatchNorm, `dz` that at its input; a `norm` is (6, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from csipipe.models.kernels.llvm.image import Ahead, Image, Load, Place
from csipipe.models.kernels.llvm.language import Array, Function, Index, Vector

SLOPE = 0.3
"""Negative slope of every LeakyReLU."""
SCALE, SHIFT, MEAN, INVERSE, OF_Z, CONSTANT = range(6)
"""Rows of a norm: y = z·scale + shift, and backward dz = q·scale + z·of_z + constant; inverse is
1/√(variance + eps)."""

Source = Literal["stored", "active", "normed", "joined"]
"""Where a convolution's input or gradient comes from: it is stored; it is the LeakyReLU of
BatchNorm of a stored z; it is BatchNorm's backward pass of a stored q; the same with the q of a
path's end, which follows from the gradient at the join's output."""


_READ = {"stored": ("x",), "active": ("z",), "normed": ("q", "z"), "joined": ("z",)}


def leaky(x: Vector) -> Vector:
    return x.largest(x * SLOPE)


def leaky_backward(y: Vector, gradient: Vector) -> Vector:
    return y.where_positive(gradient, gradient * SLOPE)


@dataclass(frozen=True)
class Norm:
    """A norm's rows for one channel."""

    array: Array
    channel: Place
    channels: int

    def __getitem__(self, row: int) -> Vector:
        return self.array.everywhere(self.channel + row * self.channels)

    def store(self, row: int, doubles: Vector) -> None:
        self.array.store(self.channel + row * self.channels, doubles.floats(), 1)


@dataclass(frozen=True)
class Images:
    """Images of one kernel's arrays.

    Args:
        prefix: of the arrays' names.
    """

    f: Function
    image: Image
    channels: int
    prefix: str
    b: Index

    def load(self, name: str, c: Place) -> Load:
        return self.array(name, c).load

    def array(self, name: str, c: Place) -> Array:
        """Channel `c` of this image."""
        place = (self.b * self.channels + c) * self.image.size
        return self.f.array(self.prefix + name).at(place)

    def norm(self, c: Place) -> Norm:
        return Norm(self.f.array(self.prefix + "norm"), c, self.channels)

    def values(self, source: Source, c: Place) -> Load:
        """Channel `c` as a convolution takes it."""
        of_channel = getattr(self, source)
        found: Load = of_channel(c)
        return found

    def ahead(self, *names: str, written: bool = False) -> list[Ahead]:
        """Arrays of the image after this."""
        then = replace(self, b=self.b + 1)
        return [Ahead(then.array(name, 0), self.channels, written) for name in names]

    def source_ahead(self, source: Source) -> list[Ahead]:
        """What `values` reads, for the image after this."""
        return self.ahead(*_READ[source])

    def stored(self, c: Place) -> Load:
        return self.load("x", c)

    def active(self, c: Place) -> Load:
        z, norm = self.load("z", c), self.norm(c)
        scale, shift = norm[SCALE], norm[SHIFT]
        return lambda i, lanes: leaky(z(i, lanes) * scale + shift)

    def normed(self, c: Place) -> Load:
        q, z, norm = self.load("q", c), self.load("z", c), self.norm(c)
        scale, of_z, constant = norm[SCALE], norm[OF_Z], norm[CONSTANT]
        return lambda i, lanes: q(i, lanes) * scale + (z(i, lanes) * of_z + constant)

    def joined(self, c: Place) -> Load:
        end, norm = self.path_end(c), self.norm(c)
        scale, of_z, constant = norm[SCALE], norm[OF_Z], norm[CONSTANT]

        def load(i: Place, lanes: int) -> Vector:
            z, _, q = end(i, lanes)
            return q * scale + (z * of_z + constant)

        return load

    def factors(self, c: Place) -> list[Vector]:
        """The join's weights for channel `c` of a path."""
        w = self.f.array(self.prefix + "w")
        return [w.everywhere(c + o * self.channels) for o in range(2)]

    def path_end(self, c: Place) -> Callable[[Place, int], tuple[Vector, Vector, Vector]]:
        """z, y and q at the end of a path, from the gradient dz at the join's output."""
        z, norm = self.load("z", c), self.norm(c)
        scale, shift = norm[SCALE], norm[SHIFT]
        dz = [self.f.array("dz").at((self.b * 2 + o) * self.image.size) for o in range(2)]
        w = self.factors(c)

        def load(i: Place, lanes: int) -> tuple[Vector, Vector, Vector]:
            value = z(i, lanes)
            y = value * scale + shift
            gradient = dz[0].load(i, lanes) * w[0] + dz[1].load(i, lanes) * w[1]
            return value, y, leaky_backward(y, gradient)

        return load
