"""Which of the doctor's findings end a run before it trains: `data.accept`.

What is suspicious or unusable about a file of channels is found, and said, once per machine, by the
code of `channels check`, when a run first uses the file; it is asked again at every later run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from csipipe.channels.doctor import Finding
from csipipe.settings.config import Verdict

_ORDER: tuple[Verdict, ...] = get_args(Verdict)


def say(path: Path, findings: Iterable[Finding]) -> None:
    """One line per finding, on the screen."""
    for finding in findings:
        print(
            f"csipipe: {path}: {finding.verdict}: {finding.what}. Repair: {finding.repair}.",
            file=sys.stderr,
            flush=True,
        )


def check(what: Path | str, findings: Iterable[Finding], accept: Verdict) -> None:
    """Refuse a file, or rows, with a finding that is worse than what is accepted.

    Raises:
        ValueError: with the finding, its repair and the setting that overrides it.
    """
    for finding in findings:
        if _ORDER.index(finding.verdict) > _ORDER.index(accept):
            raise ValueError(
                f"{what}: {finding.verdict}: {finding.what}. Repair: {finding.repair}. To train on "
                f"it all the same, set data.accept to {finding.verdict}; it is {accept}."
            )
