"""The test set of an evaluation: images, and the channels over frequency that ρ and SGCS need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csipipe import channels
from csipipe.measure import metrics
from csipipe.settings.config import Settings
from csipipe.settings.tables import KINDS


@dataclass(frozen=True)
class Rows:
    """Test rows, common to all UEs.

    Attributes:
        h_BAD: (B, 2, A, D) in [0, 1].
        hf_BAK: (B, A, K) complex, untruncated, of any scale; None: there is none.
        missing: why there is none; otherwise empty.
        name: a description.
        padded: points of the DFT over delay, of which hf has the first K.
        similarity: the images are eigenvectors: their columns are compared themselves.
    """

    h_BAD: Tensor
    hf_BAK: Tensor | None
    missing: str
    name: str
    padded: int = metrics.PADDED
    similarity: bool = False

    @property
    def subbands(self) -> int | None:
        """Subbands that SGCS compares; None: the usual number."""
        return self.h_BAD.shape[3] if self.similarity else None

    def response(self, h_BAD: Tensor) -> Tensor:
        """(B, A, K) complex: images of the same size as these, over the frequencies of hf."""
        if self.similarity:
            return metrics.to_complex(h_BAD)
        assert self.hf_BAK is not None
        return metrics.to_frequency(h_BAD, self.hf_BAK.shape[2], self.padded)


def identity(settings: Settings) -> dict[str, Any]:
    """What identifies the rows, in JSON's types: equal if and only if the rows are.

    Raises:
        ValueError, OSError: data that can't be used.
    """
    source, spans = channels.tested(settings)
    return {
        "angles": source.size[0],
        "delays": source.size[1],
        "rows": {span.environment: span.size for span in spans},
        "streams": {s.environment: source.identity(s.environment, "test") for s in spans},
    }


def difference(one: Settings, other: Settings) -> str:
    """The first thing in which two test sets differ, in words; empty: they are the same rows.

    Raises as `identity`.
    """
    mine, theirs = identity(one), identity(other)
    for key in mine:
        if mine[key] != theirs[key]:
            return f"{_in_words(key, mine, one)} and {_in_words(key, theirs, other)}"
    return ""


def _in_words(key: str, identity: dict[str, Any], settings: Settings) -> str:
    """What an entry of `identity` says."""
    if key == "rows":
        counts = [f"{count:,} {environment}" for environment, count in identity["rows"].items()]
        return f"{' and '.join(counts)} rows"
    if key == "streams":
        data = settings.data
        place = f"data.seed {data.seed}" if data.path is None else f"data.path {data.path}"
        return f"rows of data.source {data.source}, {place}, data.kind {data.kind}"
    return f"{identity[key]} {key}"


def load(settings: Settings) -> Rows:
    """The test rows that the settings name.

    Raises:
        ValueError, OSError: data that can't be used, or an `HF_all` of another number of rows.
    """
    source, spans = channels.tested(settings)
    h_BAD = torch.from_numpy(np.ascontiguousarray(channels.rows_of(source, spans)))
    similarity = KINDS[source.kind].similarity
    hf, missing = (metrics.to_complex(h_BAD), "") if similarity else _responses(source, spans)
    place = settings.data.path or "built in"
    angles, delays = source.size
    name = f"{settings.data.environment} ({place}), {len(h_BAD):,} rows of {angles} × {delays}"
    return Rows(h_BAD, hf, missing, name, source.padded, similarity)


def _responses(
    source: channels.Source, spans: tuple[channels.Span, ...]
) -> tuple[Tensor | None, str]:
    """The untruncated channels of the rows, or why there are none."""
    parts = []
    for span in spans:
        found = source.frequency_rows(*span)
        if isinstance(found, str):
            return None, found
        parts.append(found)
    return torch.from_numpy(np.concatenate(parts)), ""
