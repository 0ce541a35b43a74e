"""What a report writes beside its picture: a CSV file, and a Markdown verdict claim by claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, and our result."""

    text: str
    paper: str
    """The paper's figure or words."""
    ours: str
    holds: bool | None
    """None: it can't be judged; `ours` says why."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def claims_table(
    claims: Iterable[Claim], claim: str = "the paper's claim", by: str = "paper"
) -> str:
    """Claim by claim: the paper's figure, ours, holds or doesn't.

    Args:
        claim, by: heads of the first two columns.
    """
    words = {True: "**holds**", False: "**doesn't hold**", None: "can't be judged"}
    rows = [[c.text, c.paper, c.ours, words[c.holds]] for c in claims]
    return table([claim, by, "here", "verdict"], rows)


def page(title: str, *parts: str) -> str:
    """A Markdown page; empty parts are left out."""
    return "\n\n".join([f"# {title}", *(part for part in parts if part)]) + "\n"


def seeds(number: int) -> str:
    """So many seeds, in words."""
    return f"{number} seed{'' if number == 1 else 's'}"


def every(judged: Iterable[bool | None]) -> bool | None:
    """Whether all hold: False if one doesn't; otherwise None if one can't be judged."""
    seen = list(judged)
    if False in seen:
        return False
    return None if None in seen or not seen else True
