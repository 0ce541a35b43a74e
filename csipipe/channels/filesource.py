"""Rows of a folder in csipipe's own format (see `format`): what `channels convert` wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels import accepted, cache
from csipipe.channels.doctor import Finding, judge_converted
from csipipe.channels.format import NAME, Description, Set, Stored, open_rows
from csipipe.channels.layout import ROUNDING
from csipipe.channels.source import Images, Part, Responses, Site, check_range
from csipipe.channels.statistics import spaced
from csipipe.channels.transform import ZERO, shrink
from csipipe.settings.config import DataSettings, Verdict

PARTS: dict[Part, tuple[str, ...]] = {"train": ("train", "val"), "test": ("test",)}
"""The sets of a folder whose rows make up a part."""
_PIECE = 1024
"""Rows copied at once from a mapped file."""
_LOOKED_AT = 2000
"""Rows of a file whose axes are judged."""


class FilesSource:
    """Rows of a converted folder; training and validation rows together are the training rows.

    Training rows come in an order drawn from the seed, so that a range of them is a random
    sample; where users have several rows, it is the users that are shuffled, and a user's rows
    stay together. Test rows come in file order, mapped and not copied. A file whose content isn't
    the one that was written is refused.

    Args:
        folder: where `channels.json` is.
        seed: of the order of the training rows.
        angles, delays: 1 … the data's own; None: those. Fewer angles are fewer antennas (see
            `transform.shrink`), for linear arrays only.
        accept: the worst verdict of the doctor that isn't refused.

    Raises:
        FileNotFoundError: no such folder, or no description in it.
        ValueError: a damaged description; more angles or delays than the rows have.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        angles: int | None = None,
        delays: int | None = None,
        accept: Verdict = "suspicious",
    ) -> None:
        self._folder = folder
        self._accept = accept
        self._judged: set[str] = set()
        self._seed = seed
        self._drawn: dict[Site, tuple[NDArray[np.int64], NDArray[np.int64] | None]] = {}
        self._said = said = Description.read(folder)
        for name, asked, held in (
            ("angles", angles, said.angles),
            ("delays", delays, said.delays),
        ):
            fixed = said.kind != "channel" or (name == "angles" and said.planar)
            if asked is not None and not (asked == held or (not fixed and 1 <= asked < held)):
                remedy = f"Set it to {held}" if fixed else f"Set it to 1 … {held}"
                raise ValueError(
                    f"model.{name} is {asked}; the rows of {folder} have {held}. {remedy}."
                )
        self.size = angles or said.angles, delays or said.delays
        self.padded = said.subcarriers or said.delays
        self.environments = said.environments
        self.kind = said.kind
        self.array = said.columns, said.rows, said.polarisations
        if self.size[0] != said.angles:  # a line of fewer antennas
            self.array = self.size[0], 1, 1

    def available(self, environment: Site, part: Part) -> int:
        """Rows of an environment and part.

        Raises:
            ValueError: there are none.
        """
        return sum(one.rows for one in self._sets(environment, part))

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        """Rows start … stop-1: (stop-start, 2, A, D) float32 in [0, 1].

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file isn't the one that was written, or the range goes beyond what is
                available.
        """
        check_range(start, stop, self.available(environment, part))
        sets = self._sets(environment, part)
        if part == "test":
            images = self._open(sets[0])[start:stop]
        else:
            images = self._gather(sets, self._order(environment, part)[start:stop])
        if self.size == (self._said.angles, self._said.delays):
            return images
        return shrink(images, *self.size)

    def user_borders(self, environment: Site, part: Part) -> NDArray[np.int64] | None:
        """As `Source.user_borders`; None, too, where the folder doesn't say whose its rows are."""
        return None if part == "test" else self._draw(environment)[1]

    def identity(self, environment: Site, part: Part) -> dict[str, Any]:
        """The files by name, rows and SHA-256, and how the order of the rows is drawn."""
        sets = self._sets(environment, part)
        for one in sets:
            self._check(one.images)
        order = self._order(environment, part).astype("<i8")
        drawn = f"numpy.random.default_rng(numpy.random.SeedSequence(({self._seed}, "
        drawn += f"{self.environments.index(environment)}))).permutation("
        borders = self.user_borders(environment, part)
        drawn += f"{len(order)})" if borders is None else f"{len(borders) - 1}) of the users"
        return {
            "files": [
                {"name": one.images.name, "rows": one.rows, "sha256": one.images.sha256}
                for one in sets
            ],
            "order": "as in the files" if part == "test" else drawn,
            "order_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
        }

    def frequency_rows(
        self, environment: Site, part: Part, start: int, stop: int
    ) -> Responses | str:
        """The untruncated channels of test rows: (n, A, K) complex64, in file order."""
        check_range(start, stop, self.available(environment, part))
        if self.kind != "channel":
            return "the rows are eigenvectors"
        if self.size[0] != self._said.angles:
            return f"they have {self._said.angles} angles"
        one = self._sets(environment, part)[0]
        if part != "test" or one.frequency is None:
            return f"{self._folder}/{NAME} names none"
        self._check(one.frequency)
        shape = (one.rows, self.size[0], self.padded)
        return open_rows(self._folder, one.frequency, "<c8", shape)[start:stop]

    def _sets(self, environment: Site, part: Part) -> list[Set]:
        found = self._said.of(environment, *PARTS[part])
        if not found:
            have = ", ".join(f"{one.environment} {one.part}" for one in self._said.sets)
            known = environment in self.environments
            raise ValueError(
                f"{self._folder} has no {part} rows of the environment {environment}; it has "
                f"{have}. "
                + (
                    "Convert again with --split or --sets."
                    if known
                    else f"Set data.environment to {' or '.join(self.environments[:8])}."
                )
            )
        return found

    def _open(self, one: Set) -> Images:
        self._check(one.images)
        shape = (one.rows, 2, self._said.angles, self._said.delays)
        rows = open_rows(self._folder, one.images, "<f4", shape)
        if one.images.name not in self._judged:
            path = (self._folder / one.images.name).resolve()
            found = cache.findings(path, one.images.sha256, lambda: self._judge(path, rows))
            accepted.check(path, found, self._accept)
            self._judged.add(one.images.name)
        return rows

    def _judge(self, path: Path, rows: Images) -> list[Finding]:
        """What the doctor finds in a file; refuses NaN and rows without energy (ValueError)."""
        low, high = np.inf, -np.inf
        for start in range(0, len(rows), _PIECE):
            piece = rows[start : start + _PIECE]
            least, most = piece.min(initial=low), piece.max(initial=high)
            if not np.isfinite([least, most]).all():
                raise ValueError(
                    f"{path} holds NaN or infinite values in rows {start} … "
                    f"{start + len(piece) - 1}; expected finite ones. Convert the channels again."
                )
            low, high = float(least), float(most)
            empty = np.flatnonzero((piece == np.float32(ZERO)).all(axis=(1, 2, 3)))
            if empty.size:
                raise ValueError(
                    f"{path}: row {start + empty[0]} (counted from 0) is {ZERO} throughout: a "
                    "channel without energy, for which no NMSE exists. Convert the channels again."
                )
        found = []
        if low < -ROUNDING or high > 1 + ROUNDING:
            what = f"values lie in [{low:.4g}, {high:.4g}]; expected [0, 1] with 0.5 for zero"
            found.append(Finding("unusable", what, "convert the channels again"))
        if self.kind == "channel":
            found += judge_converted(spaced(rows, _LOOKED_AT), linear=not self._said.planar)
        return found

    def _check(self, stored: Stored) -> None:
        """Refuse a file that isn't the one that was written (ValueError)."""
        path = self._folder / stored.name
        if path.is_file() and cache.digest(path) != stored.sha256:
            raise ValueError(
                f"{path} isn't the file that {NAME} describes (its SHA-256 is another): it was "
                "replaced or changed. Restore it, or convert the channels again."
            )

    def _gather(self, sets: list[Set], chosen: NDArray[np.int64]) -> Images:
        images = np.empty((len(chosen), 2, self._said.angles, self._said.delays), np.float32)
        first = 0
        for one in sets:
            mine = np.flatnonzero((first <= chosen) & (chosen < first + one.rows))
            mine = mine[np.argsort(chosen[mine])]  # disks read forward
            for begin in range(0, len(mine), _PIECE):
                piece = mine[begin : begin + _PIECE]
                # mapped only briefly, so that touched pages don't add up in this process
                images[piece] = self._open(one)[chosen[piece] - first]
            first += one.rows
        return images

    def _order(self, environment: Site, part: Part) -> NDArray[np.int64]:
        if part == "test":
            return np.arange(self.available(environment, part))
        return self._draw(environment)[0]

    def _draw(self, environment: Site) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The order of the training rows, and their `user_borders`."""
        if environment not in self._drawn:
            seeds = np.random.SeedSequence((self._seed, self.environments.index(environment)))
            stream = np.random.default_rng(seeds)
            users = self._users(environment)
            count = len(users)
            names, user_of = np.unique(users, return_inverse=True)
            if len(names) == count:
                self._drawn[environment] = stream.permutation(count), None
            else:
                turn = stream.permutation(len(names))[user_of]
                borders = np.concatenate([[0], np.bincount(turn).cumsum()])
                self._drawn[environment] = np.argsort(turn, kind="stable"), borders
        return self._drawn[environment]

    def _users(self, environment: Site) -> NDArray[np.int64]:
        """The user of each training row, in the order of the files; unknown ones are different."""
        sets = self._sets(environment, "train")
        if any(one.user is None for one in sets):
            return np.arange(sum(one.rows for one in sets))
        found = []
        for one in sets:
            assert one.user is not None
            self._check(one.user)
            found.append(open_rows(self._folder, one.user, "<i8", (one.rows,)))
        return np.concatenate(found)


def open_source(data: DataSettings, angles: int | None, delays: int | None) -> FilesSource:
    """As `csipipe.channels.open_source`."""
    assert data.path is not None  # checked by DataSettings
    return FilesSource(Path(data.path), data.seed, angles, delays, data.accept)
