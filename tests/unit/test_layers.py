"""Layers whose weight gradients can wait: the same numbers as torch's, at once or later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bits import assert_same
from torch import Tensor, nn

from csipipe import models
from csipipe.models.layers import Conv2d, LayerGradients, Linear, Pointwise
from csipipe.settings.config import ModelSettings

Builder = Callable[[], nn.Module]
LAYERS: dict[str, tuple[Builder, Builder, tuple[int, ...]]] = {
    "linear": (lambda: Linear(6, 5), lambda: nn.Linear(6, 5), (4, 6)),
    "1x9": (
        lambda: Conv2d(2, 7, (1, 9), bias=True),
        lambda: nn.Conv2d(2, 7, (1, 9), padding=(0, 4)),
        (4, 2, 6, 10),
    ),
    "9x1 without bias": (
        lambda: Conv2d(7, 7, (9, 1), bias=False),
        lambda: nn.Conv2d(7, 7, (9, 1), padding=(4, 0), bias=False),
        (4, 7, 6, 10),
    ),
    "1x1": (
        lambda: Pointwise(14, 2),
        lambda: nn.Conv2d(14, 2, 1, bias=False),
        (4, 14, 6, 10),
    ),
    "3x3": (
        lambda: Conv2d(7, 2, (3, 3), bias=True),
        lambda: nn.Conv2d(7, 2, 3, padding=1),
        (4, 7, 6, 10),
    ),
}
"""Ours, torch's, and the shape of the input."""


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Gradients at input and parameters; what was put off is left out."""
    leaf = x.clone().requires_grad_()
    torch.autograd.backward(module(leaf), dy)
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return found | {"x": leaf.grad}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_torchs(name: str) -> None:
    """In float64, as for every rewritten kernel."""
    build, plain, shape = LAYERS[name]
    ours, theirs = build().double(), plain().double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    dy = torch.randn_like(theirs(x))
    expected = gradients(theirs, x, dy)
    for key, gradient in gradients(ours, x, dy).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_only_what_learns_gets_a_gradient_at_once_or_later(
    name: str, frozen: tuple[str, ...]
) -> None:
    build, _, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    dy = torch.randn_like(layer(x))
    expected = {key: g for key, g in gradients(layer, x, dy).items() if key not in frozen}
    layer.zero_grad()
    for key in frozen:
        layer.get_parameter(key).requires_grad_(False)
    assert_same(gradients(layer, x, dy), expected)
    layer.zero_grad()
    pending = models.put_off([layer])
    at_input = gradients(layer, x, dy)
    models.accumulate(pending)
    found = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
    assert_same(found | at_input, expected)


@pytest.mark.parametrize("kernel", [(2, 3), (3, 4), (2, 2)])
def test_even_kernels_are_refused(kernel: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"kernel is \({kernel[0]}, {kernel[1]}\); both .* odd"):
        Conv2d(2, 2, kernel, bias=True)


@pytest.mark.parametrize("name", LAYERS)
def test_later_is_the_same_to_the_bit(name: str) -> None:
    build, _, shape = LAYERS[name]
    at_once, later = build(), build()
    later.load_state_dict(at_once.state_dict())
    pending = models.put_off([later])
    expected: dict[str, Tensor] = {}
    queue: list[models.Pending] = []
    for _ in range(3):
        x = torch.randn(shape)
        dy = torch.randn_like(at_once(x))
        expected = gradients(at_once, x, dy)
        found = gradients(later, x, dy)
        assert found.keys() == {"x"}
        assert torch.equal(found["x"], expected.pop("x"))
        queue += pending
        pending.clear()
    models.accumulate(queue)
    found = {key: p.grad for key, p in later.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_joined_entries_are_one_product_per_layer() -> None:
    torch.manual_seed(0)
    one, many = Linear(6, 5).double(), Linear(6, 5).double()
    many.load_state_dict(one.state_dict())
    pending = models.put_off([many])
    x, dy = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    expected = gradients(one, x, dy)
    for part in (slice(0, 3), slice(3, 8)):
        gradients(many, x[part], dy[part])
    (entry,) = models.joined(pending)
    assert isinstance(entry, LayerGradients)
    assert entry.layer is many
    models.accumulate([entry])
    for key, parameter in many.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-10, atol=1e-10)


def test_hooks_of_a_parameter_see_what_was_put_off() -> None:
    layer = Linear(2, 2)
    seen: list[bool] = []
    hook = layer.weight.register_post_accumulate_grad_hook
    hook(lambda p: seen.append(p.grad is not None))  # type: ignore[no-untyped-call]
    pending = models.put_off([layer])
    for _ in range(2):
        gradients(layer, torch.randn(3, 2), torch.randn(3, 2))
    assert not seen
    models.accumulate(pending)
    assert seen == [True]  # once for both


def test_autocast_computes_as_torchs_layers_do() -> None:
    model = ModelSettings(c1=8, c2=8, angles=4, delays=4)
    ours = models.build_encoder(model, 0)
    plain = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.LeakyReLU(0.3),
        nn.Flatten(),
        nn.Linear(32, 8),
    )
    plain.load_state_dict(ours.state_dict())
    h, dz = torch.rand(6, 2, 4, 4), torch.randn(6, 8).bfloat16()
    for module in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            z = module(h)
        torch.autograd.backward(z, dz)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-2, atol=2e-2)
