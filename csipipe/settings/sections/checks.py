"""What several sections check."""

from __future__ import annotations


def at_least(name: str, value: float | None, least: float) -> None:
    """Refuse (ValueError) a value that is too small; None is one that was left out."""
    if value is not None and not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")
