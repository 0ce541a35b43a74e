"""Several modules computed as one: the same numbers, and each one's weights are still its own."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.comm.topology import Topology
from csipipe.measure.metrics import paper_loss
from csipipe.measure.probe import Probe
from csipipe.methods.base import adam
from csipipe.methods.ends import Singly, Stacked, Way, decide
from csipipe.methods.ue import UserEquipment
from csipipe.models import stacked
from csipipe.models.crblock import SLOPE
from csipipe.models.stacked import Stack, Unstackable
from csipipe.models.stackedlayers import StackedBatchNorm2d
from csipipe.settings.config import (
    HeadName,
    KernelsBy,
    ModelSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)

MODEL = ModelSettings(c1=12, c2=10, angles=6, delays=5, kernels_by="torch")
ROWS, STEPS, TOLERANCE = 8, 4, 1e-6


def parts(ues: int, model: ModelSettings) -> list[nn.Module]:
    """Encoder and head of some UEs, whose weights differ."""
    found = []
    for ue in range(ues):
        found += [models.build_encoder(model, ue), models.build_head(model, ue)]
    return found


def rows(ues: int, seed: int) -> tuple[Tensor, Tensor]:
    """(U, B, 2, A, D) images, and what a tail might add to smashed data."""
    draws = torch.Generator().manual_seed(seed)
    h = torch.rand(ues, ROWS, 2, 6, 5, generator=draws)
    return h, torch.randn(ues, ROWS, 10, generator=draws)


def trained(
    ues: int,
    step_of: str,
    dtype: torch.dtype,
    left_out: Sequence[int] = (),
    model: ModelSettings = MODEL,
) -> list[nn.Module]:
    """Encoders and heads after some Adam steps, one after the other or stacked, gradients kept.

    Weight gradients of the heads are put off, as on a UE rank, and joined over micro-batches.
    """
    found = [part.to(dtype) for part in parts(ues, model)]
    encoders, heads = found[::2], found[1::2]
    optimizer = adam({"encoder": [p for part in found for p in part.parameters()]}, TrainSettings())
    taking = [ue for ue in range(ues) if ue not in left_out]
    stacks = [Stack(encoders), Stack(heads)] if step_of == "stacked" else []
    pending: list[models.Pending] = [] if stacks else models.put_off(heads)
    if stacks:
        stacks[1].put_off(pending)
    for step in range(STEPS):
        optimizer.zero_grad()
        h, noise = (tensor.to(dtype) for tensor in rows(ues, step))
        if stacks:
            for stack in stacks:
                stack.clear()
                stack.take(taking)
            z = stacks[0](h[taking])
        else:
            z = torch.stack([encoders[ue](h[ue]) for ue in taking])
        y = (z[..., :10] + noise[taking]).detach().requires_grad_()
        for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
            leaf = y[:, part].detach().requires_grad_()
            if stacks:
                h_hat = stacks[1](leaf)
            else:
                h_hat = torch.stack([heads[ue](leaf[at]) for at, ue in enumerate(taking)])
            loss = paper_loss(h_hat.flatten(0, 1), h[taking, part].flatten(0, 1))
            torch.autograd.backward(loss.sum())
            assert leaf.grad is not None
        assert pending, "whoever takes part"
        models.accumulate(models.joined(pending))
        pending.clear()
        dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
        torch.autograd.backward(z, dz.to(dtype))
        for stack in stacks:
            stack.hand_out(range(len(taking)))
        optimizer.step()
    return found


def differences(found: list[nn.Module], wanted: list[nn.Module]) -> dict[str, float]:
    """Largest ‖difference‖ / ‖tensor‖ of gradients, weights and running variances.

    Not of the bias before BatchNorm, whose true gradient is zero, nor of the mean that it moves.
    """
    worst: dict[str, float] = {}
    for place, (module, other) in enumerate(zip(found, wanted, strict=True)):
        mine, theirs = named(module), named(other)
        assert mine.keys() == theirs.keys()
        noise = ("0.bias", "0.bias.grad", "1.running_mean") if place % 2 == 0 else ()
        for name in mine.keys() - {*noise}:
            away = (mine[name].double() - theirs[name]).norm() / theirs[name].double().norm()
            worst[name] = max(worst.get(name, 0.0), float(away.nan_to_num()))
    return worst


def named(module: nn.Module) -> dict[str, Tensor]:
    """State and gradients."""
    found = dict(module.state_dict())
    return found | {f"{n}.grad": p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("left_out", [(), (1,), (0, 3)])
def test_stacked_modules_train_as_they_do_one_after_the_other(left_out: Sequence[int]) -> None:
    """Exactly so in double; in single what differs is rounding."""
    exact = differences(
        trained(5, "stacked", torch.float64, left_out),
        trained(5, "singly", torch.float64, left_out),
    )
    assert max(exact.values()) < 1e-13, exact
    rounded = differences(
        trained(5, "stacked", torch.float32, left_out),
        trained(5, "singly", torch.float32, left_out),
    )
    print(rounded)
    assert max(rounded.values()) < TOLERANCE, rounded


def test_a_head_with_a_crblock_is_stacked_too() -> None:
    model = replace(MODEL, head="crblock")
    exact = differences(
        trained(4, "stacked", torch.float64, (1,), model),
        trained(4, "singly", torch.float64, (1,), model),
    )
    assert any("2.join.1.running_var" in name for name in exact)
    assert max(exact.values()) < 1e-12, exact


def test_modules_that_take_no_part_stay_as_they_are() -> None:
    untouched, trained_ones = parts(5, MODEL), trained(5, "stacked", torch.float32, (0, 3))
    for ue in (0, 3):
        for place in (2 * ue, 2 * ue + 1):
            before, after = named(untouched[place]), named(trained_ones[place])
            assert before.keys() == after.keys()  # no gradients
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_module_can_be_loaded_and_used_by_itself() -> None:
    """Its weights are views: what is loaded into it is what the stack computes with."""
    encoders = [models.build_encoder(MODEL, ue) for ue in range(3)]
    stack = Stack(encoders)
    encoders[1].load_state_dict(models.build_encoder(MODEL, 7).state_dict())
    h, _ = rows(3, 0)
    for encoder in encoders:
        encoder.eval()
    with torch.no_grad():
        together = stack(h)
        alone = torch.stack([encoder(x) for encoder, x in zip(encoders, h, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_the_same_bits_whoever_else_is_in_the_stack() -> None:
    """A placement changes no bit as long as there are two UEs on every rank."""
    h, _ = rows(7, 0)
    encoders = [models.build_encoder(MODEL, ue) for ue in range(7)]
    with torch.no_grad():
        apart = torch.cat([Stack(encoders[:3])(h[:3]), Stack(encoders[3:])(h[3:])])
        assert torch.equal(Stack(encoders)(h), apart)


def passes(paired: bool, training: bool) -> tuple[list[nn.Module], list[Tensor]]:
    """Layers of stacked encoders; output, gradients and running statistics."""
    with pytest.MonkeyPatch.context() as patch:
        if not paired:
            patch.setattr(stacked, "paired", list)
        encoders = [models.build_encoder(MODEL, ue).train(training) for ue in range(3)]
        stack = Stack(encoders)
    h, _ = rows(3, 0)
    leaf = h.requires_grad_()
    z = stack(leaf)
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(z, dz)
    stack.hand_out(range(3))
    assert leaf.grad is not None
    state = [tensor for encoder in encoders for _, tensor in sorted(named(encoder).items())]
    return stack._layers, [z.detach(), leaf.grad, *state]


@pytest.mark.parametrize("training", [True, False])
def test_a_batchnorm_takes_over_the_leakyrelu_and_no_bit_changes(training: bool) -> None:
    layers, found = passes(True, training)
    apart, wanted = passes(False, training)
    assert len(apart) == len(layers) + 1
    assert not any(isinstance(layer, nn.LeakyReLU) for layer in layers)
    (norm,) = (layer for layer in layers if isinstance(layer, StackedBatchNorm2d))
    assert norm.slope == SLOPE
    assert norm.shape == norm.fresh().shape == (2, SLOPE)  # the kernels are tried with it
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_batchnorm_keeps_its_own_momentum_and_eps() -> None:
    h, _ = rows(2, 0)
    norms = [nn.BatchNorm2d(2, eps=0.5, momentum=0.3) for _ in range(2)]
    stack = Stack([nn.Sequential(copy.deepcopy(norm)) for norm in norms])
    wanted = torch.stack([norm(x) for norm, x in zip(norms, h, strict=True)])
    torch.testing.assert_close(stack(h), wanted)
    for module, norm in zip(stack.modules, norms, strict=True):
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(module.get_buffer(f"0.{name}"), buffer)


def test_only_the_leakyrelu_directly_behind_is_taken_over() -> None:
    def module() -> nn.Module:
        return nn.Sequential(
            nn.LeakyReLU(0.1),
            nn.BatchNorm2d(2),
            nn.Sigmoid(),
            nn.LeakyReLU(0.2),
            nn.Sequential(nn.BatchNorm2d(2), nn.LeakyReLU(0.3)),
            nn.LeakyReLU(0.4),
        )

    modules = [module() for _ in range(2)]
    layers = Stack(modules)._layers
    slopes = [layer.slope for layer in layers if isinstance(layer, StackedBatchNorm2d)]
    assert slopes == [1, 0.3]
    kept = [layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)]
    assert kept == [0.1, 0.2, 0.4]


def test_what_cant_be_stacked_is_named_and_left_alone() -> None:
    plain = [nn.Sequential(nn.Linear(4, 3), nn.GELU()) for _ in range(2)]
    weight = plain[1][0].weight
    with pytest.raises(Unstackable, match=r"torch\.nn\.GELU can't be computed for several"):
        Stack(plain)
    with pytest.raises(Unstackable, match="the layers of module 1 aren't those of the first"):
        Stack([nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(5, 3))])
    assert plain[1][0].weight is weight
    with pytest.raises(Unstackable) as refused:  # csipipe has a Conv2d that can be
        Stack([nn.Conv2d(2, 2, 1)])
    said = str(refused.value)
    assert said.startswith("torch.nn.Conv2d can't be")
    assert "csipipe.models.layers (Conv2d, Linear, Pointwise)" in said
    [of_torch] = re.findall(r"torch\.nn \((.*?)\)", said)
    assert "Linear" in of_torch.split(", ")
    assert "Conv2d" not in of_torch.split(", ")
    assert models.unstackable(MODEL) is None


def run(
    ues: int,
    ranks: int,
    rows: int = 32,
    head: HeadName = "linear",
    device: str = "cpu",
    kernels_by: KernelsBy = "auto",
    **train: Any,
) -> Way:
    settings = Settings(
        model=ModelSettings(angles=16, delays=8, head=head, kernels_by=kernels_by),
        topology=TopologySettings(ues=ues, placement="together", stages=1),
        train=TrainSettings(batch_size=rows, **train),
    )
    return decide(settings, Topology.of(settings, ranks), torch.device(device))


def test_auto_stacks_where_that_is_faster_whatever_the_placement() -> None:
    assert run(64, 1).stacked
    assert run(64, 32).stacked
    assert not run(64, 33).stacked  # one rank has a single UE
    assert not run(4, 1).stacked
    assert not run(64, 1, rows=512).stacked
    assert run(64, 1, rows=16, head="crblock").stacked
    assert not run(64, 1, head="crblock").stacked
    assert run(64, 1, rows=512, stacked="always").stacked
    assert not run(64, 1, stacked="never").stacked
    by_kernels = find_spec("triton") is not None
    assert run(10, 2, rows=512, device="cuda").stacked == by_kernels
    assert not run(4, 1, device="cuda").stacked
    assert not run(10, 1, head="crblock", device="cuda").stacked
    assert not run(10, 1, device="cuda", kernels_by="torch").stacked
    assert run(64, 1).note == (
        "UEs of a rank are computed stacked (train.stacked auto: only 8,192 reals of each in an "
        "iteration)"
    )


def own(angles: int, delays: int, c1: int, c2: int) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """A model of somebody's own, with a layer that can't be stacked."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(2 * angles * delays, c1), nn.GELU())
    head = nn.Sequential(
        nn.Linear(c2, 2 * angles * delays), nn.Unflatten(1, (2, angles, delays)), nn.Sigmoid()
    )
    return encoder, [nn.Linear(c1, c2)], head


