"""gpucheck's most important checks as tests, on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from csipipe import device
from csipipe.gpucheck import endings, parity
from csipipe.gpucheck.findings import Findings, Step
from csipipe.gpucheck.timing import milliseconds
from csipipe.models.norm import BatchNorm2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CHECKS = [parity.centralised, parity.split, endings.resume, endings.faults]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_gpucheck_checks(check: Callable[[Step], None], tmp_path: Path) -> None:
    findings = Findings(tmp_path / "found.json")
    device.set_arithmetic(tf32=False)
    check(Step(torch.device("cuda"), tmp_path / "step", 180.0, findings))
    assert findings.rows
    assert not [row for row in findings.rows if row.ok is False]


def test_what_is_copied_to_the_host_is_there_after_the_wait() -> None:
    """Behind half a second of work that the stream has to do first."""
    cuda = device.pick_device("cuda", 0)
    x = torch.zeros(1 << 20, device=cuda)
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
    x.fill_(1.0)
    before = time.monotonic()
    host, wait = device.download(x)
    at_once = time.monotonic() - before
    wait()
    assert at_once < 0.2
    assert host.is_pinned()
    assert bool((host == 1.0).all())


def test_a_context_and_a_number_for_every_rank() -> None:
    count = torch.cuda.device_count()
    assert [device.pick_device("auto", rank).index for rank in range(2 * count)] == [
        *range(count),
        *range(count),
    ]


def test_batch_norm_of_few_channels_is_pytorchs() -> None:
    """And takes less than half its time, whose reason it is."""
    cuda = device.pick_device("cuda", 0)
    torch.manual_seed(0)
    x = torch.randn(4000, 7, 32, 32, device=cuda)
    layers = BatchNorm2d(7).to(cuda), nn.BatchNorm2d(7).to(cuda)
    own, plain = (layer(x) for layer in layers)
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)
    fast, slow = (milliseconds(partial(layer, x), cuda) for layer in layers)
    assert fast < slow / 2
