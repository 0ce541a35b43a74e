"""Channels of whole arrays: eigenvectors on request, our own clusters, 3GPP's models by Sionna."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csipipe.channels import planar, tr38901
from csipipe.channels.command import main
from csipipe.channels.eigenvectors import images_of, to_image
from csipipe.channels.filesource import FilesSource
from csipipe.channels.format import Description
from csipipe.channels.scenario import BIN_NS, LIGHT_M_PER_NS, SCENARIOS, draw_rays
from csipipe.channels.scene import BLOCK, Scene, stream


def run(*words: object) -> int:
    return main([str(word) for word in words])


def raw(folder: Path) -> tuple[Path, Any]:
    """An array (samples, rx, ports, subcarriers) as a file."""
    shape = 12, 2, 8, 7
    rng = np.random.default_rng(0)
    h = rng.standard_normal((*shape, 2)).view(np.complex128)[..., 0].astype(np.complex64)
    np.save(folder / "h.npy", h)
    return folder / "h.npy", h


# Eigenvectors of any array


def test_converted_eigenvectors_are_those_of_all_receive_antennas(tmp_path: Path) -> None:
    file, h = raw(tmp_path)
    words = "--eigenvectors", "true", "--subbands", 3, "--sets", "test"
    assert run("convert", file, tmp_path / "v", "--axes", "sample rx tx subcarrier", *words) == 0
    source = FilesSource(tmp_path / "v", 0)
    assert (source.size, source.kind) == ((8, 3), "eigenvectors")
    wanted = to_image(images_of(h, 3))
    np.testing.assert_allclose(source.rows("all", "test", 0, 12), wanted, atol=1e-6)
    assert isinstance(source.frequency_rows("all", "test", 0, 12), str)
    said = Description.read(tmp_path / "v")
    assert (said.scaling, said.subcarriers) == ("unit", None)


def test_ports_are_put_into_3gpps_order_and_what_is_silent_is_dropped(tmp_path: Path) -> None:
    file, h = raw(tmp_path)
    h[3, :, :, :2] = 0  # a subband without energy
    other = h.reshape(12, 2, 2, 2, 2, 7).transpose(0, 1, 4, 3, 2, 5).reshape(h.shape)
    np.save(file, other)
    words = "--axes", "sample rx tx subcarrier", "--sets", "test", "--array", "2x2x2"
    vectors = "--eigenvectors", "true", "--subbands", 4, "--ports", "row column polarisation"
    assert run("convert", file, tmp_path / "v", *words, *vectors) == 0
    found = FilesSource(tmp_path / "v", 0).rows("all", "test", 0, 11)
    kept = np.delete(h, 3, axis=0)
    np.testing.assert_allclose(found, to_image(images_of(kept, 4)), atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "subbands", "message"),
    [
        ("sample rx tx subcarrier", 8, "8 subbands, but there are 7 subcarriers"),
        ("sample rx angle subcarrier", 3, "eigenvectors are of ports and subcarriers"),
        ("sample rx tx subcarrier", 0, "0 subbands, but expected at least one"),
    ],
)
def test_what_has_no_eigenvectors_is_refused(
    axes: str, subbands: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = raw(tmp_path)
    words = "--axes", axes, "--eigenvectors", "true", "--subbands", subbands
    assert run("convert", file, tmp_path / "v", *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "v").exists()


# Our own clusters


def test_the_first_antenna_sees_the_linear_arrays_rays() -> None:
    scene = Scene(columns=3, rows=2, polarisations=2, receive=2, subcarriers=1024, snapshots=2)
    h = planar.block(scene, "outdoor", 5)
    assert h.shape == (BLOCK, 2, 2, 12, 1024)
    rays = draw_rays(SCENARIOS["outdoor"], BLOCK, np.random.default_rng(5))
    band = np.exp(-2j * np.pi * rays.delay[..., None] * np.arange(1024) / 1024)
    wanted = (rays.gain[..., None] * band).sum(axis=1)
    np.testing.assert_allclose(h[:, 0, 0, 0], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_polarisations_have_one_power_and_fade_on_their_own() -> None:
    scene = Scene(columns=2, rows=2, polarisations=2, subcarriers=4)
    h = np.concatenate([planar.block(scene, "indoor", seed) for seed in range(8)])[:, 0, 0]
    norm = h / np.sqrt(np.square(np.abs(h)).mean(axis=(1, 2), keepdims=True))
    first, second = norm[:, :4], norm[:, 4:]
    powers = np.square(np.abs(norm)).mean(axis=(0, 2))
    np.testing.assert_allclose(powers, 1, atol=0.15)
    across = np.abs((first.conj() * second).mean())
    along = np.abs((first[:, 0].conj() * first[:, 1]).mean())
    assert across < 0.1
    assert along > 0.4  # neighbours in a column see the same rays


def step(scene: Scene) -> Any:
    """(B,) mean phase step from antenna to antenna, in cycles."""
    h = planar.block(scene, "outdoor", 0)[:, 0, 0]
    return np.angle((h[:, 1:] * h[:, :-1].conj()).sum(axis=(1, 2))) / (2 * np.pi)


def test_rows_see_elevation_and_columns_azimuth_half_a_wavelength_apart() -> None:
    """Down from a high BTS, in a narrow cone around the UE's direction."""
    rays = draw_rays(SCENARIOS["outdoor"], BLOCK, np.random.default_rng(0))
    distance = rays.delay.min(axis=1) * BIN_NS * LIGHT_M_PER_NS
    down = -np.rad2deg(np.arcsin(2 * step(Scene(columns=1, rows=8, subcarriers=64))))
    assert np.median(np.abs(down - np.rad2deg(np.arctan(23.5 / distance)))) < 1.5
    turns = np.exp(2j * np.pi * rays.frequency)  # hardly less at so low an elevation
    wanted = np.angle((np.abs(rays.gain) ** 2 * turns).sum(axis=1)) / (2 * np.pi)
    found = step(Scene(columns=8, subcarriers=64))
    assert np.median(np.abs(found - wanted)) < 0.02


