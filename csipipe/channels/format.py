"""csipipe's own format of channels: a folder of .npy files and a JSON that says what they are.

The specification is in docs/data.md. Nothing in a folder is executed or unpickled.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from csipipe import files
from csipipe.channels.source import Kind

NAME = "channels.json"
_FORMAT, _VERSION = "csipipe channels", 1
_LARGEST = 1 << 16
"""Most angles, delays or subcarriers that a description may claim."""

SetPart = Literal["train", "val", "test"]
Scaling = Literal["sample", "set", "unit"]


@dataclass(frozen=True)
class Stored:
    """One .npy file of a folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Set:
    """Rows of one environment and part."""

    environment: str
    part: SetPart
    rows: int
    images: Stored
    """(rows, 2, A, D) float32 in [0, 1], 0.5 for zero."""
    scale: Stored | None = None
    """(rows,) float32: times (image - 0.5) it is the channel as it was given; None: unknown."""
    frequency: Stored | None = None
    """(rows, A, K) complex64, not truncated in delay; None: there is none."""
    user: Stored | None = None
    """(rows,) int64: whose the row is, by a number that all sets count in; None: unknown."""

    def stored(self) -> Iterator[Stored]:
        """Its files."""
        files = self.images, self.scale, self.frequency, self.user
        yield from (one for one in files if one is not None)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `channels.json` says.

    Raises:
        ValueError: values that contradict each other.
    """

    angles: int
    """A: angular bins, polarisation by polarisation; of eigenvectors: ports."""
    delays: int
    """D: delay bins kept; of eigenvectors: subbands."""
    sets: tuple[Set, ...]
    kind: Kind = "channel"
    columns: int = 0
    """N1 of a planar array of A = P N1 N2 ports; 0: a uniform linear array, N1 = A."""
    rows: int = 1
    """N2."""
    polarisations: int = 1
    """P."""
    subcarriers: int | None = None
    """K: points of the DFT over delay; None: unknown, or eigenvectors."""
    shift: int = 0
    """Delay d of an image is tap (d - shift) modulo K."""
    scaling: Scaling = "sample"
    """By the peak of each sample or of the whole set, to radius 0.5; unit: vectors v of norm 1,
    stored as 0.5 + v/2."""
    made: dict[str, Any] = field(default_factory=dict)
    """How it was made, for people: command, axes, sources by hash, what was dropped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.columns or self.angles)
        for name in ("angles", "delays", "columns", "rows", "polarisations"):
            _whole(name, getattr(self, name), 1)
        ports = self.columns * self.rows * self.polarisations
        if ports != self.angles:
            raise ValueError(
                f"columns x rows x polarisations is {ports}, angles is {self.angles}; expected "
                "the same."
            )
        if self.subcarriers is not None:
            _whole("subcarriers", self.subcarriers, self.delays)
        _one_of("kind", self.kind, get_args(Kind))
        _one_of("scaling", self.scaling, get_args(Scaling))
        if not self.sets:
            raise ValueError("it describes no set; expected one at least.")
        seen = set()
        for one in self.sets:
            _one_of("part", one.part, get_args(SetPart))
            _whole("rows of a set", one.rows, 1, 1 << 40)
            for stored in one.stored():
                _whole("bytes of a file", stored.bytes, 1, 1 << 60)
                if Path(stored.name).name != stored.name or not stored.name.endswith(".npy"):
                    raise ValueError(f"a file is called {stored.name!r}; expected a plain x.npy.")
            if (one.environment, one.part) in seen:
                raise ValueError(f"{one.environment} {one.part} is described twice.")
            seen.add((one.environment, one.part))
            if one.frequency is not None and self.subcarriers is None:
                raise ValueError("there are frequencies, but no number of subcarriers.")

    @property
    def environments(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(dict.fromkeys(one.environment for one in self.sets))

    @property
    def planar(self) -> bool:
        """Whether the ports are anything but one line of antennas."""
        return self.columns != self.angles

    def of(self, environment: str, *parts: str) -> list[Set]:
        """The sets of an environment, in the order of `parts`."""
        return [
            one
            for part in parts
            for one in self.sets
            if (one.environment, one.part) == (environment, part)
        ]

    def write(self, folder: Path) -> None:
        """Write `channels.json`, whole or not at all (OSError)."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        files.write_file(folder / NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """The description of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of another version, or contradicts itself.
        """
        file = folder / NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {NAME}: it isn't a folder that `channels convert` wrote, or the "
                "conversion didn't finish. Run: python -m csipipe channels check "
                f"{shlex.quote(str(folder))}"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if (content.pop("format"), content.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError(f"expected format {_FORMAT!r}, version {_VERSION}")
            sets = tuple(_set(one) for one in content.pop("sets"))
            return cls(**content, sets=sets)
        except files.DAMAGED as error:
            raise ValueError(
                f"{file} can't be used: {error}. Convert the channels again, or restore the file."
            ) from error


def open_rows(folder: Path, stored: Stored, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The values of a file, mapped into memory, copy-on-write.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: another size, type or shape than described.
    """
    path = folder / stored.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which {NAME} describes; restore it.")
    size = path.stat().st_size
    try:
        if size != stored.bytes:
            raise ValueError(f"it has {size:,} bytes")
        values = np.load(path, mmap_mode="c", allow_pickle=False)
        if values.shape != shape or values.dtype != np.dtype(dtype) or np.isfortran(values):
            raise ValueError(f"it holds {values.dtype} {values.shape}")
    except Exception as error:  # of a damaged header, anything that Python's parser has, too
        raise ValueError(
            f"{path}: {error}; {NAME} says {np.dtype(dtype)} {shape}, {stored.bytes:,} bytes. It "
            "was replaced or cut short: restore it, or convert the channels again."
        ) from error
    return np.asarray(values)


def _set(content: dict[str, Any]) -> Set:
    stored = {
        name: Stored(**content[name])
        for name in ("images", "scale", "frequency", "user")
        if content.get(name) is not None
    }
    return Set(
        str(content["environment"]),
        cast(SetPart, content["part"]),
        content["rows"],
        **stored,
    )


def _whole(name: str, value: object, least: int, most: int = _LARGEST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; expected {least} … {most}.")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
