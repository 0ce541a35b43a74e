"""gpucheck's most important checks as tests, on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small
from torch import Tensor, nn

from csipipe import device, methods
from csipipe.comm.trust import BadMessage
from csipipe.comm.world import World
from csipipe.gpucheck import endings, parity
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.timing import milliseconds
from csipipe.models.norm import BatchNorm2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CHECKS = [parity.centralised, parity.split, endings.resume, endings.faults]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_gpucheck_checks(check: Callable[[Step], None], tmp_path: Path) -> None:
    device.set_arithmetic(tf32=False)
    step = Step(torch.device("cuda"), tmp_path, 180.0)
    check(step)
    assert step.rows
    assert not [row for row in step.rows if row.ok is False]


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


def trained(graph: str, spoil: bool = False) -> dict[str, Tensor]:
    """The state after 12 iterations, most of them launched before the one before was read."""
    cuda = device.pick_device("cuda", 0)
    device.set_arithmetic(tf32=False)
    settings = small(
        topology={"ues": 8, "stages": 1, "placement": "together"},
        model={"kernels_by": "auto", "angles": 32, "delays": 32},
        train={"cuda_graph": graph, "lr": 2**-9, "augment": "angle"},
    )
    world = World.alone()
    build = methods.prepare(settings, 0, 1, cuda)
    world.ready("data")
    world.connect(20.0)
    worker: Any = build(world)
    found: dict[str, Tensor] = {}
    for k in range(12):
        worker.probe.unseen = k not in (6, 11)
        worker.probe.gradients_wanted = k == 7
        found[f"sums {k}"] = worker.train_iteration(k).sums.clone()
        if k == 6:
            found["test"] = worker.evaluate("test").sums.clone()
    found["ledger"] = worker.exchanged().counts.clone()
    if spoil:
        spoiled(worker)
    for name, unit in worker.units().items():
        found |= {f"{name} {key}": tensor.clone() for key, tensor in unit.state().items()}
    world.leave()
    return found


def spoiled(worker: Any) -> None:
    """UE 2 sends NaN in an iteration after which the next one is launched at once."""
    ues = worker.halves[1].ues
    draws = [ue.generator.get_state() for ue in ues]
    ues[2].rows[:] = float("nan")
    worker.probe.unseen = True
    with pytest.raises(BadMessage, match=r"from UE 2 .* holds nan"):
        worker.train_iteration(12)
    for ue, state in zip(ues, draws, strict=True):
        ue.generator.set_state(state)


def test_a_graph_computes_the_same_bits_and_steps_only_if_all_is_sound() -> None:
    computed, replayed, after = trained("never"), trained("always"), trained("always", spoil=True)
    assert computed.keys() == replayed.keys() == after.keys()
    for name, tensor in computed.items():
        assert torch.equal(tensor, replayed[name]), name
    changed = [name for name, tensor in replayed.items() if not torch.equal(tensor, after[name])]
    # the encoders' statistics have seen the mini-batch, as in a run without a graph
    assert all("running" in name or "tracked" in name for name in changed), changed
