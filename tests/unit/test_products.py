"""Who computes the products of linear layers: kernels where they may, PyTorch elsewhere.

What the kernels compute is in `test_triton.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.models import kernels
from csipipe.models.layers import Linear
from csipipe.models.stacked import Stack
from csipipe.settings.config import KernelsBy, ModelSettings


class Counting:
    """PyTorch's products, counted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.asked.append("forward")
        y = x @ weight.mT
        return y if bias is None else y + bias.unsqueeze(-2)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        self.asked.append("input gradient")
        return gradient @ weight


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """What computes products unless model.kernels_by is torch."""
    counted = Counting()

    def products(kernels_by: KernelsBy, device: torch.device) -> Counting | None:
        return None if kernels_by == "torch" else counted

    monkeypatch.setattr(kernels, "_products", products)
    return counted


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def evaluation_in_bf16() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


PLACES: list[tuple[Callable[[], AbstractContextManager[Any]], bool]] = [
    (nullcontext, True),
    (torch.no_grad, True),
    (tf32, False),
    (models.plain_layers, False),
    (lambda: torch.autocast("cpu", torch.bfloat16), False),
    (evaluation_in_bf16, False),
]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("place", "ours"), PLACES)
def test_kernels_multiply_in_fp32(
    counting: Counting,
    place: Callable[[], AbstractContextManager[Any]],
    ours: bool,
    stacked: bool,
) -> None:
    layers = [nn.Sequential(Linear(5, 3)) for _ in range(2)]
    layer = Stack(layers) if stacked else layers[0]
    x = torch.randn(2, 4, 5, requires_grad=True)
    with place():
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
    wanted = ["forward", "input gradient"] if y.requires_grad else ["forward"]
    assert counting.asked == (wanted if ours else [])


def test_torch_means_pytorch(counting: Counting) -> None:
    for by in ("auto", "torch"):
        model = ModelSettings(name="transnet", c1=8, angles=8, delays=8, kernels_by=by)
        encoder = models.build_encoder(model, 0)
        with torch.no_grad():
            encoder(torch.rand(2, 2, 8, 8))
        assert bool(counting.asked) == (by == "auto")
        counting.asked.clear()


def test_stacked_layers_follow_their_modules(counting: Counting) -> None:
    ours = [Linear(5, 3) for _ in range(2)]
    layers = [nn.Sequential(layer, nn.Linear(3, 2)) for layer in ours]
    Stack(layers)(torch.randn(2, 4, 5))
    assert len(counting.asked) == 1
    for layer in ours:
        layer.kernels_by = "torch"
    Stack(layers)(torch.randn(2, 4, 5))
    assert len(counting.asked) == 1


def test_a_gradient_can_be_differentiated(counting: Counting) -> None:
    layer, x = Linear(5, 3), torch.randn(4, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.sum(), x)
    # of ‖xW' + b‖²: 2 W'W, summed over its columns
    torch.testing.assert_close(found, (2 * layer.weight.mT @ layer.weight).sum(0).expand(4, 5))
    assert counting.asked == ["forward", "input gradient"]  # the latter on the last way back


def test_others_need_no_kernels() -> None:
    with torch.no_grad():
        for by in ("auto", "llvm", "triton", "torch"):
            assert kernels.products(by, torch.ones(1, 1), torch.ones(1, 1)) is None


@pytest.mark.parametrize("fault", [1e-4, RuntimeError("no such instruction")])
def test_kernels_that_are_wrong_give_way_with_one_line(
    fault: float | Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: torch.device) -> Iterator[tuple[Tensor, Tensor, float]]:
        if isinstance(fault, Exception):
            raise fault
        yield torch.ones(3) + fault, torch.ones(3), kernels._PRODUCT

    monkeypatch.setattr(kernels, "_try_products", wrong)
    kernels._products.cache_clear()
    for _ in range(2):
        assert kernels._products("triton", torch.device("cuda:0")) is None
    kernels._products.cache_clear()
    (line,) = capfd.readouterr().err.splitlines()
    assert "PyTorch's operations instead of triton's kernel for linear layers" in line
    assert ("1.0e-04" if isinstance(fault, float) else "no such instruction") in line
