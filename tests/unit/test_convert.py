"""Rows of converted arrays: transforms, truncation, sets, users, eigenvectors."""

from __future__ import annotations

import json
import re
import resource
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convertruns import K, N, P, R, error, everything, run, saved, source
from csifiles import channels

from csipipe.channels import convert as converting
from csipipe.channels import dealt, eigenvectors, inputs, open_source, statistics
from csipipe.channels.command import main
from csipipe.channels.format import Description
from csipipe.channels.inputs import Input, Plan
from csipipe.channels.source import Part
from csipipe.comm.topology import Topology
from csipipe.measure import metrics
from csipipe.settings import commandline
from csipipe.settings.config import DataSettings

PARTS: tuple[Part, ...] = ("train", "test")


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


@pytest.mark.parametrize(
    "axes", ["sample tx delay", "sample angle subcarrier", "sample angle delay"]
)
def test_a_transform_that_was_done_is_not_done_again(axes: str, tmp_path: Path) -> None:
    h = channels(rx=1)[:, 0]
    half = np.fft.ifft(h) if "delay" in axes else h
    half = np.fft.fft(half, axis=1) / P if "angle" in axes else half  # divided by their number
    usual, done = saved(tmp_path / "h.npy", h), saved(tmp_path / "half.npy", half)
    words = ["--delays", 20, "--sets", "test"]
    assert run(usual, tmp_path / "a", "--axes", "sample tx subcarrier", *words) == 0
    assert run(done, tmp_path / "b", "--axes", axes, *words) == 0
    np.testing.assert_allclose(everything(tmp_path / "b"), everything(tmp_path / "a"), atol=1e-5)
    rows: list[Any] = [source(tmp_path / n).frequency_rows("all", "test", 0, N) for n in "ab"]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)


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


def test_what_is_truncated_already_cannot_be_compared_with_what_it_was(tmp_path: Path) -> None:
    """CsiNet's rows."""
    image = np.fft.fft(np.fft.ifft(channels(rx=1)[:, 0], axis=2), axis=1) / P
    scaled = np.stack([image.real, image.imag], 1) / (2 * np.abs(image).max()) + 0.5
    file = saved(tmp_path / "c.npy", scaled.reshape(N, -1).astype("f4"))
    axes = f"sample (part angle={P} delay={K})"
    assert run(file, tmp_path / "c", "--axes", axes, "--delays", K, "--sets", "test") == 0
    assert isinstance(source(tmp_path / "c").frequency_rows("all", "test", 0, N), str)
    assert Description.read(tmp_path / "c").made["sources"][0]["offset"] == 0.5


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
        ("time sample=4 tx subcarrier", (1, 0, 2, 3), ["--time", "first"]),
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
    h = channels(4, 9 * N)  # far more antennas, or times, than samples
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
        ranks, _, words = line.partition("--nproc_per_node=")[2].partition(" launch/train.py ")
        settings = commandline.read(shlex.split(words))
        Topology.of(settings, int(ranks))
        assert int(ranks) <= 4  # more ranks than a small machine has cores would gain little
        return [sum(span.size for span in spans) for spans in dealt(settings)[1].ues]

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
    assert run(files[0], tmp_path / "d", *axes, "--ues", "true", "--split", "0.5/0.5") == 0
    assert trained() == [10]


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


def test_rows_that_one_scale_leaves_hardly_anything_of_are_suspicious(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = channels(100)
    h[::10] *= 1e-3
    file = saved(tmp_path / "h.npy", h)
    axes = ["--axes", "sample rx tx subcarrier"]
    for scaling, verdict in (("sample", "GOOD"), ("set", "SUSPICIOUS")):
        assert run(file, tmp_path / scaling, *axes, "--scaling", scaling) == 0
        said = capsys.readouterr().out
        assert ("--scaling sample" in said) == (scaling == "set")
        data = DataSettings(source="files", path=str(tmp_path / scaling))
        open_source(data).rows("all", "train", 0, 9)
        assert ("have peaks below" in capsys.readouterr().err) == (scaling == "set")
        assert main(["check", str(tmp_path / scaling)]) == (scaling == "set")
        assert f"all: {verdict}" in capsys.readouterr().out
