"""Messages of a rank with two roles to itself, with the interface of `torch.distributed`.

What arrives is a copy of what was sent, so that no autograd edge and no memory is shared.
"""

from __future__ import annotations

from collections import defaultdict
from queue import Empty, SimpleQueue

from torch import Tensor

_LIMIT = 60.0
"""Seconds after which a message that nobody sent is a bug: another thread may be staging it."""


class Handed:
    """A message that has been handed over: there is nothing to wait for."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        """Returns at once."""


class Awaited:
    """A receive that was posted."""

    def __init__(self, messages: SimpleQueue[Tensor], rows: Tensor) -> None:
        self._messages = messages
        self._rows = rows

    def is_completed(self) -> bool:
        return not self._messages.empty()

    def wait(self) -> None:
        """Copy the oldest message into the rows that were posted for it."""
        try:
            message = self._messages.get(timeout=_LIMIT)
        except Empty as error:
            raise AssertionError("a message to this rank itself was never sent") from error
        assert message.shape == self._rows.shape, (message.shape, self._rows.shape)
        self._rows.copy_(message)


class Loopback:
    """One rank's messages to itself, by tag; those of a tag in the order of sending."""

    def __init__(self) -> None:
        self._messages: defaultdict[int, SimpleQueue[Tensor]] = defaultdict(SimpleQueue)

    def isend(self, rows: Tensor, tag: int) -> Handed:
        """Send; `rows` must not change until they have been received."""
        self._messages[tag].put(rows)
        return Handed()

    def irecv(self, rows: Tensor, tag: int) -> Awaited:
        """Post a receive of a message of the same shape and type."""
        return Awaited(self._messages[tag], rows)
