"""CRBlock by generated code: the layers' numbers, whatever the size, at once or later."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from csipipe import models
from csipipe.models import kernels
from csipipe.models.crblock import CRBlock
from csipipe.models.kernels.llvm import convolution, stages
from csipipe.models.kernels.llvm import crblock as llvm
from csipipe.models.kernels.llvm.image import Frame, Image
from csipipe.models.kernels.llvm.machine import Kernel as Compiled
from csipipe.models.kernels.llvm.machine import Library, this_machine
from csipipe.models.kernels.llvm.program import Program, Step
from csipipe.models.kernels.llvm.steps import forward_taps
from csipipe.models.layers import Conv2d
from csipipe.settings.config import Kernel, ModelSettings

CRNET = ModelSettings().kernels
OUTPUT, WEIGHTS = 1e-6, 2e-5
"""Largest differences from float64, by norm: of output and input gradient, and of weights'."""


@dataclass
class Pass:
    """A forward and backward pass: everything that a block computes."""

    y: Tensor
    dx: Tensor
    weights: Tensor
    statistics: Tensor


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def by_layers(block: CRBlock, x: Tensor, dy: Tensor, dtype: torch.dtype) -> Pass:
    block = copy.deepcopy(block).to(dtype)
    leaf = x.to(dtype).requires_grad_()
    with models.plain_layers():
        y = block(leaf)
    dx, *weights = torch.autograd.grad(y, [leaf, *block.parameters()], dy.to(dtype))
    return Pass(y.detach(), dx, flat(weights), flat(block.buffers()))


def by_kernels(block: CRBlock, x: Tensor, dy: Tensor) -> Pass:
    block = copy.deepcopy(block)
    with torch.no_grad():
        y, saved = llvm.forward(block, x, True)
        dx, rest = llvm.input_gradient(block, saved, dy)
        weights = llvm.weight_gradients(block, saved, rest)
    assert [w.shape for w in weights] == [p.shape for p in block.parameters()]
    return Pass(y, dx, flat(weights), flat(block.buffers()))


def away(found: Tensor, wanted: Tensor) -> float:
    """‖difference‖ / ‖wanted‖."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def random_block(paths: Any, seed: int) -> CRBlock:
    torch.manual_seed(seed)
    block = CRBlock(paths)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return block


def rounded(block: CRBlock, x: Tensor, dy: Tensor, seed: int) -> Pass:
    """In float64, but each layer's output is rounded at random as float32 would have."""
    block, draw = copy.deepcopy(block), torch.Generator().manual_seed(seed)

    def off(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=draw, dtype=output.dtype)
        return output * (1 + torch.finfo(torch.float32).eps * noise)

    for layer in (m for m in block.modules() if not list(m.children())):
        layer.register_forward_hook(off)
    return by_layers(block, x, dy, torch.float64)


def compare(block: CRBlock, x: Tensor, seed: int, strict: bool = True) -> None:
    """Kernels beside float64, never worse than twice what PyTorch's own float32 is.

    Not strict, where that is luck: or than twice what noise of float32's size does; weight
    gradients, in which almost everything may cancel, than a hundred times PyTorch's.
    """
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    exact = by_layers(block, x, dy, torch.float64)
    torchs, ours = by_layers(block, x, dy, torch.float32), by_kernels(block, x, dy)
    noisy = [] if strict else [rounded(block, x, dy, n) for n in range(3)]
    for name in ("y", "dx", "weights", "statistics"):
        wanted = getattr(exact, name)
        mine, theirs, *noise = (away(getattr(p, name), wanted) for p in (ours, torchs, *noisy))
        bound, times = (WEIGHTS, 2 if strict else 100) if name == "weights" else (OUTPUT, 2)
        bound = max(bound, times * theirs, *(2 * n for n in noise))
        assert mine <= bound, f"{name}: {mine:.1e} beside {theirs:.1e}"


def test_crnets_block_is_the_layers_block() -> None:
    compare(random_block(CRNET, 0), torch.randn(40, 2, 32, 32), seed=1)


