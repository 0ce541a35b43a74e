"""Which rows each UE got, written into a run's directory so that the split can be repeated.

A row is identified by its place in the stream of an environment and part. The manifest also records
where the stream comes from (files by hash, or the generator's version, and the order).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csipipe.channels.load import hold_out
from csipipe.channels.source import Source, Span
from csipipe.channels.split import Deal
from csipipe.files import DAMAGED, write_file

NAME = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The rows of every UE, the common test set, and the streams they are rows of."""

    train: tuple[tuple[Span, ...], ...]
    """Per UE what it trains on."""
    holdout: tuple[tuple[Span, ...], ...]
    """Per UE what it holds out for choosing the best weights."""
    test: tuple[Span, ...]
    streams: dict[str, dict[str, Any]]
    """Where each stream, such as `indoor train`, comes from (`Source.identity`)."""

    def check(self, source: Source) -> None:
        """Refuse a source whose rows aren't those that were assigned.

        Raises:
            ValueError: another file, generator, seed or order.
        """
        for name, span in _streams((*self.train, *self.holdout, self.test)).items():
            found = source.identity(span.environment, span.part)
            if found != self.streams.get(name):
                raise ValueError(
                    f"the manifest's {name} rows come from {self.streams.get(name)}, those of "
                    f"the data given here from {found}; give the same files, seed and version "
                    "of csipipe."
                )

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a run's directory, whole or not at all (OSError)."""
        content = {
            "version": _VERSION,
            "numpy": np.__version__,  # its generators draw order and channels
            "streams": self.streams,
            "ues": [
                {
                    "ue": ue,
                    "rows": _count(train),
                    "rows_held_out": _count(held),
                    "train": _dump(train),
                    "holdout": _dump(held),
                }
                for ue, (train, held) in enumerate(zip(self.train, self.holdout, strict=True))
            ],
            "test": {"rows": _count(self.test), "spans": _dump(self.test)},
        }
        write_file(folder / NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a run.

        Raises:
            FileNotFoundError: the run has none.
            ValueError: it is damaged or of another version.
        """
        file = folder / NAME
        try:
            content = json.loads(file.read_text())
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}, expected {_VERSION}")
            return cls(
                train=tuple(_load(ue["train"]) for ue in content["ues"]),
                holdout=tuple(_load(ue["holdout"]) for ue in content["ues"]),
                test=_load(content["test"]["spans"]),
                streams=dict(content["streams"]),
            )
        except DAMAGED as error:
            raise ValueError(
                f"{file} is not a manifest that this version can read: {error!r}. Restore the one "
                "that the run wrote."
            ) from error


def manifest_of(deal: Deal, holdout: float, source: Source) -> Manifest:
    """The manifest of an assignment of rows; a source hashes files that it hasn't read yet.

    Args:
        deal: which rows each UE gets.
        holdout: share of a UE's training rows that it holds out, in [0, 1).
        source: where the rows come from.
    """
    cut = [hold_out(source, spans, holdout) for spans in deal.ues]
    return Manifest(
        train=tuple(train for train, _ in cut),
        holdout=tuple(held for _, held in cut),
        test=deal.test,
        streams={
            name: source.identity(span.environment, span.part)
            for name, span in _streams((*deal.ues, deal.test)).items()
        },
    )


def _streams(parts: tuple[tuple[Span, ...], ...]) -> dict[str, Span]:
    """One span of every stream in use, by the stream's name."""
    return {f"{span.environment} {span.part}": span for spans in parts for span in spans}


def _count(spans: tuple[Span, ...]) -> dict[str, int]:
    """Rows per environment."""
    found: dict[str, int] = {}
    for span in spans:
        found[span.environment] = found.get(span.environment, 0) + span.size
    return found


def _dump(spans: tuple[Span, ...]) -> list[dict[str, Any]]:
    return [span._asdict() for span in spans]


def _load(spans: list[dict[str, Any]]) -> tuple[Span, ...]:
    return tuple(Span(**span) for span in spans)
