"""The language in which `channels convert --axes` says what an array's axes are.

One word per axis: `sample rx tx subcarrier`. An axis that holds several, flattened in C order, is
put in brackets, with the sizes of all but one: `sample (part angle=32 delay=32)`. Plurals are the
same words: `samples tx subcarriers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = ("user", "sample", "time", "bts", "rx")
"""Axes that become rows, in this order: users (drops, places), samples of a user (without `user`,
each is a user's), time samples, base stations, receive antennas."""
WORDS = {
    **dict.fromkeys(ROWS, ""),
    "tx": "port",
    "angle": "port",
    "subcarrier": "frequency",
    "delay": "frequency",
    "part": "part",
}
"""Every word, and which axis of an image it leads to."""
_WORD = re.compile(r"([a-z]+)(?:=([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Axes:
    """What each axis of an array holds: words with sizes; 0 where the array decides."""

    text: str
    groups: tuple[tuple[tuple[str, int], ...], ...]

    @property
    def words(self) -> list[str]:
        """All words, in order."""
        return [word for group in self.groups for word, _ in group]

    def has(self, word: str) -> bool:
        """Whether a word occurs."""
        return word in self.words

    @property
    def identity(self) -> str:
        """Whose places in the array are users: `user`, or else `sample`."""
        return "user" if self.has("user") else "sample"

    def streamed(
        self, shape: tuple[int, ...], whole: Collection[str] = (), in_order: bool = False
    ) -> int | None:
        """The axis along which an array is read piece by piece, the longest that is rows alone.

        Args:
            whole: words whose axes every piece has to hold completely.
            in_order: only axis 0 can be cut.

        Returns:
            None where no axis can be cut: the array is one piece.
        """
        groups = self.groups[:1] if in_order else self.groups
        words = [group[0][0] if len(group) == 1 else "" for group in groups]
        rows = [n for n, word in enumerate(words) if word in ROWS and word not in whole]
        return max(rows, key=lambda axis: shape[axis], default=None)

    def users(
        self, shape: tuple[int, ...], axis: int | None, start: int, stop: int
    ) -> NDArray[np.int64]:
        """Users of the rows of a piece: broadcastable to (user, sample, time, bts, rx).

        Args:
            axis, start, stop: the piece of the array, see `streamed`.
        """
        mine = [
            (number, size)
            for number, group in enumerate(self.groups)
            for (word, size) in _sized(group, shape[number])
            if word == self.identity
        ]
        grid = np.arange(math.prod(size for _, size in mine))
        cut = [number for number, _ in mine]
        if axis in cut:
            grid = grid.reshape([size for _, size in mine])
            grid = grid.take(range(start, stop), cut.index(axis))
        return grid.reshape((-1, 1, 1, 1, 1) if self.identity == "user" else (1, -1, 1, 1, 1))

    def sizes(self, shape: tuple[int, ...]) -> list[tuple[str, int]]:
        """Every word with its size in an array of this shape.

        Raises:
            ValueError: another number of axes, or sizes that don't multiply to the array's.
        """
        if len(shape) != len(self.groups):
            raise ValueError(
                f"--axes {self.text!r} names {len(self.groups)} axes, but the shape is {shape}: "
                f"{len(shape)} axes."
            )
        found = []
        for size, group in zip(shape, self.groups, strict=True):
            rest = size // math.prod(n for _, n in group if n)
            if math.prod(n or rest for _, n in group) != size:
                names = " ".join(f"{word}={n}" if n else word for word, n in group)
                raise ValueError(
                    f"--axes {self.text!r}: ({names}) doesn't multiply to {size} of {shape}."
                )
            found += _sized(group, size)
        part = dict(found).get("part")
        if part not in (None, 2):
            raise ValueError(
                f"--axes {self.text!r}: part (real, imaginary) has {part} entries in {shape}; "
                "expected 2."
            )
        return found

    def arrange(self, values: NDArray[Any]) -> NDArray[np.complex64]:
        """An array whose sizes fit, or a piece of it, as complex64 (user…, sample…, time, bts, rx,
        ports, frequencies).

        Axes that don't occur have size 1; repeated words are one axis, in C order.
        """
        groups = zip(values.shape, self.groups, strict=True)
        sizes = [sized for size, group in groups for sized in _sized(group, size)]
        words = [word for word, _ in sizes]
        flat = values.reshape([size for _, size in sizes])
        order: list[int] = []
        shape: list[int] = []
        for target in (*ROWS, "port", "frequency"):
            mine = [i for i, w in enumerate(words) if target in (w, WORDS[w])]
            order += mine
            shape.append(math.prod(sizes[i][1] for i in mine))
        if "part" in words:
            order.append(words.index("part"))
            parts = np.moveaxis(flat.transpose(order), -1, 0)
            found = np.empty(parts.shape[1:], np.complex64)
            found.real, found.imag = parts
        else:
            found = flat.transpose(order).astype(np.complex64)
        return found.reshape(shape)


def parse(text: str) -> Axes:
    """Axes from their description.

    Raises:
        ValueError: an unknown word, brackets that don't match, a word twice that may not be,
            or no ports or frequencies.
    """
    groups = []
    rest = text.strip()
    while rest:
        found = re.match(r"\(([^()]*)\)\s*|([^\s()]+)\s*", rest)
        if found is None:
            raise ValueError(f"--axes is {text!r}: a bracket is missing its other half.")
        inside = found[1] if found[2] is None else found[2]
        groups.append(tuple(_word(text, word) for word in inside.split()))
        if not groups[-1] or sum(not size for _, size in groups[-1]) > 1:
            raise ValueError(
                f"--axes is {text!r}: ({inside}) needs the sizes of all but one, for example "
                "(part angle=32 delay=32)."
            )
        rest = rest[found.end() :]
    axes = Axes(text, tuple(groups))
    words = axes.words
    for word in dict.fromkeys(words):
        if words.count(word) > 1 and word not in ROWS:
            raise ValueError(f"--axes is {text!r}: {word} occurs {words.count(word)} times.")
    if not {"user", "sample"} & set(words):
        raise ValueError(
            f"--axes is {text!r}; expected an axis `user` or `sample`, for example "
            "'sample rx tx subcarrier'. Of one user's measurements over time, call time sample."
        )
    for one, other in (("tx", "angle"), ("subcarrier", "delay")):
        if (one in words) == (other in words):
            raise ValueError(
                f"--axes is {text!r}; expected either {one} or {other}, for example "
                "'sample rx tx subcarrier'."
            )
    return axes


def _sized(group: tuple[tuple[str, int], ...], size: int) -> list[tuple[str, int]]:
    """A group's words, the one without a size with what is left; a word alone with all there is,
    which may be a piece of its axis.
    """
    if len(group) == 1:
        return [(group[0][0], size)]
    rest = size // math.prod(given for _, given in group if given)
    return [(word, given or rest) for word, given in group]


def _word(text: str, word: str) -> tuple[str, int]:
    found = _WORD.fullmatch(word)
    name = found[1] if found else ""
    name = name if name in WORDS else name.removesuffix("s")
    if found is None or name not in WORDS:
        hint = " (antennas of the BTS: tx, of a UE: rx)" if name == "antenna" else ""
        raise ValueError(
            f"--axes is {text!r}: {word!r} is no axis{hint}; the words are {', '.join(WORDS)}."
        )
    return name, int(found[2] or 0)
