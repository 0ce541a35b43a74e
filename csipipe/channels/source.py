"""What every source of channels offers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from csipipe.settings import config

Site = str
"""A propagation environment, by name; the mixture `noniid` assigns rows from several."""
Kind = config.Kind
"""What an image holds: angles x delays, or ports x subbands (see `format`)."""
Part = Literal["train", "test"]
Images = NDArray[np.float32]
"""(B, 2, A, D): real and imaginary part, angles, delays; in [0, 1] with 0.5 for zero."""

Responses = NDArray[np.complex64]
"""(B, A, K): angles, frequencies."""
SITES: tuple[Site, ...] = ("indoor", "outdoor")
"""The environments of CsiNet's files and of generated channels."""


class Span(NamedTuple):
    """Rows start … stop-1 of one environment and part."""

    environment: Site
    part: Part
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Rows in the span."""
        return self.stop - self.start


class Source(Protocol):
    """An ordered stream of channel images per environment and part.

    Rows are asked for by range, so that a UE makes or reads only its own.
    """

    @property
    def size(self) -> tuple[int, int]:
        """Angles A and delays D of the rows; of eigenvectors ports and subbands."""
        ...

    @property
    def padded(self) -> int:
        """Delay bins to which an image is padded before the DFT that leads to `frequency_rows`,
        which are the first of its points."""
        ...

    @property
    def environments(self) -> tuple[Site, ...]:
        """Names of the environments, in the order in which a mixture counts them."""
        ...

    @property
    def kind(self) -> Kind:
        """What an image holds."""
        ...

    @property
    def array(self) -> tuple[int, int, int]:
        """Columns N1, rows N2 and polarisations of the ports, A = N1·N2·polarisations."""
        ...

    def available(self, environment: Site, part: Part) -> int | None:
        """How many rows exist; None: as many as are asked for."""
        ...

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        """Rows start … stop-1: (stop-start, 2, A, D), C-contiguous.

        Raises:
            ValueError: the range is reversed or exceeds what is available.
        """
        ...

    def user_borders(self, environment: Site, part: Part) -> NDArray[np.int64] | None:
        """Where each user's rows begin, and where the last one's end: ascending numbers of rows.

        Returns:
            None: each row is a user's only one.
        """
        ...

    def identity(self, environment: Site, part: Part) -> dict[str, Any]:
        """Where a stream comes from, in JSON's types: equal if and only if its rows are."""
        ...

    def frequency_rows(
        self, environment: Site, part: Part, start: int, stop: int
    ) -> Responses | str:
        """The untruncated channels of the same samples as `rows`, or why there are none.

        Returns:
            (stop-start, A, K) complex64, the images' angles and the first K of `padded`
            frequencies (see `images.frequencies_of_rays`: K = 125 of 257), of any scale.

        Raises:
            ValueError: they are of other samples, or damaged.
        """
        ...


def check_range(start: int, stop: int, available: int | None) -> None:
    """Refuse a range that `rows` can't serve (ValueError); None means no upper end."""
    if not 0 <= start <= stop or (available is not None and stop > available):
        end = "any" if available is None else available
        raise ValueError(
            f"rows {start} to {stop} were requested; expected 0 <= start <= stop <= {end}."
        )
