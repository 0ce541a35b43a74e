"""The quantiser of exported pairs: its levels, the range that it learns, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from csipipe.export.learning import learn
from csipipe.export.quantiser import Quantiser


def test_levels_bits_and_middles_by_hand() -> None:
    quantiser = Quantiser(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 8.0]), bits=2)
    z = torch.tensor([[-0.9, 7.9], [0.1, 2.0], [-5.0, 99.0]])
    bits = quantiser.to_bits(z)
    assert bits.tolist() == [[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1]]
    assert bits.dtype == torch.uint8
    assert quantiser.from_bits(bits).tolist() == [[-0.75, 7.0], [0.25, 3.0], [-0.75, 7.0]]
    assert torch.equal(quantiser.rounded(z), quantiser.from_bits(bits))


@pytest.mark.parametrize("bits", [1, 3, 10, 16])
def test_what_is_inside_is_off_by_half_a_step_at_most(bits: int) -> None:
    z = torch.randn(200, 5, generator=torch.Generator().manual_seed(bits))
    quantiser = Quantiser(z.min(0).values, z.max(0).values, bits)
    code = quantiser.to_bits(z)
    assert code.shape == (200, 5 * bits)
    off = (quantiser.from_bits(code) - z).abs() / quantiser.step
    assert 0.4 < off.max() < 0.5 * (1 + 2**-6)
    assert quantiser.outside(z, code).max() < 1e-6


def test_an_entry_that_never_changes_comes_back() -> None:
    quantiser = Quantiser(torch.tensor([2.0]), torch.tensor([2.0]), 4)
    z = torch.tensor([[2.0]])
    assert quantiser.from_bits(quantiser.to_bits(z)).item() == quantiser.rounded(z).item() == 2.0


def test_other_bits_lie_outside() -> None:
    quantiser = Quantiser(torch.tensor([0.0]), torch.tensor([4.0]), 2)
    z = torch.tensor([[1.25], [9.0], [-9.0]])
    for code, wanted in (
        ([[0, 1], [1, 1], [0, 0]], [0, 0, 0]),
        ([[0, 0], [1, 0], [0, 1]], [0.25, 1, 1]),
        ([[1, 0], [0, 0], [1, 1]], [0.75, 3, 3]),
    ):
        found = quantiser.outside(z, torch.tensor(code, dtype=torch.uint8))
        assert found.flatten().tolist() == wanted


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_the_range_that_is_learned_is_the_best_for_gaussian_entries(
    bits: int, error: float
) -> None:
    # smallest errors of uniform quantisers: J. Max, "Quantizing for minimum distortion", 1960
    z = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    z = z * torch.tensor([0.1, 1.0, 20.0]) + torch.tensor([5.0, 0.0, -7.0])
    found = torch.square(learn(z, bits).rounded(z) - z).mean(0) / z.var(0)
    assert found.mean() == pytest.approx(error, rel=0.03)
    assert found.min() > 0.95 * found.max()  # each entry has its own range


def test_a_range_needs_rows() -> None:
    with pytest.raises(ValueError, match=r"1 training row\(s\)"):
        learn(torch.zeros(1, 4), 4)


@pytest.mark.parametrize("bits", [0, 17])
def test_so_many_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits per entry were requested; expected 1 … 16"):
        Quantiser(torch.zeros(1), torch.ones(1), bits)
