"""The comparison that the tests of identities rest on finds what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same, difference

ONE = {"losses": [[0.5, 0.25]], "weights": {"a": torch.tensor([0.0, float("nan")])}}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, ""),
        ({"losses": [[0.5, 0.25 + 1e-15]]}, "/losses/0/1"),
        ({"losses": [[0.5]]}, "/losses/0: 2 and 1 entries"),
        ({"weights": {}}, "/weights: only one has ['a']"),
        ({"weights": {"a": torch.tensor([-0.0, float("nan")])}}, "/weights/a"),
        ({"weights": {"a": torch.tensor([0.0, float("nan")]).double()}}, "/weights/a"),
        ({"weights": {"a": [0.0]}}, "/weights/a"),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], place: str) -> None:
    assert difference(ONE, ONE | changes) == place


def test_nothing_is_not_the_same_as_nothing() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_same({"losses": []}, {"losses": []}, "losses")
