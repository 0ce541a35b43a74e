"""What the axes of an array are, where its shape and values say so.

Ports and subcarriers can't be told apart by their numbers. They can by their values: over
frequency, a channel is a sum of few echoes, all within a fraction of the symbol, so that the
inverse DFT leaves most energy in the first delays; over an array, directions are as often on the
left as on the right, so that no DFT is one-sided.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.axes import Axes, parse
from csipipe.channels.layout import ANGLES, DELAYS, HT
from csipipe.channels.rawarray import RawArray

_FITS = 0.8
"""Least share of the energy in the first quarter of the delays, in a reading that fits."""
_SAMPLES = 64
"""Samples that are looked at."""
_RECEIVE, _TIMES, _PORTS = range(1, 9), range(9, 65), 4
"""Receive antennas and time samples of a sample, and least ports, within reason."""
_FLAT = f"sample (part angle={ANGLES} delay={DELAYS})"
"""CsiNet's rows."""
_EXAMPLES = {
    2: "sample (tx=32 subcarrier)",
    3: "sample tx subcarrier",
    4: "sample rx tx subcarrier",
    5: "user time rx tx subcarrier",
    6: "user time bts rx tx subcarrier",
    7: "user user rx bts tx time subcarrier",
}
"""Axes of complex arrays by their number."""


def guess(array: RawArray) -> Axes:
    """The axes of an array.

    Raises:
        ValueError: none fits, or several do; it lists them as options to choose from.
    """
    found = _readings(array)
    if len(found) == 1:
        return found[0]
    if found:
        fits = " and ".join(f"--axes {axes.text!r}" for axes in found[:6])
        raise ValueError(
            f"{array}: {len(found)} readings of its axes fit: {fits}. Give the right one."
        )
    if lacks_parts(array):
        raise ValueError(
            f"{array}: its values are real, and no axis of 2 holds real and imaginary parts. Where "
            "they are two arrays, join them, in Python: numpy.save('channels.npy', re + 1j * im). "
            "Where one axis holds both, say so with --axes: 'sample (part=2 tx) subcarrier'."
        )
    raise ValueError(
        f"{array}: no reading of its axes fits. Say what they are, for example --axes "
        f"{example(array)!r} (words: user sample time bts rx tx angle subcarrier delay part)."
    )


def _readings(array: RawArray) -> list[Axes]:
    """Every reading that the shape allows and the values speak for."""
    shape, is_complex = array.shape, array.dtype.startswith("complex")
    if len(shape) == 2:
        return [parse(_FLAT)] if shape[1] == HT.width and not is_complex else []
    texts = set()
    parts = [None] if is_complex else [axis for axis, size in enumerate(shape) if size == 2]
    for part in parts:
        rest = [axis for axis in range(len(shape)) if axis != part]
        for words in _orders(len(rest)):
            named: dict[int, str] = dict(zip(rest, words, strict=True))
            sizes = {word: shape[axis] for axis, word in named.items()}
            if sizes["sample"] < max(sizes["tx"], 2) or sizes["subcarrier"] < 2:
                continue
            if sizes.get("rx", 1) not in _RECEIVE or sizes.get("time", 9) not in _TIMES:
                continue
            if sizes["tx"] < max(_PORTS, sizes.get("rx", 1)):
                continue
            if part is not None:
                named[part] = "part"
            texts.add(" ".join(named[axis] for axis in range(len(shape))))
    return [axes for axes in map(parse, sorted(texts)) if _share(_some(array, axes)) >= _FITS]


def _orders(count: int) -> list[tuple[str, ...]]:
    """Words in every order that is in use: samples first or last."""
    inner: list[tuple[str, ...]] = []
    if count == 3:
        inner = [("tx", "subcarrier"), ("subcarrier", "tx")]
    elif count == 4:
        inner = [
            one for other in ("rx", "time") for one in permutations((other, "tx", "subcarrier"))
        ]
    return [(*one, "sample") for one in inner] + [("sample", *one) for one in inner]


def _some(array: RawArray, axes: Axes) -> NDArray[np.complex64]:
    """(n, ports, frequencies) of the first samples with energy."""
    where = [group[0][0] for group in axes.groups].index("sample")
    stop = min(array.shape[where], 4 * _SAMPLES)
    values = axes.arrange(array.cut(0 if array.in_order else where, 0, stop))
    rows = values.reshape(-1, *values.shape[-2:])
    rows = rows[np.isfinite(rows).all(axis=(1, 2)) & (rows != 0).any(axis=(1, 2))]
    some: NDArray[np.complex64] = rows[:: max(1, len(rows) // _SAMPLES)]
    return some


def _share(rows: NDArray[np.complex64]) -> float:
    """Of the energy, in the first quarter of the delays."""
    if not len(rows):
        return 0.0
    power = np.square(np.abs(np.fft.ifft(rows, axis=-1))).sum(axis=1)
    power /= power.sum(axis=1, keepdims=True)
    quarter = max(1, power.shape[1] // 4)
    return float(power[:, :quarter].sum(axis=1).mean())


def lacks_parts(array: RawArray) -> bool:
    """Whether an array of reals over three axes or more has none for real and imaginary part."""
    axes = array.shape
    return len(axes) > 2 and 2 not in axes and not array.dtype.startswith("complex")


def example(array: RawArray) -> str:
    """Axes that an array of so many could have; of reals, one of them holds the parts."""
    axes = len(array.shape)
    if array.dtype.startswith("complex"):
        return _EXAMPLES.get(axes, _EXAMPLES[3])
    if axes == 2:
        return "sample (tx=32 subcarrier part=2)"
    return f"{_EXAMPLES.get(axes - 1, _EXAMPLES[3])} part"
