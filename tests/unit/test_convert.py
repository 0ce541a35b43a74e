"""Arrays of other programs become rows to train on; what can't is refused by name."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from csifiles import channels, save_v73
from numpy.typing import NDArray
from scipy import io

from csipipe.channels import convert as converting
from csipipe.channels import (
    dealt,
    eigenvectors,
    inputs,
    open_source,
    rawarray,
    statistics,
    transform,
)
from csipipe.channels.axes import parse
from csipipe.channels.command import main
from csipipe.channels.format import Description
from csipipe.channels.inputs import Input, Plan
from csipipe.channels.reading import example, guess
from csipipe.channels.source import Part, Source
from csipipe.measure import metrics
from csipipe.settings import commandline
from csipipe.settings.config import DataSettings

PARTS: tuple[Part, ...] = ("train", "test")
N, R, P, K = 60, 2, 8, 48  # as csifiles.channels makes them


def saved(path: Path, values: Any) -> Path:
    np.save(path, values, allow_pickle=True)
    return path


def source(folder: Path) -> Source:
    return open_source(DataSettings(source="files", path=str(folder)))


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(*words) == 1
    return capsys.readouterr().err


def everything(folder: Path) -> NDArray[np.float32]:
    """All images of a folder, in the order of its files."""
    said = Description.read(folder)
    return np.concatenate([np.load(folder / one.images.name) for one in said.sets])


def again(folder: Path, part: str, planar: tuple[int, int, int] | None = None) -> Any:
    """Channels (n, P, K) from images: every step but the truncation, backwards."""
    said = Description.read(folder)
    [one] = said.of("all", part)
    assert one.scale is not None
    images = np.load(folder / one.images.name) - np.float32(0.5)
    scale = np.load(folder / one.scale.name)
    c = (images[:, 0] + 1j * images[:, 1]) * scale[:, None, None]
    columns, rows, pol = planar or (said.angles, 1, 1)
    grid = c.reshape(len(c), pol, columns, rows, -1)
    antennas = np.fft.ifftn(grid, axes=(2, 3)).reshape(c.shape) * said.angles
    full = np.zeros((*c.shape[:2], said.subcarriers or said.delays), np.complex128)
    full[..., : said.delays] = antennas
    return np.fft.fft(np.roll(full, -said.shift, axis=-1), axis=-1)


def test_every_step_but_the_truncation_can_be_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BLOCK", 40_000)  # several blocks
    h = channels(rx=1)[:, 0]
    h[0] *= 3  # the largest is in the first
    file = saved(tmp_path / "h.npy", h)
    for number, extra in enumerate(([], ["--shift", "5"], ["--scaling", "set"])):
        out = tmp_path / f"out{number}"
        whole = ["--axes", "sample tx subcarrier", "--delays", K, "--sets", "test"]
        assert run(file, out, *whole, *extra) == 0
        np.testing.assert_allclose(again(out, "test"), h, atol=1e-4)
        opened = source(out)
        rows, hf = opened.rows("all", "test", 0, N), opened.frequency_rows("all", "test", 0, N)
        assert not isinstance(hf, str)
        found = metrics.to_frequency(torch.from_numpy(rows), K, opened.padded)
        np.testing.assert_allclose(metrics.rho(found, torch.from_numpy(hf)), 1, atol=1e-4)
    peaks = np.abs(everything(out) - 0.5).reshape(N, 2, -1)
    assert np.square(peaks).sum(1).max(1).max() == pytest.approx(0.25, rel=1e-3)
    assert np.square(peaks).sum(1).max(1).min() < 0.2


def test_rows_of_which_a_common_scale_leaves_nothing_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = channels(rx=1)[:, 0]
    h[3] *= 1e-9
    file = saved(tmp_path / "h.npy", h)
    line = ["--axes", "sample tx subcarrier", "--sets", "test"]
    for number, (extra, left) in enumerate([([], N), (["--scaling", "set"], N - 1)]):
        assert run(file, tmp_path / f"out{number}", *line, *extra) == 0
        assert len(source(tmp_path / f"out{number}").rows("all", "test", 0, left)) == left
    assert "dropped: 1 rows without energy" in capsys.readouterr().out


@pytest.mark.parametrize("axes", ["sample tx delay", "sample angle subcarrier"])
def test_half_of_a_transform_that_was_done_is_not_done_again(axes: str, tmp_path: Path) -> None:
    h = channels(rx=1)[:, 0]
    # a DFT over ports is divided by their number
    half = np.fft.ifft(h) if "delay" in axes else np.fft.fft(h, axis=1) / P
    usual, done = saved(tmp_path / "h.npy", h), saved(tmp_path / "half.npy", half)
    assert run(usual, tmp_path / "a", "--axes", "sample tx subcarrier", "--sets", "test") == 0
    assert run(done, tmp_path / "b", "--axes", axes, "--sets", "test") == 0
    np.testing.assert_allclose(everything(tmp_path / "b"), everything(tmp_path / "a"), atol=1e-5)


def test_truncation_says_what_it_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h = channels(rx=1)
    delays = np.fft.ifft(h, axis=-1)
    power = np.square(np.abs(delays))
    share = power[..., :6].sum((1, 2, 3)) / power.sum((1, 2, 3))
    file = saved(tmp_path / "h.npy", h)
    assert run(file, tmp_path / "o", "--axes", "sample rx tx subcarrier", "--delays", 6) == 0
    said = Description.read(tmp_path / "o")
    assert said.made["energy_lost"] == pytest.approx(1 - share.mean(), rel=1e-4)
    assert f"{1 - share.mean():.2%} of a row's energy lost; with another" in capsys.readouterr().out
    hf = source(tmp_path / "o").frequency_rows("all", "test", 0, 6)
    assert not isinstance(hf, str)
    assert hf.shape == (6, P, K)


def test_the_line_for_a_better_shift_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = channels() * np.exp(2j * np.pi * np.arange(K) / K * 3).astype(np.complex64)
    for number, (h, words) in enumerate([(early, []), (channels(), ["--shift", "9"])]):
        file, out = saved(tmp_path / f"h {number}.npy", h), tmp_path / f"out {number}"
        words += ["--axes", "sample rx tx subcarrier", "--delays", "12", "--ues=true"]
        words += ["--split", "0.5/0.5", "--scaling=set", "--array", "4x2"]
        assert run(file, out, *words) == 0
        said = capsys.readouterr().out
        found = re.search(r"with another shift it would be ([\d.]+%):\n +(.*)", said)
        assert found is not None
        assert "--seed" not in found[2]
        assert main(shlex.split(found[2])[4:]) == 0
        assert f", {found[1]} of a row's energy lost\n" in capsys.readouterr().out
        [other] = tmp_path.glob(f"out {number}-shift*")
        one, two = Description.read(out), Description.read(other)
        assert one.shift != two.shift
        assert replace(one, shift=two.shift, sets=two.sets, made=two.made) == two
        assert [s.rows for s in one.sets] == [s.rows for s in two.sets]


def test_planar_arrays_have_a_dft_in_two_directions(tmp_path: Path) -> None:
    columns, rows, pol = 4, 2, 2
    h = channels(rx=1, ports=16)[:, 0]
    file = saved(tmp_path / "h.npy", h)
    options = ["--axes", "sample tx subcarrier", "--delays", K, "--sets", "train"]
    assert run(file, tmp_path / "a", "--array", "4x2x2", *options) == 0
    np.testing.assert_allclose(again(tmp_path / "a", "train", (columns, rows, pol)), h, atol=1e-4)
    # the same ports, numbered another way
    other = h.reshape(N, pol, columns, rows, K).transpose(0, 3, 2, 1, 4).reshape(h.shape)
    file = saved(tmp_path / "other.npy", other)
    words = ["--array", "4x2x2", "--ports", "row column polarisation", *options]
    assert run(file, tmp_path / "b", *words) == 0
    np.testing.assert_array_equal(everything(tmp_path / "a"), everything(tmp_path / "b"))


def forms(h: Any, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """The same channels (n, rx, P, K) as other programs store them."""
    pairs = np.stack([h.real, h.imag], -1)
    np.savez(folder / "a.npz", other=np.arange(3), H=h)
    np.savez_compressed(folder / "z.npz", H=h)
    torch.save(torch.from_numpy(h), folder / "a.pt")
    torch.save({"H": torch.from_numpy(pairs)}, folder / "b.pt")
    io.savemat(folder / "v5.mat", {"H": h})
    io.savemat(folder / "last.mat", {"H": h.transpose(1, 2, 3, 0)}, do_compression=True)
    save_v73(folder / "v73.mat", h, "X_train", chunks=(5, P, R, 7))
    with h5py.File(folder / "a.h5", "w") as file:
        file["H"] = h
    with h5py.File(folder / "octave.h5", "w") as file:
        turned = np.empty(h.T.shape, [("real", "f8"), ("imag", "f8")])
        turned["real"], turned["imag"] = h.T.real, h.T.imag
        file.create_group("H").create_dataset("value", data=turned)
    np.savetxt(folder / "a.csv", pairs.reshape(len(h), -1), delimiter=",", fmt="%.9g")
    usual = ["--axes", "sample rx tx subcarrier"]
    return {
        "npz": (folder / "a.npz", [*usual, "--key", "H"]),
        "npz, deflated": (folder / "z.npz", usual),
        "pt": (folder / "a.pt", usual),
        "pt, pairs": (folder / "b.pt", ["--axes", "sample rx tx subcarrier part"]),
        "pairs first": (
            saved(folder / "f.npy", np.moveaxis(pairs, -1, 0)),
            ["--axes", "part sample rx tx subcarrier"],
        ),
        "doubles in Fortran's order": (
            saved(folder / "d.npy", np.asfortranarray(h.astype(complex))),
            usual,
        ),
        "MAT v5": (folder / "v5.mat", usual),
        "MAT v5, samples last": (folder / "last.mat", ["--axes", "rx tx subcarrier sample"]),
        "MAT v7.3": (folder / "v73.mat", usual),
        "HDF5": (folder / "a.h5", usual),
        "Octave": (folder / "octave.h5", usual),
        "csv": (
            folder / "a.csv",
            ["--axes", f"(sample) (rx={R} tx={P} subcarrier={K} part)"],
        ),
        "Sionna": (
            saved(folder / "s.npy", h[:, None, :, None, :, None]),
            ["--axes", "user user rx bts tx time subcarrier"],
        ),
        "MATLAB's two dimensions": (
            saved(folder / "m.npy", h.reshape(len(h), -1)),
            ["--axes", f"sample (rx={R} tx subcarrier={K})"],
        ),
    }


def test_every_form_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "BLOCK", 40_000)  # several blocks
    h = channels()
    file = saved(tmp_path / "h.npy", h)
    assert run(file, tmp_path / "first", "--axes", "sample rx tx subcarrier") == 0
    expected = everything(tmp_path / "first")
    assert len(expected) == N * R
    for number, (name, (path, options)) in enumerate(forms(h, tmp_path).items()):
        assert run(path, tmp_path / f"out{number}", *options) == 0, name
        found = everything(tmp_path / f"out{number}")
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=name)
        shares = Description.read(tmp_path / f"out{number}").made["users"]
        assert shares == N, name


def test_delays_and_angles_are_taken_as_they_are(tmp_path: Path) -> None:
    h = channels(rx=1)[:, 0]
    usual = saved(tmp_path / "h.npy", h)
    words = ["--delays", 20, "--sets", "test"]
    assert run(usual, tmp_path / "a", "--axes", "sample tx subcarrier", *words) == 0
    image = np.fft.fft(np.fft.ifft(h, axis=2), axis=1) / P
    file = saved(tmp_path / "i.npy", image)
    assert run(file, tmp_path / "b", "--axes", "sample angle delay", *words) == 0
    np.testing.assert_allclose(everything(tmp_path / "a"), everything(tmp_path / "b"), atol=1e-5)
    rows: list[Any] = [source(tmp_path / n).frequency_rows("all", "test", 0, N) for n in "ab"]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)
    # CsiNet's rows: what is truncated already can't be compared with what it was
    scaled = np.stack([image.real, image.imag], 1) / (2 * np.abs(image).max()) + 0.5
    file = saved(tmp_path / "c.npy", scaled.reshape(N, -1).astype("f4"))
    axes = f"sample (part angle={P} delay={K})"
    assert run(file, tmp_path / "c", "--axes", axes, "--delays", K, "--sets", "test") == 0
    assert isinstance(source(tmp_path / "c").frequency_rows("all", "test", 0, N), str)
    assert Description.read(tmp_path / "c").made["sources"][0]["offset"] == 0.5


@pytest.mark.parametrize(
    ("dtype", "middle", "height", "offset"),
    [
        ("u1", 128, 100, 128),
        ("i1", 0, 100, 0.5),
        ("i2", 0, 30_000, 5000),
        ("i4", 2**30, 1e4, 2**30),  # more digits than float32 has
    ],
)
def test_integers_with_an_offset_are_the_same_as_reals(
    tmp_path: Path, dtype: str, middle: int, height: float, offset: float
) -> None:
    h = channels(20, 1)[:, 0]
    pairs = np.stack([h.real, h.imag], -1)
    values = middle + np.rint(pairs / np.abs(pairs).max() * height)
    words = ["--axes", "sample tx subcarrier part", "--sets", "test", "--offset", offset]
    for name, kind in (("integers", dtype), ("reals", "f8")):
        file = saved(tmp_path / f"{name}.npy", values.astype(kind))
        assert run(file, tmp_path / name, *words) == 0
    expected = everything(tmp_path / "reals")
    np.testing.assert_allclose(everything(tmp_path / "integers"), expected, atol=1e-6)


def test_no_user_is_on_both_sides(tmp_path: Path) -> None:
    h = channels()
    h *= np.arange(1, N + 1)[:, None, None, None] * 1000  # the scale says whose row it is
    h /= np.abs(h).max(axis=(2, 3), keepdims=True) / np.arange(1, N + 1)[:, None, None, None]
    file = saved(tmp_path / "h.npy", h)
    axes, whole = "sample rx tx subcarrier", ["--delays", K, "--shift", 0]
    peaks = {}
    for seed in (0, 1):
        out = tmp_path / f"o{seed}"
        assert (
            run(file, out, "--axes", axes, "--split", "0.5/0.25/0.25", "--seed", seed, *whole) == 0
        )
        users = {}
        for part in ("train", "val", "test"):
            found = np.abs(again(out, part)).max(axis=(1, 2))
            numbers = np.rint(found).astype(int)
            users[part] = set(numbers)
            assert len(numbers) == R * len(users[part])
            [one] = Description.read(out).of("all", part)
            assert one.user is not None
            np.testing.assert_array_equal(np.load(out / one.user.name), numbers - 1)
        assert [len(u) for u in users.values()] == [30, 15, 15]
        assert len(set.union(*users.values())) == N
        peaks[seed] = users["test"]
    assert peaks[0] != peaks[1]


def test_users_of_another_file_are_other_ones(tmp_path: Path) -> None:
    file = saved(tmp_path / "h.npy", channels())
    words = ["--axes", "sample rx tx subcarrier", "--sets", "train val"]
    for name, more, rows in (("rx", [], R), ("vectors", ["--eigenvectors", "true"], 1)):
        assert run(file, file, tmp_path / name, *words, *more) == 0
        stored = [one.user for one in Description.read(tmp_path / name).sets]
        users = np.concatenate([np.load(tmp_path / name / one.name) for one in stored if one])
        np.testing.assert_array_equal(users, np.repeat(np.arange(2 * N), rows))


def test_receive_antennas_and_time(tmp_path: Path) -> None:
    h = channels(rx=3)
    h[:, 1] *= 5
    file = saved(tmp_path / "h.npy", h)
    words = ["--delays", K, "--sets", "test"]
    axes = "sample rx tx subcarrier"
    assert run(file, tmp_path / "a", "--axes", axes, "--receive", "strongest", *words) == 0
    power = np.square(np.abs(h)).sum((2, 3)).argmax(1)
    np.testing.assert_allclose(again(tmp_path / "a", "test"), h[np.arange(N), power], atol=1e-3)
    axes = "sample time tx subcarrier"
    assert run(file, tmp_path / "b", "--axes", axes, "--time", "first", *words) == 0
    np.testing.assert_allclose(again(tmp_path / "b", "test"), h[:, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("axes", "order", "options"),
    [
        ("rx sample tx subcarrier", (1, 0, 2, 3), ["--receive", "strongest"]),
        ("time sample tx subcarrier", (1, 0, 2, 3), ["--time", "first"]),
        ("sample tx subcarrier rx", (0, 2, 3, 1), ["--eigenvectors", "true", "--subbands", 4]),
        (f"(rx={9 * N} sample) tx subcarrier", (1, 0, 2, 3), ["--receive", "strongest"]),
    ],
)
def test_a_row_is_made_of_all_blocks_that_it_needs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    axes: str,
    order: tuple[int, ...],
    options: list[object],
) -> None:
    h = channels(rx=9 * N)[:4]  # far more antennas, or times, than samples
    h[1, 50] *= 5
    h = h.transpose(order)
    h = h.reshape(-1, *h.shape[2:]) if "(" in axes else h
    file = saved(tmp_path / "h.npy", h)
    words = ["--axes", axes, "--delays", K, "--sets", "test", *options]
    assert run(file, tmp_path / "one", *words) == 0
    monkeypatch.setattr(inputs, "BLOCK", h.nbytes // 10)
    assert run(file, tmp_path / "many", *words) == 0
    expected = everything(tmp_path / "one")
    assert len(expected) == 4
    np.testing.assert_array_equal(everything(tmp_path / "many"), expected)


def test_empty_users_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = channels()
    h[3] = 0
    h[5, 1] = 0
    assert (
        run(saved(tmp_path / "h.npy", h), tmp_path / "o", "--axes", "sample rx tx subcarrier") == 0
    )
    out = capsys.readouterr().out
    assert f"{2 * N - 3} rows of {N} users; dropped: 3 rows without energy, 1 of {N}" in out


def test_an_environment_called_like_a_generated_file_name_gets_a_file_of_its_own(
    tmp_path: Path,
) -> None:
    files = [saved(tmp_path / f"{n}.npy", channels(20 + n, 1, seed=n)) for n in range(2)]
    words = ["--axes", "sample rx tx subcarrier", "--sets", "test test"]
    assert run(*files, tmp_path / "a", *words, "--environments", "3.5GHz environment-0") == 0
    said = Description.read(tmp_path / "a")
    assert [(s.environment, s.rows) for s in said.sets] == [("3.5GHz", 20), ("environment-0", 21)]
    assert len({s.images.name for s in said.sets}) == 2


def test_sets_environments_and_ues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trained() -> list[int]:
        """Rows of each UE by the line that is printed last."""
        line = capsys.readouterr().out.splitlines()[-1]
        deal = dealt(commandline.read(shlex.split(line.partition("launch/train.py ")[2])))[1]
        return [sum(span.size for span in spans) for spans in deal.ues]

    files = [saved(tmp_path / f"{n}.npy", channels(20 + n, 1, seed=n)) for n in range(3)]
    axes = ["--axes", "sample rx tx subcarrier"]
    sets = ["--sets", "train val test", "--environments", "street street street"]
    assert run(*files, tmp_path / "a", *axes, *sets) == 0
    said = Description.read(tmp_path / "a")
    assert [(s.environment, s.part, s.rows) for s in said.sets] == [
        ("street", "train", 20),
        ("street", "val", 21),
        ("street", "test", 22),
    ]
    both, sets = [files[0], files[1], files[0], files[1]], ["--sets", "train train test test"]
    words = [*axes, *sets, "--environments", "3.5GHz 6.7GHz 3.5GHz 6.7GHz"]  # no names of files
    assert run(*both, tmp_path / "c", *words) == 0
    said = Description.read(tmp_path / "c")
    assert [(s.environment, s.part, s.rows) for s in said.sets] == [
        (place, part, rows)
        for place, rows in (("3.5GHz", 20), ("6.7GHz", 21))
        for part in ("train", "test")
    ]
    assert sum(trained()) == 20 + 21
    assert run(*files, tmp_path / "b", *axes, "--ues", "true", "--split", "0.5/0.5") == 0
    assert Description.read(tmp_path / "b").environments == ("ue-0", "ue-1", "ue-2")
    assert trained() == [10, 10, 11]


def test_variables_of_one_file_become_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, axes = tmp_path / "csi.npz", ["--axes", "sample rx tx subcarrier"]
    np.savez(file, H_train=channels(20, 1), H_test=channels(30, 1, seed=1))
    sets = [*axes, "--sets", "train test"]
    assert run(file, file, tmp_path / "a", *sets, "--key", "H_train H_test") == 0
    said = Description.read(tmp_path / "a")
    assert [(s.part, s.rows) for s in said.sets] == [("train", 20), ("test", 30)]
    assert run(file, file, tmp_path / "b", *sets, "--key", "H_test") == 0  # one word for all
    assert [s.rows for s in Description.read(tmp_path / "b").sets] == [30, 30]
    words = error(capsys, file, file, tmp_path / "c", *sets, "--key", "H_train H_test H_val")
    assert "--key 'H_train H_test H_val' has 3 words; expected 2, one for each file" in words


def test_eigenvectors_over_all_receive_antennas(tmp_path: Path) -> None:
    h = channels()
    h[4] = 0
    file = saved(tmp_path / "h.npy", h)
    words = ["--axes", "sample rx tx subcarrier", "--sets", "test", "--eigenvectors", "true"]
    assert run(file, tmp_path / "o", *words, "--subbands", 6) == 0
    opened = source(tmp_path / "o")
    assert (opened.kind, opened.size) == ("eigenvectors", (P, 6))
    rows = opened.rows("all", "test", 0, N - 1)
    expected = eigenvectors.to_image(eigenvectors.images_of(np.delete(h, 4, 0), 6))
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert isinstance(opened.frequency_rows("all", "test", 0, 1), str)


def test_check_says_what_pca_reaches_in_the_figure_of_eigenvectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, words = saved(tmp_path / "h.npy", channels(300)), ("--axes", "sample rx tx subcarrier")
    assert run(file, tmp_path / "v", *words, "--eigenvectors", "true", "--subbands", 5) == 0
    capsys.readouterr()
    main(["check", str(tmp_path / "v")])
    opened = source(tmp_path / "v")
    sets = (opened.rows("all", part, 0, opened.available("all", part) or 0) for part in PARTS)
    reached = statistics.pca_sgcs(*sets)[64]
    assert 0.9 < reached < 1
    assert f"SGCS of PCA-64  {reached:.3f}" in re.sub("  +", "  ", capsys.readouterr().out)


def test_check_says_how_to_convert_and_what_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path / "h.npy", channels(100))
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "h.npy: UNUSABLE as it is" in said
    [line] = [line for line in said.splitlines() if "convert it:" in line]
    *_, command = line.partition("convert it: ")
    words = shlex.split(command.replace("DIR", str(tmp_path / "out")))
    assert words[:4] == ["python", "-m", "csipipe", "channels"]
    assert main(words[4:]) == 0
    assert main(["check", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "all: GOOD" in said
    assert "energy in the first 4" in said
    assert main(["look", str(tmp_path / "out"), "--output", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert main(["check", str(file)]) == 1


def test_check_says_how_to_convert_each_array_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"train": channels(30, 1)[:, 0], "H test": channels(40, 1)[:, 0], "fc": np.array(3.5)}
    np.savez(tmp_path / "csi.npz", **words, snr=np.arange(9.0))
    assert main(["check", str(tmp_path / "csi.npz")]) == 1
    said = capsys.readouterr().out
    assert "snr float64 (9,)\n  no channels" in said
    assert "fc float64 () holds no values" in said
    lines = [line for line in said.splitlines() if "convert it:" in line]
    for number, (line, rows) in enumerate(zip(lines, (40, 30), strict=True)):
        *_, command = line.partition("convert it: ")
        out = tmp_path / f"out{number}"
        assert main(shlex.split(command.replace("DIR", str(out)))[4:]) == 0
        assert Description.read(out).made["users"] == rows


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((N, R, P, K), "sample rx tx subcarrier"),
        ((N, P, K), "sample tx subcarrier"),
        ((N, K, P), "sample subcarrier tx"),
        ((P, K, N), "tx subcarrier sample"),
        ((R, P, K, N), "rx tx subcarrier sample"),
        ((N, P, K, 2), "sample tx subcarrier part"),
        ((2, N, P, K), "part sample tx subcarrier"),
    ],
)
def test_axes_are_guessed_where_values_tell(
    tmp_path: Path, shape: tuple[int, ...], text: str
) -> None:
    words = text.split()
    h = channels(rx=R if "rx" in words else 1)
    order = [w for w in ("sample", "rx", "tx", "subcarrier") if w in words]
    h = h if "rx" in words else h[:, 0]
    values = np.stack([h.real, h.imag], -1) if "part" in words else h
    values = values.transpose([[*order, "part"].index(word) for word in words])
    assert values.shape == shape
    with rawarray.opened(saved(tmp_path / "h.npy", values)) as array:
        assert guess(array).text == text


def test_axes_that_could_be_either_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = np.exp(-2j * np.pi * np.arange(8)[:, None] * 0.01) * np.ones(8)
    both = (flat + flat.T).astype("c8") * np.ones((40, 1, 1))  # early in both directions
    said = error(capsys, saved(tmp_path / "h.npy", both), tmp_path / "o")
    assert "--axes 'sample subcarrier tx' and --axes 'sample tx subcarrier'" in said
    noise = np.random.default_rng(0).standard_normal((50, 8, 12)) + 0j
    said = error(capsys, saved(tmp_path / "n.npy", noise), tmp_path / "o")
    assert "no reading of its axes fits" in said
    assert "--axes 'sample tx subcarrier'" in said


@pytest.mark.parametrize("dtype", ["complex64", "float32"])
def test_the_axes_that_are_suggested_can_be_those_of_the_array(dtype: str, tmp_path: Path) -> None:
    for count in range(2, 8):
        sizes = (64, 128) if count == 2 else (2, 32, *[2] * (count - 2))
        values = np.random.default_rng(0).standard_normal(sizes).astype(dtype)
        with rawarray.opened(saved(tmp_path / f"{count}.npy", values)) as array:
            axes = parse(example(array))
            assert axes.has("part") == (dtype == "float32")
            assert axes.sizes(sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample tx", "either subcarrier or delay"),
        ("sample tx angle subcarrier", "either tx or angle"),
        ("tx subcarrier", "user` or `sample"),
        ("sample tx carrier", "'carrier' is no axis; the words are user, sample"),
        ("sample antennas subcarrier", r"'antennas' is no axis \(antennas of the BTS: tx, of a UE"),
        ("sample antenna=4 subcarrier", r"'antenna=4' is no axis \(antennas of the BTS: tx"),
        ("sample tx tx subcarrier", "tx occurs 2 times"),
        ("sample (tx subcarrier)", "sizes of all but one"),
        ("sample (tx=3 subcarrier", "missing its other half"),
    ],
)
def test_wrong_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_plurals_are_the_same_words() -> None:
    axes = parse("users (parts angles=32 delays=16) bts")
    assert axes.words == ["user", "part", "angle", "delay", "bts"]
    assert parse("samples tx subcarriers").groups == parse("sample tx subcarrier").groups


def test_a_piece_of_an_array_says_whose_its_rows_are() -> None:
    both = parse("sample user tx subcarrier")  # with users, samples are rows of theirs
    assert both.users((4, 3, 8, 16), 1, 1, 3).ravel().tolist() == [1, 2]
    assert both.users((4, 3, 8, 16), 0, 1, 3).ravel().tolist() == [0, 1, 2]
    twice = parse("user user rx rx tx subcarrier")
    assert twice.users((2, 3, 1, 1, 8, 16), 1, 1, 3).ravel().tolist() == [1, 2, 4, 5]
    assert twice.streamed((2, 3, 1, 1, 8, 16)) == 1
    assert twice.streamed((2, 3, 1, 1, 8, 16), in_order=True) == 0


def bad_inputs(folder: Path) -> dict[str, tuple[list[object], str]]:
    h = channels(rx=1)[:, 0]
    good = saved(folder / "good.npy", h)
    nan = h.copy()
    nan[17, 2, 5] = np.nan
    (folder / "cut.npy").write_bytes(good.read_bytes()[:-100])
    ragged = np.array([np.ones(2), np.ones(3)], object)
    torch.save({"a": Path("x")}, folder / "class.pt")
    io.savemat(folder / "struct.mat", {"H": {"a": 1}})
    io.savemat(folder / "v4.mat", {"H": np.eye(3)}, format="4")
    np.savez(folder / "two.npz", a=h, b=h)
    np.savez(folder / "object.npz", a=ragged)
    (folder / "p.pkl").write_bytes(b"\x80\x04K\x01.")
    (folder / "head.csv").write_text("re,im\n1,2\n")
    (folder / "short.csv").write_text("1,2\n3,4\n5\n")
    (folder / "x.dat").write_bytes(b"abcdefghijklmnop")
    axes = ["--axes", "sample tx subcarrier"]
    return {
        "axes": ([good, "--axes", "sample rx tx subcarrier"], r"names 4 axes.*\(60, 8, 48\)"),
        "part": ([good, "--axes", "sample part subcarrier"], "either tx or angle"),
        "finite": ([saved(folder / "n.npy", nan), *axes], r"first at \(17, 2, 5\)"),
        "objects": (
            [saved(folder / "o.npy", ragged), *axes],
            "Python objects, a pickle; it is never",
        ),
        "objects in npz": ([folder / "object.npz", *axes], "Python objects, a pickle; it is never"),
        "pickle": ([folder / "p.pkl", *axes], "a pickle, which can execute anything"),
        "class in pt": ([folder / "class.pt", *axes], "only unpickling could read"),
        "truncated": ([folder / "cut.npy", *axes], "can't be read.*truncated"),
        "struct": ([folder / "struct.mat", *axes], "of class struct"),
        "v4": ([folder / "v4.mat", *axes], "MAT file of version 4.*Octave: save -v7"),
        "which": (
            [folder / "two.npz", *axes],
            "holds 2 arrays; found 'a', 'b'. Name one with --key",
        ),
        "key": ([folder / "two.npz", *axes, "--key", "c"], "has no array 'c'"),
        "sizes": (
            [good, saved(folder / "s.npy", h[:, :4]), *axes],
            "4 ports x 48 .*has 8 x 48. Convert them into folders",
        ),
        "domains": (
            [
                saved(folder / "square.npy", channels(40, 1, 32, 32)[:, 0]),
                saved(folder / "flat.npy", np.full((40, 2048), 0.5, np.float32)),
            ],
            "flat.npy .*'sample .*'sample tx subcarrier'; expected both over tx or both over angle",
        ),
        "delays": ([good, *axes, "--delays", 49], "--delays 49, but there are 48 .*1 … 48"),
        "ports": ([good, *axes, "--array", "3x2"], "--array 3x2x1 has 6 ports; the data has 8"),
        "array": ([good, *axes, "--array", "8"], "expected columns x rows"),
        "order": ([good, *axes, "--ports", "row column"], "the order of ports is"),
        "header": ([folder / "head.csv", *axes], "Remove the header"),
        "ragged csv": (
            [folder / "short.csv", "--axes", "sample (part=2 tx=1 subcarrier)"],
            "lines 1 to 3.*expected 2",
        ),
        "unknown": ([folder / "x.dat", *axes], "of an unknown kind"),
        "missing": ([folder / "nowhere.npy", *axes], "doesn't exist"),
        "split": ([good, *axes, "--split", "0.8/0.3"], "--split is '0.8/0.3'"),
        "users": (
            [saved(folder / "few.npy", h[:2]), *axes, "--split", "0.8/0.1/0.1"],
            r"has 2 user\(s\), too few for",
        ),
        "labels": ([good, *axes, "--sets", "train test"], "has 2 words; expected 1"),
        "empty": ([saved(folder / "zero.npy", 0 * h), *axes], "none of the 60 rows has energy"),
    }


def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "in").mkdir()
    for name, ([*words], message) in bad_inputs(tmp_path / "in").items():
        files = [word for word in words if isinstance(word, Path)]
        options = words[len(files) :]
        said = error(capsys, *files, out, *options)
        assert said.startswith("csipipe: error:"), name
        assert re.search(message, said), (name, said)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"], name


def test_the_better_shift_is_the_same_whatever_shift_was_taken(tmp_path: Path) -> None:
    late = channels() * np.exp(-2j * np.pi * 40 * np.arange(K) / K).astype(np.complex64)
    given = Input(saved(tmp_path / "late.npy", late), "all", None)
    found = []
    for shift in (0, 3):
        plan = Plan(axes="sample rx tx subcarrier", delays=16, shift=shift)
        _, tally = converting.convert([given], tmp_path / str(shift), plan)
        found.append(tally.best_shift(16)[0])
    assert found[0] == found[1]
    assert 8 <= found[0] <= 16, "the echoes from bin 40 on come first, or nearly"


def test_of_shifts_that_lose_nearly_the_same_the_smallest_is_best() -> None:
    profile = np.zeros(16)
    profile[1], profile[9] = 0.4997, 0.5003  # no 4 delays hold both
    shift, lost = converting.Tally(rows=1, profile=profile).best_shift(4)
    assert (shift, lost) == pytest.approx((0, 0.5003))


def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, make = saved(tmp_path / "h.npy", channels()), transform.to_image

    def meddle(*arguments: Any) -> Any:
        os.utime(file, ns=(0, 0))
        return make(*arguments)

    monkeypatch.setattr(converting, "to_image", meddle)
    said = error(capsys, file, tmp_path / "o", "--axes", "sample rx tx subcarrier")
    assert "h.npy changed while it was read; start again" in said
    assert [p.name for p in tmp_path.iterdir()] == ["h.npy"]


def test_tensors_are_read_whatever_their_type_and_view(tmp_path: Path) -> None:
    h = torch.from_numpy(channels(4, 1))
    for number, tensor in enumerate((h, h.conj(), h.real.bfloat16())):
        file = tmp_path / f"{number}.pt"
        torch.save(tensor, file)
        with rawarray.opened(file) as array:
            wanted = tensor.float() if tensor.is_floating_point() else tensor.resolve_conj()
            np.testing.assert_array_equal(array.cut(0, 1, 3), wanted[1:3].numpy())


def test_text_may_have_semicolons_and_complex_numbers(tmp_path: Path) -> None:
    texts = {"1;2\n3;4\n": [[1, 2], [3, 4]], "1+2j,3\n-1j,4\n": [[1 + 2j, 3], [-1j, 4]]}
    for text, wanted in texts.items():
        (tmp_path / "h.csv").write_text(text)
        with rawarray.opened(tmp_path / "h.csv") as array:
            assert array.cut(0, 0, 2).tolist() == wanted


def test_an_array_without_values_is_named(tmp_path: Path) -> None:
    for values in (np.zeros((0, 3)), np.float64(1)):
        file = saved(tmp_path / "h.npy", values)
        with pytest.raises(ValueError, match="holds no values"), rawarray.opened(file):
            pass


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"\xff\xfe.npy")
    saved(file, channels(rx=1))
    assert run(file, tmp_path / "o", "--axes", "sample rx tx subcarrier") == 0
    assert source(tmp_path / "o").available("all", "test") == 6


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "h.npy", channels())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # as if there were no more room
    try:
        said = error(capsys, file, tmp_path / "o", "--axes", "sample rx tx subcarrier")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in said
    assert [p.name for p in tmp_path.iterdir()] == ["h.npy"]


def test_one_conversion_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "h.npy", channels())
    axes = ["--axes", "sample rx tx subcarrier"]
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(run(file, tmp_path / "o", *axes)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [0, 1]
    assert source(tmp_path / "o").available("all", "train")
    assert "nothing is overwritten" in error(capsys, file, tmp_path / "o", *axes)
    assert json.loads((tmp_path / "o" / "channels.json").read_text())["made"]["users"] == N