def test_a_model_that_cant_be_stacked_is_refused_or_done_without() -> None:
    settings = Settings(
        model=ModelSettings(name=f"{__name__}:own", c1=12, c2=10, angles=6, delays=5),
        topology=TopologySettings(ues=10, stages=1),
    )
    topology, cpu = Topology.of(settings, 2), torch.device("cpu")
    assert decide(settings, topology, cpu).why.startswith("torch.nn.GELU can't be computed for")
    few = replace(settings, topology=replace(settings.topology, ues=4))
    assert decide(few, Topology.of(few, 2), cpu).why == "train.stacked auto: they are few"
    with pytest.raises(ValueError, match=r"train.stacked is always, but model.name .*own can't be"):
        decide(replace(settings, train=TrainSettings(stacked="always")), topology, cpu)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["encoder", "head", "loss"])
@pytest.mark.parametrize("way", [Singly, Stacked])
def test_a_ue_with_no_number_takes_no_step(
    way: type[Singly | Stacked], of: str, value: float
) -> None:
    settings, everyone = Settings(model=MODEL), [0, 1, 2]
    h, noise = rows(3, 0)
    images = h.numpy()
    ues = [UserEquipment(u, settings, images[u], images[u], h.device) for u in everyone]
    ends = way(ues, Probe(), settings.train)
    z = ends.encode(h)
    torch.autograd.backward(ends.heads(noise.requires_grad_(), everyone).sum())
    ends.weight_gradients()
    ends.encode_backward(torch.ones_like(z), everyone)
    loss = torch.rand(3, ROWS)
    if of == "loss":
        loss[1, 3] = value
    elif isinstance(ends, Stacked):
        spoilt = {"encoder": ends._encoders, "head": ends._heads}[of]
        spoilt.gradients()[0][1].view(-1)[0] = value
    else:
        gradient = next(getattr(ues[1], of).parameters()).grad
        gradient.view(-1)[0] = value
    before = [parameter.clone() for ue in ues for parameter in ue.parts.parameters()]
    assert ends.step(everyone, loss, tolerant=True).keys() == {1}
    after = [parameter for ue in ues for parameter in ue.parts.parameters()]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    third = len(same) // 3
    assert all(same[third : 2 * third])
    assert not any(same[:third] + same[2 * third :])
    assert all(parameter.grad is None for parameter in after)
