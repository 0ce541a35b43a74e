"""A user's own model and another cut: what is refused, what crosses, what random layers draw."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from randommodel import build
from torch import Tensor, nn

from csipipe import models
from csipipe.models.draws import COUNT, Reseed, Watch
from csipipe.settings.config import ModelSettings
from csipipe.settings.tables import MODELS, ModelSpec

RANDOM = ModelSettings(name="owned:random", c1=12, angles=6, delays=4, kernels_by="torch")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("function_as_layer", "tail can't be .* layer 0 is a function; expected"),
        ("no_list", "tail can't be .* it is a Linear; the tail must be a list of layers"),
        ("nothing_to_train", "encoder can't be .* it has no parameters to train"),
        ("half", "parameter 0.weight is torch.float16; parameters must be float32"),
        ("strange_buffer", "buffer 0.mask is torch.bool; buffers must be float32, or int64"),
        ("own_generator", "tail can't be .* draws from a generator of its own"),
        ("held_twice", "encoder.2.weight and encoder.4.weight are the same parameter; parts and"),
        ("shared_in_tail", "tail.0.weight and tail.1.0.weight are the same parameter"),
        ("tied", "encoder.2.bias and tail.5.bias are the same parameter"),
        ("shared_buffer", "tail.1.running_mean and tail.3.running_mean are the same buffer"),
        ("wide", r"tail makes \(3, 4\) from a row of shape \(12,\); it must be \(reals,\)"),
    ],
)
def test_what_cannot_be_trained_is_named(function: str, message: str) -> None:
    model = dataclasses.replace(RANDOM, name=f"owned:{function}")
    with pytest.raises(
        ValueError, match=f"model.name is 'owned:{function}', whose {message}|{message}"
    ):
        models.check(model)


def test_what_is_held_once_may_be_called_twice() -> None:
    models.check(dataclasses.replace(RANDOM, name="owned:called_twice"))


def test_more_stages_than_layers_with_parameters_are_refused() -> None:
    models.check_stages(RANDOM, 5)
    with pytest.raises(ValueError, match=r"stages is 6, but only 5 layer\(s\) of the tail"):
        models.check_stages(RANDOM, 6)


# Random layers


def tail(ue: int | None = None) -> list[nn.Module]:
    layers = models.build_tail(RANDOM, 3)
    if ue is not None:
        models.belong(layers, ue)
    return layers


def test_only_random_layers_are_counted() -> None:
    models.check(RANDOM)
    counted = [COUNT in dict(layer.named_buffers()) for layer in tail()]
    assert counted == [False, False, True, True, False, False]
    hooks = [hook for layer in tail() for hook in layer._forward_pre_hooks.values()]
    seeds = [hook.key for hook in hooks if isinstance(hook, Reseed)]
    assert len(seeds) == len(set(seeds)) == 2  # no two draw the same
    encoder, head = models.build_encoder(RANDOM, 0), models.build_head(RANDOM, 0)
    assert COUNT in encoder.state_dict()
    assert COUNT in head.state_dict()


def part_of(number: int, model: ModelSettings) -> Any:
    return build(*model.image[1:], model.c1, model.c2)[number]


random_encoder, random_tail, random_head = (partial(part_of, n) for n in range(3))


@pytest.mark.parametrize("angles", [6, 200], ids=["computed", "without values"])
def test_random_layers_of_a_row_are_counted_too(
    angles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, Any] = {p: f"{__name__}:random_{p}" for p in ("encoder", "tail", "head")}
    row = ModelSpec(about="random", partition="uniform", own_c2=True, **parts)
    monkeypatch.setitem(MODELS, "random", row)
    model = dataclasses.replace(
        RANDOM, name="random", angles=angles, delays=4 if angles == 6 else 200
    )
    models.check(model)
    state = torch.get_rng_state()
    counted = [models.draws(layer) for layer in models.build_tail(model, 0)]
    assert counted == [False, False, True, True, False, False]
    assert models.draws(models.build_encoder(model, 0))
    assert models.draws(models.build_head(model, 0))
    assert torch.equal(torch.get_rng_state(), state)


def tail_of_one_block(model: ModelSettings) -> list[nn.Module]:
    first, *_, last = part_of(1, model)
    block = nn.Linear(40, 40)
    return [first, block, nn.ReLU(), block, last]


def test_a_row_whose_tail_has_a_layer_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, Any] = {p: f"{__name__}:random_{p}" for p in ("encoder", "head")}
    tail = f"{__name__}:tail_of_one_block"
    row = ModelSpec(about="random", partition="uniform", own_c2=True, tail=tail, **parts)
    monkeypatch.setitem(MODELS, "twice", row)
    with pytest.raises(
        ValueError, match=r"'twice', whose tail.1.weight and tail.3.weight are the same"
    ):
        models.check(dataclasses.replace(RANDOM, name="twice"))


def run(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer.train()(x)
    return x.detach()


def test_draws_depend_on_seed_layer_ue_and_count_alone() -> None:
    x = torch.ones(5, 12)
    one, same, other, another = tail(), tail(), tail(ue=1), tail(ue=2)
    torch.manual_seed(1)
    first, second = run(one, x), run(one, x)
    torch.manual_seed(2)
    assert torch.equal(run(same, x), first)
    assert not torch.equal(second, first)
    theirs = run(other, x)
    assert not torch.equal(theirs, first)
    assert not torch.equal(theirs, run(another, x))
    again = tail()
    for layer, trained in zip(again, same, strict=True):
        layer.load_state_dict(trained.state_dict())
    assert torch.equal(run(again, x)[:, :1], run(same, x)[:, :1])
    model = nn.Sequential(*one).eval()
    count = int(one[2].get_buffer(COUNT))
    assert torch.equal(model(x), model(x))
    assert int(one[2].get_buffer(COUNT)) == count == 2


@pytest.mark.parametrize("name", MODELS)
def test_no_model_of_the_table_draws(name: str) -> None:
    model = ModelSettings(name=name, c1=12, angles=6, delays=4, kernels_by="torch")
    layers = [
        models.build_encoder(model, 0),
        *models.build_tail(model, 0),
        models.build_head(model, 0),
    ]
    h = torch.rand(4, 2, 6, 4)
    with Watch() as watch:
        run(layers, h)
    assert not watch.drawn


# Another cut


def parts(model: ModelSettings) -> nn.Sequential:
    return nn.Sequential(
        models.build_encoder(model, 0),
        nn.Sequential(*models.build_tail(model, 0)),
        models.build_head(model, 0),
    ).eval()


@pytest.mark.parametrize(
    ("name", "split", "widths"),
    [
        ("csilocal", (1, 10), (48, 48)),  # an image crosses both ways
        ("csilocal", (5, 13), (12, 12)),  # the model's own
        ("crnet", (6, 12), (12, 48)),
        ("transnet", (3, 10), (48, 96)),  # what a decoder layer remembers crosses too
        ("linear", (2, 5), (12, 48)),
    ],
)
def test_another_cut_computes_the_same(
    name: str, split: tuple[int, int], widths: tuple[int, int]
) -> None:
    own = ModelSettings(name=name, c1=12, angles=6, delays=4, kernels_by="torch")
    moved = dataclasses.replace(own, split=split)
    models.check(moved)
    assert models.widths(moved) == widths
    x = torch.rand(3, 2, 6, 4)
    assert torch.equal(parts(moved)(x), parts(own)(x))
    counts = models.count_parts(moved)
    assert sum(counts.values()) == sum(models.count_parts(own).values())
    if name == "csilocal" and split == (5, 13):
        assert parts(moved).state_dict().keys() == parts(own).state_dict().keys()
        assert counts == models.count_parts(own)


@pytest.mark.parametrize("split", [(0, 3), (3, 3), (4, 2), (3, 9)])
def test_a_cut_that_is_not_there_is_refused(split: tuple[int, int]) -> None:
    model = ModelSettings(name="linear", c1=12, angles=6, delays=4, split=split)
    with pytest.raises(ValueError, match=r"^model.split is .*1 ≤ i < j ≤ 5.*1 Linear, 2 Linear"):
        models.check(model)


def test_a_cut_that_leaves_the_encoder_without_parameters_is_refused() -> None:
    model = ModelSettings(name="linear", c1=12, angles=6, delays=4, split=(1, 4))
    with pytest.raises(ValueError, match=r"encoder can't be .* it has no parameters to train"):
        models.check(model)


def test_layers_that_cannot_put_off_weight_gradients_are_known() -> None:
    assert models.whole_backward(tail()) == ["Linear"]
    for name in MODELS:
        model = ModelSettings(name=name, c1=12, angles=6, delays=4)
        assert models.whole_backward(models.build_tail(model, 0)) == []
