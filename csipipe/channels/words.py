"""Options of `csipipe channels` that hold several words or numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def labels(
    option: str, text: str | None, paths: list[Path], known: Sequence[str] = ()
) -> list[str] | None:
    """A word per file (ValueError)."""
    if text is None:
        return None
    words = text.split()
    if len(words) != len(paths):
        raise ValueError(
            f"--{option} {text!r} has {len(words)} words; expected {len(paths)}, one for each file."
        )
    for word in words:
        if known and word not in known:
            raise ValueError(f"--{option} {text!r}: {word!r} is none of {', '.join(known)}.")
    return words


def sizes(array: str | None) -> dict[str, int]:
    """Of `8x4x2`: columns, rows, polarisations (ValueError)."""
    if array is None:
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?:x([12]))?", array)
    if found is None:
        raise ValueError(
            f"--array is {array!r}; expected columns x rows x polarisations, such as 8x4x2."
        )
    return {"columns": int(found[1]), "rows": int(found[2]), "polarisations": int(found[3] or 1)}


def shares(split: str) -> tuple[float, ...]:
    """Of `0.8/0.1/0.1` (ValueError)."""
    try:
        shares = tuple(float(share) for share in split.split("/"))
        if len(shares) in (2, 3) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6:
            return shares
    except ValueError:
        pass
    raise ValueError(
        f"--split is {split!r}; expected two or three shares with the sum 1, such as 0.8/0.1/0.1."
    )
