"""BatchNorm with the channels last: the numbers and the state of PyTorch's."""

from __future__ import annotations

import copy

import torch

from csipipe import models
from csipipe.models.norm import BatchNorm2d
from csipipe.settings.config import ModelSettings


def test_channels_last_changes_the_order_in_memory_only() -> None:
    torch.manual_seed(0)
    one = BatchNorm2d(7)
    with torch.no_grad():
        one.weight.uniform_(0.5, 2)
        one.bias.normal_()
    other = copy.deepcopy(one)
    x = torch.randn(6, 7, 5, 4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = one.channels_last(a), other(b)
    assert y.is_contiguous()
    gradient = torch.randn_like(y)
    torch.autograd.backward((y, wanted), (gradient, gradient))
    pairs = [(y, wanted), (a.grad, b.grad), *zip(one.buffers(), other.buffers(), strict=True)]
    pairs += [(p.grad, q.grad) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_cpu_takes_pytorchs_way() -> None:
    one = BatchNorm2d(2)
    plain = torch.nn.BatchNorm2d(2)
    x = torch.randn(4, 2, 3, 3)
    assert torch.equal(one(x), plain(x))
    assert one.state_dict().keys() == plain.state_dict().keys()


def test_who_computes_it_is_the_models_choice() -> None:
    model = ModelSettings(name="csinet", c1=4, angles=4, delays=4, kernels_by="torch")
    parts = (
        models.build_encoder(model, 0),
        *models.build_tail(model, 0),
        models.build_head(model, 0),
    )
    norms = [m for part in parts for m in part.modules() if isinstance(m, BatchNorm2d)]
    assert norms
    assert {norm.kernels_by for norm in norms} == {"torch"}