def test_snapshots_differ_by_what_users_move() -> None:
    """1 m/s at most, 10 Hz at 3 GHz: phases turn by 2 pi f cos, of mean square f^2 / 6."""
    scene = Scene(
        columns=4, subcarriers=16, snapshots=2, interval_ms=2, speed_kmh=3.6, carrier_ghz=2.99792458
    )
    h = np.concatenate([planar.block(scene, "outdoor", seed) for seed in range(8)])[:, :, 0]
    moved = (np.abs(h[:, 1] - h[:, 0]) ** 2).sum(axis=(1, 2)) / (np.abs(h[:, 0]) ** 2).sum((1, 2))
    assert np.sqrt(moved.mean()) == pytest.approx(2 * np.pi * 10 * 2e-3 / np.sqrt(6), rel=0.3)


def test_a_users_channels_are_the_same_however_many_are_asked_for() -> None:
    scene = Scene(columns=2, subcarriers=4)
    few = np.concatenate(list(stream(planar.block, scene, "indoor", 1, 0, 70)))
    many = np.concatenate(list(stream(planar.block, scene, "indoor", 1, 0, 150)))
    assert few.shape[0] == 70
    np.testing.assert_array_equal(few, many[:70])
    other = np.concatenate(list(stream(planar.block, scene, "indoor", 1, 1, 70)))
    assert np.abs(other - few).max() > 0


def test_generated_channels_are_a_folder_to_train_on(tmp_path: Path) -> None:
    words = "--array", "4x2x2", "--subcarriers", 64, "--delays", 20, "--receive", 2
    numbers = "--train", 20, "--val", 0, "--test", 5
    assert run("generate", tmp_path / "g", "--model", "indoor", *words, *numbers) == 0
    source = FilesSource(tmp_path / "g", 0)
    assert (source.size, source.padded) == ((16, 20), 64)
    assert (source.available("all", "train"), source.available("all", "test")) == (40, 10)
    said = json.loads((tmp_path / "g" / "channels.json").read_text())
    assert (said["columns"], said["rows"], said["polarisations"]) == (4, 2, 2)
    assert said["made"]["model"] == "indoor"
    assert said["made"]["scene"]["carrier_ghz"] == 3.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "cdl-f"), "--model is 'cdl-f'; it must be one of indoor, outdoor, umi, uma"),
        (("--model", "indoor", "--array", "4x"), "--array is '4x'"),
        (("--model", "indoor", "--carrier", "0"), "carrier_ghz is 0.0; it must be positive"),
        (("--model", "indoor", "--receive", "0"), "receive is 0; it must be at least 1"),
        (("--model", "indoor", "--speed", "-1"), "speed_kmh is -1.0; it must be at least 0"),
        (("--model", "indoor", "--test", "-1"), "rows are"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", tmp_path / "g", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_sionna_the_error_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sionna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sionna", None)
    assert run("generate", tmp_path / "g", "--model", "umi") == 1
    assert "pip install 'csipipe[sionna]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# 3GPP's models: TR 38.901 V16.1; needs Sionna, whose import alone takes seconds

CDL_A = {
    0.0: -13.4,
    0.3819: 0.0,
    0.4025: -2.2,
    0.4610: -6.0,
    0.5375: -8.2,
    0.5750: -10.5,
    0.5868: -4.0,
    0.6708: -9.9,
    0.7618: -7.5,
    1.5375: -15.9,
    1.8978: -6.6,
}
"""Table 7.7.1-1, the first clusters: normalised delay and power in dB."""
UMI_NLOS = {
    "muDS": (-0.24, -6.83),
    "sigmaDS": (0.16, 0.28),
    "muASD": (-0.23, 1.53),
    "sigmaASD": (0.11, 0.33),
}
"""Table 7.5-6: slope over lg(1 + GHz), and constant."""


