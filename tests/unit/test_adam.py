"""Our Adam is PyTorch's, to the bit; and neither it nor a backward pass loads a compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from csipipe import models
from csipipe.comm import trust
from csipipe.methods import adam
from csipipe.methods.adam import Adam


def test_steps_are_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (7,), (2, 2, 2))]
    torchs = [nn.Parameter(p.detach().clone()) for p in ours]
    late = [nn.Parameter(torch.zeros(5)) for _ in range(2)]
    one = Adam(ours, lr=1e-2, betas=(0.8, 0.99), fused=True)
    two = torch.optim.Adam(torchs, lr=1e-2, betas=(0.8, 0.99), fused=True)
    one.add_param_group({"params": [late[0]]})
    two.add_param_group({"params": [late[1]]})
    for step in range(4):
        for a, b in zip([*ours, late[0]], [*torchs, late[1]], strict=True):
            if step != 2 or len(a.shape) > 1:  # some have none
                a.grad = torch.randn(a.shape)
                b.grad = a.grad.clone()
        one.step()
        two.step()
        one.zero_grad()
        two.zero_grad()
        assert all(p.grad is None for p in ours)
    for a, b in zip([*ours, late[0]], [*torchs, late[1]], strict=True):
        assert torch.equal(a, b)
        assert {"step", "exp_avg", "exp_avg_sq"} == one.state[a].keys() == two.state[b].keys()
        assert all(torch.equal(one.state[a][key], two.state[b][key]) for key in one.state[a])


def test_moments_that_are_copied_for_a_step_are_copied_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(n)) for n in (30, 20, 10, 40)]
    byhand = [nn.Parameter(p.detach().clone()) for p in ours]
    one, two = Adam(ours, lr=1e-2, fused=True), Adam(byhand, lr=1e-2, fused=True)
    one.moments = two.moments = torch.bfloat16
    for a, b in zip(ours, byhand, strict=True):
        a.grad = torch.randn(a.shape)
        b.grad = a.grad.clone()
    assert [[len(p) for p in some] for some in one._together(ours)] == [[30, 20, 10, 40]]
    one.step()
    monkeypatch.setattr(adam, "_COPIED", 45)
    assert [[len(p) for p in some] for some in two._together(byhand)] == [[30, 20], [10, 40]]
    two.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, byhand, strict=True))
    with trust.postponed() as later:
        two.step()
    assert len(later.steps) == 1  # several may run at the same time, and copy all at once
    two.moments = None
    assert len(list(two._together(byhand))) == 1


def test_moments_in_bf16_are_rounded_after_each_step() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(50))
    byhand = nn.Parameter(ours.detach().clone())
    one, two = Adam([ours], lr=1e-2, fused=True), torch.optim.Adam([byhand], lr=1e-2, fused=True)
    one.moments = torch.bfloat16
    exact = nn.Parameter(ours.detach().clone())
    three = torch.optim.Adam([exact], lr=1e-2, fused=True)
    for _ in range(5):
        gradient = torch.randn(50)
        for p, optimizer in ((ours, one), (byhand, two), (exact, three)):
            p.grad = gradient.clone()
            optimizer.step()
        for key in ("exp_avg", "exp_avg_sq"):
            assert one.state[ours][key].dtype == torch.bfloat16
            rounded = two.state[byhand][key].bfloat16()
            assert torch.equal(one.state[ours][key], rounded)
            two.state[byhand][key] = rounded.float()
    assert torch.equal(ours, byhand)
    assert not torch.equal(ours, exact)
    torch.testing.assert_close(ours, exact, atol=5e-4, rtol=0)  # of steps of about 1e-2


def test_backward_passes_begin_with_given_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, requires_grad=True)
    w = nn.Parameter(torch.randn(2, 2))
    dy, dw = torch.randn(3, 2), torch.randn(2, 2)
    outputs = [x @ w, w]
    wanted = torch.autograd.grad(outputs, [x, w], [dy, dw], retain_graph=True)
    models.backward(outputs, [dy, dw])
    assert x.grad is not None
    assert w.grad is not None
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(w.grad, wanted[1])


def test_training_loads_no_compiler() -> None:
    code = """
import sys
import torch
from csipipe import models
from csipipe.methods.base import adam
from csipipe.settings.config import ModelSettings, TrainSettings
model = ModelSettings(angles=32, delays=32, kernels_by="torch")
models.check(model)
models.tail_shapes(model)
encoder = models.build_encoder(model, 0)
optimizer = adam({"encoder": encoder.parameters()}, TrainSettings())
z = encoder(torch.rand(2, 2, 32, 32))
models.backward([z], [torch.ones_like(z)])
optimizer.step()
optimizer.zero_grad()
sys.exit(bool({"torch._dynamo", "sympy"} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
