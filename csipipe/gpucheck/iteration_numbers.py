"""Losses and gradients of the fused iteration beside float64 and PyTorch's layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from csipipe.gpucheck.iteration import Iteration
from csipipe.measure.metrics import paper_loss
from csipipe.models import build_encoder, build_head, build_tail
from csipipe.settings.config import ModelSettings


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def parts_of(ues: int, device: torch.device) -> tuple[list[Any], list[Any], nn.Sequential]:
    """Encoders, heads and tail of the paper's size, every UE's weights its own."""
    model = ModelSettings(angles=32, delays=32, kernels_by="torch")
    encoders = [build_encoder(model, u).to(device) for u in range(ues)]
    heads = [build_head(model, u).to(device) for u in range(ues)]
    return encoders, heads, nn.Sequential(*build_tail(model, 0)).to(device)


def unsplit(
    parts: tuple[list[Any], list[Any], nn.Sequential], h: Tensor, micro_batches: int, bf16: bool
) -> tuple[Tensor, list[Tensor]]:
    """Losses (U, B), and gradients in `Iteration.parameters`' order, by PyTorch's layers."""
    encoders, heads, tail = parts
    rows = h.shape[1] // micro_batches
    losses = []
    with torch.autocast(h.device.type, torch.bfloat16, enabled=bf16):
        z = torch.stack([e(x) for e, x in zip(encoders, h, strict=True)])
        for m in range(micro_batches):
            own = slice(m * rows, (m + 1) * rows)
            y = tail(z[:, own].flatten(0, 1)).view(len(h), rows, -1)
            found = torch.stack([head(v) for head, v in zip(heads, y, strict=True)])
            found = found.to(h.dtype).flatten(0, 1)
            losses.append(paper_loss(found, h[:, own].flatten(0, 1)).view(len(h), rows))
    loss = torch.cat(losses, 1)
    torch.autograd.backward(loss.sum() / h.shape[1])
    every = [
        [getattr(p[k], n).grad for p in some]
        for some, k, n in (
            (encoders, 0, "weight"),
            (encoders, 1, "weight"),
            (encoders, 1, "bias"),
            (encoders, 4, "weight"),
            (encoders, 4, "bias"),
            (heads, 0, "weight"),
            (heads, 0, "bias"),
        )
    ]
    of_tail = [p.grad for p in tail.parameters() if p.grad is not None]
    return loss.detach(), [*(torch.stack(v) for v in every), *of_tail]


def numbers(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Losses and gradients of one whole iteration against float64, beside PyTorch's layers.

    In bfloat16 those compute under autocast, so that what rounding does is seen beside what these
    kernels do: a gradient that nearly cancels is far from float64 in both.
    """
    torch.manual_seed(2)
    ues, batch, micro_batches = 3, 16, 2
    held = torch.rand(ues, 50, 2, 32, 32, device=device)
    picks = torch.randint(50, (ues, batch), device=device)
    h = torch.stack([rows[p] for rows, p in zip(held, picks, strict=True)])
    parts = parts_of(ues, device)
    exact = copy.deepcopy(parts)
    for part in (*exact[0], *exact[1], exact[2]):
        part.double()
    wanted, wanted_gradients = unsplit(exact, h.double(), micro_batches, False)
    loss, gradients = unsplit(copy.deepcopy(parts), h, micro_batches, dtype == torch.bfloat16)
    one = Iteration(*copy.deepcopy(parts), held, picks, micro_batches, dtype)
    with torch.no_grad():
        one.gradients()
    names = ["conv_w", "gamma", "beta", "enc_w", "enc_b", "head_w", "head_b"]
    names += [n for n, _ in one.tail.named_parameters()]
    errors = {"loss": [distance(one.loss, wanted), distance(loss, wanted)]}
    for n, p, g, w in zip(names, one.parameters, gradients, wanted_gradients, strict=True):
        assert p.grad is not None
        errors[n] = [distance(p.grad, w), distance(g, w)]
    worst = sorted(errors, key=lambda n: -errors[n][0] / max(errors[n][1], 1e-9))[:3]
    far = sorted(errors, key=lambda n: -errors[n][0])[:3]
    return {
        "loss": errors["loss"],
        "farther_than_torch": {n: errors[n] for n in worst},
        "farthest": {n: errors[n] for n in far},
        "all": errors,
    }