SIZES = st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3), (1, 9), (5, 3), (7, 1)])
PATHS = st.lists(st.lists(SIZES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=2)


def any_size(
    paths: Any, rows: int, angles: int, delays: int, seed: int, scale: float = 1.0, **how: bool
) -> None:
    x = scale * torch.randn(rows, 2, angles, delays, generator=torch.Generator().manual_seed(seed))
    compare(random_block(tuple(paths), seed), x + scale, seed, **how)


# an input of a LeakyReLU within rounding of 0 makes any two float32 programs differ, so seeds are
# few and known
@settings(max_examples=4, deadline=None, derandomize=True)
@given(PATHS, st.integers(2, 5), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3))
@example([((1, 1),), ((3, 3), (1, 1))], 2, 1, 1, 0)
@example([((9, 1), (1, 9))], 3, 4, 33, 0)
def test_any_size_and_any_odd_kernels(
    paths: Any, rows: int, angles: int, delays: int, seed: int
) -> None:
    any_size(paths, rows, angles, delays, seed)


@pytest.mark.long
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    PATHS,
    st.integers(2, 40),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([1e-30, 1e-4, 1.0, 1e4]),
    st.integers(0, 3),
)
def test_many_sizes_and_scales(
    paths: Any, rows: int, angles: int, delays: int, scale: float, seed: int
) -> None:
    # variances far below BatchNorm's epsilon, two values, LeakyReLUs near 0: float32 is luck
    any_size(paths, rows, angles, delays, seed, scale, strict=False)


def test_one_value_has_no_variance() -> None:
    block = random_block(CRNET, 0)
    assert llvm.reason(block, torch.randn(2, 2, 1, 1)) is None
    assert llvm.reason(block, torch.randn(1, 2, 1, 1)) == (
        "BatchNorm needs more than one value per channel"
    )


def test_no_number_in_no_number_out() -> None:
    block, x = random_block(CRNET, 0), torch.randn(4, 2, 32, 32)
    x[1, 0, 5, 7] = torch.nan
    found = by_kernels(block, x, torch.ones_like(x))
    assert found.y.isnan().all()  # by BatchNorm
    for part in (found.dx, found.weights[:100]):
        assert part.isnan().any()
    dy = torch.ones_like(x)
    dy[0, 1, 31, 31] = torch.nan
    found = by_kernels(block, torch.randn(4, 2, 32, 32), dy)
    assert found.y.isfinite().all()
    assert found.dx.isnan().any()
    assert found.weights.isnan().any()


def step(tail: nn.Module, x: Tensor, later: bool) -> dict[str, Tensor | None]:
    """Gradients after two micro-batches."""
    pending = models.put_off([tail]) if later else None
    leaf = x.clone().requires_grad_()
    for rows in torch.split(leaf, 3):
        torch.autograd.backward(tail(rows).square().sum())
    if pending is not None:
        assert all(p.grad is None for p in tail.parameters())
        models.accumulate(pending)
    return {"x": leaf.grad} | {name: p.grad for name, p in tail.named_parameters()}


def test_later_is_the_same_to_the_bit() -> None:
    model = ModelSettings(c1=12, c2=9, angles=6, delays=10)
    tails = [nn.Sequential(*models.build_tail(model, 3)) for _ in range(2)]
    x = torch.randn(6, 12)
    at_once, later = step(tails[0], x, later=False), step(tails[1], x, later=True)
    for name, gradient in at_once.items():
        assert gradient is not None
        torch.testing.assert_close(later[name], gradient, rtol=0, atol=0)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    block, x, dy = random_block(CRNET, 1), torch.randn(70, 2, 32, 32), torch.randn(70, 2, 32, 32)
    threads = torch.get_num_threads()
    passes = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            passes.append(by_kernels(block, x, dy))
    finally:
        torch.set_num_threads(threads)
    for found in passes[1:]:
        for name in ("y", "dx", "weights", "statistics"):
            assert torch.equal(getattr(found, name), getattr(passes[0], name)), name


def test_a_team_is_all_threads_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller one would end threads that PyTorch's next operation starts again."""
    teams: list[int] = []
    call = Compiled.__call__

    def watched(self: Compiled, table: int, threads: int) -> None:
        teams.append(threads)
        call(self, table, threads)

    monkeypatch.setattr(Compiled, "__call__", watched)
    block, x, dy = random_block(CRNET, 1), torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (2, 1):
            by_kernels(block, x[:rows], dy[:rows])
    finally:
        torch.set_num_threads(before)
    assert teams == [3] * 3 + [1] * 3