def table(name: str) -> dict[str, Any]:
    """A table of the specification, from Sionna's own files."""
    found = importlib.util.find_spec("sionna")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Sionna isn't installed")
    models = Path(found.submodule_search_locations[0], "phy", "channel", "tr38901", "models")
    release = "v" + tr38901.SPECIFICATION.replace(".", "_")
    content: dict[str, Any] = json.loads((models / release / f"{name}.json").read_text())
    return content


def test_the_values_of_these_tests_are_the_specifications() -> None:
    cdl, umi = table("CDL-A"), table("UMi_NLoS")
    powers = dict(zip(cdl["delays"], cdl["powers"], strict=True))
    assert CDL_A.items() <= powers.items()
    for name, (slope, constant) in UMI_NLOS.items():
        assert [umi[name + letter] for letter in "abc"] == [slope, 1.0, constant], name


def mean_powers(model: str) -> tuple[Any, Any]:
    """(paths,) of 256 users, isotropic antennas; and normalised delays at a spread of 100 ns."""
    pytest.importorskip("sionna.phy")
    powers = []
    for seed in range(4):
        gain, delay = tr38901.paths(Scene(columns=2), model, seed, "omni")
        powers.append((gain.abs() ** 2).mean((0, 1, 2, 4)).numpy())
    return np.mean(powers, axis=0), delay[0].numpy() * 1e7


@pytest.mark.long
def test_cdl_has_the_tables_power_per_tap() -> None:
    """256 users with Rayleigh-like taps: a standard error of 0.27 dB; four of them."""
    power, delay = mean_powers("cdl-a")
    level = 10 * np.log10(power / power.max())
    for place, wanted in CDL_A.items():
        assert level[np.abs(delay - place).argmin()] == pytest.approx(wanted, abs=1.1)
    assert np.abs(delay[:, None] - np.array([*CDL_A])).min(axis=0).max() < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("model", ["cdl-b", "cdl-d"])
def test_cdl_has_the_delay_spread_that_was_asked_for(model: str) -> None:
    """The tables' delays are normalised to a spread of 1 (clause 7.7.3); 5 % for the draws."""
    power, delay = mean_powers(model)
    share = power / power.sum()
    spread = np.sqrt((share * (delay - (share * delay).sum()) ** 2).sum())
    assert spread == pytest.approx(1.0, abs=0.05)


@pytest.mark.long
def test_umi_has_the_specifications_delay_and_angular_spreads() -> None:
    """Table 7.5-6, UMi NLOS at 3.5 GHz: lg DS and lg ASD of mean μ and deviation σ.

    The means over 128 UEs are within half a σ of μ; clusters below -25 dB are left out and there
    are few of them, which narrows a spread.
    """
    pytest.importorskip("sionna.phy")
    frequency = np.log10(1 + 3.5)
    law = {name: a * frequency + b for name, (a, b) in UMI_NLOS.items()}
    laws = {
        "delay": (law["muDS"], law["sigmaDS"]),
        "angle": (law["muASD"], law["sigmaASD"]),
    }
    found: dict[str, list[Any]] = {"delay": [], "angle": []}
    for seed in range(2):
        gain, delay = tr38901.paths(Scene(columns=8), "umi", seed, "omni", los=False, indoor=0.0)
        h, t = gain[:, 0, :, :, 0].numpy(), delay.numpy()
        share = np.square(np.abs(h)).mean(axis=1)
        share = share / share.sum(axis=1, keepdims=True)
        mean = (share * t).sum(axis=1, keepdims=True)
        found["delay"].append(np.log10(np.sqrt((share * (t - mean) ** 2).sum(axis=1))))
        # a path's azimuth from the phase step between neighbours, half a wavelength apart
        sine = np.angle((h[:, 1:] * h[:, :-1].conj()).sum(axis=1)) / np.pi
        middle = np.abs((share * np.exp(1j * np.arcsin(sine))).sum(axis=1))
        spread = np.rad2deg(np.sqrt(-2 * np.log(np.minimum(middle, 1 - 1e-9))))
        found["angle"].append(np.log10(spread))
    for name, (mu, sigma) in laws.items():
        values = np.concatenate(found[name])
        assert values.mean() == pytest.approx(mu, abs=sigma / 2), name
        assert values.std() < 1.5 * sigma, name


@pytest.mark.long
def test_3gpps_channels_are_a_folder_to_train_on(tmp_path: Path) -> None:
    pytest.importorskip("sionna.phy")
    words = "--array", "4x2x2", "--train", 4, "--val", 0, "--test", 2, "--snapshots", 2
    assert run("generate", tmp_path / "g", "--model", "uma", *words) == 0
    source = FilesSource(tmp_path / "g", 0)
    assert (source.size, source.available("all", "train")) == ((16, 32), 8)
    assert run("generate", tmp_path / "h", "--model", "uma", *words) == 0
    for part in ("train", "test"):
        one, other = (FilesSource(tmp_path / name, 0).rows("all", part, 0, 4) for name in "gh")
        np.testing.assert_array_equal(one, other)
