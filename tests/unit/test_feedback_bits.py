"""What a number of feedback bits gains without a network: PCA, strongest bins, 3GPP's codebook."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trainedruns
from torch import Tensor

from csipipe.channels import planar
from csipipe.channels.eigenvectors import images_of, to_image
from csipipe.channels.scene import Scene
from csipipe.evaluation import baselines, codebook, command
from csipipe.evaluation.codebook import Codebook, Report
from csipipe.measure.metrics import centred_nmse, column_sgcs
from csipipe.settings.commandline import RunParser


def sgcs(v_hat: Tensor, v: Tensor) -> Tensor:
    """(B, P, S) twice → (B,)."""
    inner = (v_hat.conj() * v).sum(1).abs().square()
    return (inner / v_hat.abs().square().sum(1) / v.abs().square().sum(1)).mean(1)


def eigenvectors(columns: int, rows: int, subbands: int = 13) -> Tensor:
    """(64, P, S) of our own clusters outdoors."""
    scene = Scene(columns=columns, rows=rows, polarisations=2, subcarriers=52)
    return torch.from_numpy(images_of(planar.block(scene, "outdoor", 1)[:, 0], subbands))


def drawn(book: Codebook, count: int) -> Report:
    """Reports that are allowed, drawn evenly."""
    rng = torch.Generator().manual_seed(0)
    beams = math.prod((book.columns, book.rows))
    shape = (count, 2 * book.beams, book.taps)
    amplitude = torch.randint(4, 8, shape, generator=rng)
    phase = torch.randint(0, 16, shape, generator=rng)
    order = torch.rand(shape, generator=rng).flatten(1).argsort(1).argsort(1).view(shape)
    amplitude = torch.where(order < book.most, amplitude, -1)
    reference = torch.randint(5, 15, (count, 2), generator=rng)
    top = torch.rand(count, 2 * book.beams, generator=rng).argmax(1)
    every = torch.arange(count)
    free = (amplitude[every, top, 0] < 0).nonzero()[:, 0]  # one more is reported, one less
    last = (order == book.most - 1).nonzero()
    drop = {int(b): (int(i), int(m)) for b, i, m in last}
    for b in free.tolist():
        amplitude[b, drop[b][0], drop[b][1]] = -1
    amplitude[every, top, 0], phase[every, top, 0] = 7, 0
    reference[every, top // book.beams] = 15

    def rising(first: int, last: int, size: int) -> Tensor:
        pool = range(first, last)
        picks = [rng_sorted(pool, size, rng) for _ in range(count)]
        return torch.tensor(picks).reshape(count, size)

    taps = torch.cat([torch.zeros(count, 1).long(), rising(1, book.subbands, book.taps - 1)], 1)
    rotation = torch.randint(0, len(book.beams_QNn), (count,), generator=rng)
    chosen = rising(0, beams, book.beams)
    return Report(rotation, chosen, taps, reference, amplitude, phase)


def rng_sorted(pool: range, size: int, rng: torch.Generator) -> list[int]:
    return sorted(pool[i] for i in torch.randperm(len(pool), generator=rng)[:size].tolist())


@pytest.mark.parametrize(("columns", "rows", "number"), [(4, 2, 1), (4, 2, 6), (4, 4, 8)])
def test_what_the_codebook_holds_is_found_in_it(columns: int, rows: int, number: int) -> None:
    book = Codebook(columns, rows, 13, number)
    report = drawn(book, 40)
    # of the first tap alone: with several, a subband's norm, which no report holds, matters too
    report.amplitude[:, :, 1:] = -1
    precoders = book.decode(report)
    again = book.decode(book.encode(precoders))
    assert sgcs(again, precoders).min() > 0.97  # what is left: amplitudes of two stages
    assert sgcs(again, precoders).mean() > 0.995


def test_every_field_of_a_report_matters() -> None:
    book = Codebook(4, 2, 13, 4)
    report = book.encode(eigenvectors(4, 2))
    whole = book.decode(report)
    for name, change in (
        ("rotation", (report.rotation + 1) % 16),
        ("taps", (report.taps + 1) % 13 * (report.taps > 0)),
        ("reference", report.reference.clamp(max=9)),
        ("phase", (report.phase + 4) % 16 * (report.phase > 0)),
        ("amplitude", torch.where(report.amplitude == 7, 7, -1)),
    ):
        other = Report(**{**vars(report), name: change})
        assert sgcs(book.decode(other), whole).mean() < 0.999, name


@pytest.mark.parametrize("number", [1, 2])
def test_the_choice_is_close_to_the_best_of_all_reports(number: int) -> None:
    """4 ports, 4 subbands, one tap: few enough reports to try them all."""
    book = Codebook(2, 1, 4, number)
    assert (book.beams, book.taps, book.most) == (2, 1, number)
    v = eigenvectors(2, 1, 4)[:12]
    found = sgcs(book.decode(book.encode(v)), v)
    amplitudes, phases, references = [], [], []
    for top in range(4):
        for other in range(4):
            for size, phase, reference in itertools.product(range(8), range(16), range(1, 16)):
                same = other // 2 == top // 2
                if (number == 1 or other == top) and (size, phase, reference) != (0, 0, 1):
                    continue  # the strongest coefficient alone
                if same and reference != 1:
                    continue  # its polarisation has the full amplitude
                a, c = [-1] * 4, [0] * 4
                if other != top and number > 1:
                    a[other], c[other] = size, phase
                a[top], c[top] = 7, 0
                amplitudes.append(a)
                phases.append(c)
                references.append([15 if top // 2 == p else reference for p in range(2)])
    count = len(amplitudes)
    shape = (count, 4, 1)
    best = torch.zeros(len(v))
    for q in range(4):
        every = book.decode(
            Report(
                torch.full((count,), q),
                torch.tensor([[0, 1]]).expand(count, 2),
                torch.zeros(count, 1).long(),
                torch.tensor(references),
                torch.tensor(amplitudes).view(shape),
                torch.tensor(phases).view(shape),
            )
        )
        for i, one in enumerate(v):
            best[i] = max(best[i], sgcs(every, one.expand(count, -1, -1)).max())
    assert (found <= best + 1e-5).all()
    assert (found.mean() / best.mean()).item() > 0.97


def test_bits_are_the_specifications() -> None:
    # by hand, N1 = 4, N2 = 2, 13 subbands, combination 4: L = 4, M = 4, K0 = 16
    book = Codebook(4, 2, 13, 4)
    report = drawn(book, 10)
    counts = (report.amplitude >= 0).flatten(1).sum(1)
    for bits, count in zip(book.bits(report).tolist(), counts.tolist(), strict=True):
        # rotation 16; C(8, 4) = 70; C(12, 3) = 220; bitmap 8 x 4; strongest; reference; part 1
        by_hand = 4 + 7 + 8 + 32 + math.ceil(math.log2(count)) + 4 + 4
        assert bits == by_hand + 3 * (count - 1) + 4 * (count - 1)
    # more than 19 subbands: a window of 2M = 10 taps, C(9, 4) = 126; L = 2, K0 = 5
    wide = Codebook(4, 1, 20, 1)
    one = wide.encode(eigenvectors(4, 1, 20))
    count = (one.amplitude >= 0).flatten(1).sum(1)
    rest = torch.tensor([(int(c) - 1).bit_length() for c in count]) + 7 * (count - 1)
    assert (wide.bits(one) - rest == 2 + 3 + 4 + 7 + 20 + 4 + 3).all()


def test_combinations_are_the_specifications() -> None:
    """L, M and K0 with 13 subbands, by Table 5.2.2.2.5-1 of TS 38.214."""
    books = [Codebook(4, 4, 13, number) for number in range(1, 9)]
    assert [(book.beams, book.taps, book.most) for book in books] == [
        *((2, 4, 4), (2, 4, 8), (4, 4, 8), (4, 4, 16)),
        *((4, 4, 24), (4, 7, 28), (6, 4, 24), (6, 4, 36)),
    ]


def test_taps_of_many_subbands_are_inside_a_window() -> None:
    book = Codebook(4, 1, 26, 3)
    taps = book.encode(eigenvectors(4, 1, 26)).taps
    assert (taps[:, 0] == 0).all()
    for row in taps.tolist():
        fits = [all((t - start) % 26 < 2 * book.taps for t in row) for start in range(26)]
        assert any(fits)


def test_more_bits_are_better_and_no_phase_matters() -> None:
    v = eigenvectors(4, 2)
    last = 0.0
    for number in (1, 3, 4, 5, 6):
        book = Codebook(4, 2, 13, number)
        found = float(sgcs(book.decode(book.encode(v)), v).mean())
        assert found > last
        last = found
    turned = v * torch.exp(1j * torch.rand(64, 1, 13, generator=torch.Generator().manual_seed(1)))
    assert float(sgcs(book.decode(book.encode(3 * turned)), v).mean()) == pytest.approx(
        last, abs=3e-3
    )
    h = torch.from_numpy(to_image(v.numpy()))
    assert float(column_sgcs(book(h), h).mean()) == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize(
    ("columns", "rows", "number", "what"),
    [(5, 1, 1, "isn't defined for 5x1"), (2, 1, 3, "one of 1, 2"), (4, 2, 7, "16 ports")],
)
def test_what_the_codebook_is_not_defined_for(
    columns: int, rows: int, number: int, what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        Codebook(columns, rows, 13, number)
    assert number not in codebook.allowed(columns, rows) or (columns, rows) not in codebook.ARRAYS


# PCA and strongest bins


def clusters(count: int, seed: int) -> Tensor:
    """Images whose reals have very different variances, 4 x 4."""
    rng = np.random.default_rng(seed)
    scale = 0.2 * 0.7 ** np.arange(32)
    rows = 0.5 + rng.normal(size=(count, 32)) * scale
    return torch.from_numpy(rows.reshape(count, 2, 4, 4)).float()


def nmse(coder: torch.nn.Module, h: Tensor) -> float:
    return float(centred_nmse(coder(h), h).mean())


def test_pca_spends_bits_where_they_gain_most_and_the_rate_is_a_quantisers() -> None:
    pca = baselines.Pca(clusters(2000, 0))
    test = clusters(500, 1)
    found = [nmse(pca.with_bits(bits), test) for bits in (0, 8, 16, 32, 64, 128)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1, abs=0.05)
    coder = pca.with_bits(32)
    levels = coder.levels.log2().int().tolist()
    assert sum(levels) == 32
    assert levels[0] == max(levels)
    # a Gaussian's bits: log2 of the ratio of deviations; steps of whole bits
    for k in range(3):
        assert levels[k] - levels[k + 3] == pytest.approx(3 * math.log2(1 / 0.7), abs=1.6)
    values = {
        len(column.unique()) for column in ((coder(test) - 0.5).flatten(1) @ pca.components).T
    }
    assert max(values) >= 2 ** levels[0] / 2
    z, z_hat = ((h.flatten(1) - pca.mean) @ pca.components for h in (test, coder(test)))
    for k, bits in enumerate(levels):
        wanted = pca.quantisers[bits - 1].rounded(z)[:, k]
        torch.testing.assert_close(z_hat[:, k], wanted, atol=1e-5, rtol=0)


def test_strongest_bins_cost_their_places_and_are_exact_without_quantisation() -> None:
    h = torch.full((4, 2, 4, 4), 0.5)
    h[:, 0, 1, 2], h[:, 1, 1, 2], h[:, 0, 3, 3] = 0.9, 0.2, 0.6
    coder = baselines.TopBins(h, 2, 10)
    torch.testing.assert_close(coder(h), h, atol=2e-3, rtol=0)
    assert baselines.top_bins(h, 5) is None  # 4 for the place, 2 for a bit of each real
    found = baselines.top_bins(h, 40)
    assert found is not None
    used, coder = found
    k, b = coder.bins, coder.quantiser.bits
    assert used == math.ceil(math.log2(math.comb(16, k))) + 2 * k * b <= 40
    test = clusters(300, 3)
    rates = [nmse(one[1], test) for n in (20, 60, 150) if (one := baselines.top_bins(test, n))]
    assert rates == sorted(rates, reverse=True)


def test_evaluate_counts_bits_beside_the_model(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run", data={"test_samples": 40, "train_samples": 200})
    parser = RunParser("evaluate", "")
    command.add_arguments(parser)
    options, settings = parser.parse([str(tmp_path / "run"), "--bits"])
    command.run(options, settings, None)
    out = tmp_path / "run" / "evaluation"
    points = json.loads((out / "figures.json").read_text())["bits"]
    of = {what: [p for p in points if p["what"] == what] for what in ("run", "PCA", "top bins")}
    assert [p["bits"] for p in of["run"]] == [24 * b for b in (1, 2, 3, 4, 6, 8)]
    assert [p["bits"] for p in of["PCA"]] == [p["bits"] for p in of["run"]]
    assert all(0 <= p["sgcs"] <= 1 for p in points)
    assert (out / "bits.png").stat().st_size > 1000
    assert len((out / "bits.csv").read_text().splitlines()) == 1 + len(points)
    assert "top bins" in (out / "table.txt").read_text()
