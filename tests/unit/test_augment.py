"""Rows that a UE changes before it trains on them: by hand, and only where that is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import CPU, small
from torch import Tensor

from csipipe import methods
from csipipe.methods import augment
from csipipe.methods.ue import UserEquipment
from csipipe.settings.config import DataSettings, Settings, TrainSettings

H = 0.5 + 0.3 * (torch.rand(64, 2, 5, 3, generator=torch.Generator().manual_seed(0)) - 0.5)


def augmented(h: Tensor, way: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.zeros(augment.DRAWN, len(h), dtype=torch.float64)
    augment.draw((way,), h.shape[2], drawn, generator)
    return augment.augmented(h, (way,), *drawn)


def test_a_shift_turns_every_row_by_angles_of_its_own() -> None:
    found = augmented(H, "angle")
    shifts = {
        next(k for k in range(5) if torch.equal(row, old.roll(k, 1)))
        for row, old in zip(found, H, strict=True)
    }
    assert shifts == set(range(5))


def test_a_phase_leaves_every_magnitude_and_all_relations_within_a_row() -> None:
    found = augmented(H, "phase") - 0.5
    before, after = (torch.complex(h[:, 0], h[:, 1]) for h in (H - 0.5, found))
    torch.testing.assert_close(after.abs(), before.abs(), rtol=1e-5, atol=1e-6)
    turned = after / before
    torch.testing.assert_close(turned, turned[:, :1, :1].expand_as(turned), rtol=1e-3, atol=1e-4)
    assert turned[:, 0, 0].angle().std() > 1
    strong = augmented(torch.ones(64, 2, 1, 1), "phase")
    assert 0 <= strong.min() < strong.max() <= 1


def test_a_ue_changes_what_it_draws_and_nothing_else() -> None:
    plain, both = (small(train={"augment": a}) for a in (None, "angle,phase"))
    [one], test = methods.load(plain, range(1), CPU)
    [other], same = methods.load(both, range(1), CPU)
    assert torch.equal(test, same)
    assert torch.equal(one.holdout, other.holdout)
    first, second = (ue.batch(ue.draw(16)) for ue in (one, other))
    assert not torch.equal(first, second)
    norms = [(h - 0.5).flatten(1).norm(dim=1) for h in (first, second)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)  # the same rows
    images = H.numpy()
    wide = UserEquipment(0, small(train={"augment": "angle"}), images, images, CPU)
    assert set(wide.draw(500)[1].tolist()) == set(range(5))  # angles, and not its 3 delays


def test_the_rate_of_a_part_is_the_rate_times_its_factor() -> None:
    settings = small(train={"rates": (0.5, 2.0, 4.0), "lr_schedule": "constant", "lr": 0.1})
    [ue], _ = methods.load(settings, range(1), CPU)
    methods.base.set_rate(ue.optimizer, 0.2)
    assert [g["lr"] for g in ue.optimizer.param_groups] == [0.1, 0.8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": "delay"}, "train.augment is 'delay'; expected angle or phase"),
        ({"augment": ""}, "train.augment is ''; expected"),
        ({"rates": (1.0, 0.0, 1.0)}, "train.rates is .*must be positive"),
    ],
)
def test_what_can_not_be_done_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TrainSettings(), **change)  # type: ignore[arg-type]


def test_ports_are_no_angles() -> None:
    with pytest.raises(ValueError, match="have no angles that could be shifted"):
        Settings(data=DataSettings(kind="eigenvectors"), train=TrainSettings(augment="angle"))
