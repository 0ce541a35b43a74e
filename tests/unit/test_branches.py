"""Branches on streams of a GPU: who waits for whom, with streams that only note it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from csipipe import branches
from csipipe.branches import Branches


class Stream:
    """A stream that notes what it is told."""

    def __init__(self, name: str, noted: list[str]) -> None:
        self.name, self.noted = name, noted

    def record_event(self) -> str:
        return f"all of {self.name} by line {len(self.noted)}"

    def wait_event(self, event: str) -> None:
        self.noted.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.noted.append(f"{self.name} waits for {other.name}")


def test_a_branch_begins_after_what_was_before_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[str] = []
    main, *others = (Stream(name, noted) for name in ("main", "one", "two"))
    now = [main]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(branches, "_stream", lambda device, number: others[number - 1])
    noted.append("main computes")
    found = Branches(torch.device("cuda", 0))
    for number in range(3):
        with found.branch(number):
            noted.append(f"{now[-1].name} computes")
    found.join()
    assert noted == [
        "main computes",
        "main computes",
        "one waits for all of main by line 1",  # not for the first branch
        "one computes",
        "two waits for all of main by line 1",
        "two computes",
        "main waits for one",
        "main waits for two",
    ]