@pytest.mark.parametrize("together", [True, False])
def test_each_thread_of_a_team_has_its_share(together: bool) -> None:
    """Of five images, by threads that keep their last one in a frame each."""
    here, image = this_machine(), Image(3, 5)
    if here is None or not here.openmp:
        pytest.skip("PyTorch's threads aren't OpenMP's, or no kernels are known here")
    frame = Frame(image, 2, (3, 3), here.lanes)
    x, frames = torch.rand(5, 2, 3, 5) + 1, torch.zeros(2, frame.size)
    arrays = {"x": x, "frame": frames, "out z": torch.empty(5, 2, 3, 5)}
    arrays |= {"weights": torch.rand(2, 2, 3, 3), "bias": torch.zeros(2)}
    constants = image, "stored", 2, (3, 3), 2, True, False
    names = {name: name for name in arrays}
    step = Step(stages.convolution, constants, names, taps=forward_taps(frame))
    program, before = (
        Program(Library(replace(here, openmp=together)), [step]),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(2)
        program.run(5, arrays)
    finally:
        torch.set_num_threads(before)
    wanted = torch.nn.functional.conv2d(x, arrays["weights"], padding=1)
    torch.testing.assert_close(arrays["out z"], wanted, rtol=1e-5, atol=0)
    of_first, of_second = x[1].sum() if together else x[4].sum(), x[4].sum() if together else 0.0
    assert [float(part.sum()) for part in frames] == pytest.approx(
        [float(of_first), float(of_second)]
    )


def test_a_run_of_adam_is_the_layers_run() -> None:
    """A tail's training by kernels beside PyTorch's layers, both with weight gradients put off."""
    losses: list[list[float]] = []
    for by in ("llvm", "torch"):
        model = ModelSettings(c1=24, c2=16, angles=8, delays=8, kernels_by=by)
        tail = nn.Sequential(*models.build_tail(model, 0))
        adam, pending = torch.optim.Adam(tail.parameters(), 1e-3), models.put_off([tail])
        draws = torch.Generator().manual_seed(0)
        losses.append([])
        for _ in range(10):
            x, wanted = (torch.randn(16, n, generator=draws) for n in (24, 16))
            loss = (tail(x.requires_grad_()) - wanted).square().mean()
            torch.autograd.backward(loss)
            models.accumulate(pending)
            pending.clear()
            adam.step()
            adam.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)


def test_evaluation_uses_running_statistics() -> None:
    block, x = random_block(CRNET, 2), torch.randn(5, 2, 32, 32)
    by_kernels(block, x, x)
    block.eval()
    before = flat(block.buffers())
    with torch.no_grad():
        assert kernels.choose(block, x).backend is not None
        found = block(x)
        with models.plain_layers():
            wanted = block(x)
    assert away(found, wanted) < OUTPUT
    assert torch.equal(flat(block.buffers()), before)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "bias"),
    [(2, 2, (3, 3), True), (2, 1, (1, 9), False), (8, 16, (5, 5), True), (16, 2, (9, 1), False)],
)
def test_small_convolutions_are_torchs(
    inputs: int, outputs: int, kernel: Kernel, bias: bool
) -> None:
    for angles, delays in ((32, 32), (5, 19)):
        layer = Conv2d(inputs, outputs, kernel, bias, kernels_by="llvm")
        x, dy = torch.randn(7, inputs, angles, delays), torch.randn(7, outputs, angles, delays)
        assert kernels.choose(layer, x).why == "llvm"
        with torch.no_grad():
            y, saved = convolution.forward(layer, x, True)
            dx, rest = convolution.input_gradient(layer, saved, dy)
            assert dx is not None
            found = [y, dx, *convolution.weight_gradients(layer, saved, rest)]
        exact = copy.deepcopy(layer).double()
        leaf = x.double().requires_grad_()
        with models.plain_layers():
            y = exact(leaf)
        wanted = [y, *torch.autograd.grad(y, [leaf, *exact.parameters()], dy.double())]
        assert max(map(away, found, [w.detach() for w in wanted])) < OUTPUT
