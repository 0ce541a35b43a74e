"""What is decided for a GPU, as far as a machine without one can see it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from csipipe import device
from csipipe.comm.collectives import greetings


@pytest.fixture
def flags() -> Iterator[None]:
    """Leave torch's flags as they were."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("flags")
def test_fp32_is_fp32_unless_told_otherwise(tf32: bool) -> None:
    torch.backends.cudnn.benchmark = True
    device.set_arithmetic(tf32)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_only_what_goes_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def empty(*_: object, pin_memory: bool, **__: object) -> None:
        asked.append(pin_memory)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cpu", "cuda:1"):
        device.host_buffer((2, 3), torch.float32, torch.device(name))
    assert asked == [False, True]


def test_stages_greet_the_way_their_messages_go() -> None:
    assert greetings(3, backward=False) == [(0, 1), (1, 2)]
    assert greetings(3, backward=True) == [(1, 0), (2, 1)]
    assert greetings(1, backward=True) == []
