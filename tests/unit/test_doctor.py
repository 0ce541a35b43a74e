"""The doctor: generated channels are good, and each way of damaging them is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from csifiles import save_v73
from numpy.typing import NDArray
from scipy import io

from csipipe.channels import checkup
from csipipe.channels.csinet import SUFFIX
from csipipe.channels.doctor import Examined, examine
from csipipe.channels.matfile import count_rows
from csipipe.channels.source import Images, Site
from csipipe.channels.synthetic import SyntheticSource
from csipipe.channels.transform import to_complex, to_unit

SITES: tuple[Site, ...] = ("indoor", "outdoor")
ROWS = 192


@pytest.fixture(scope="module", params=SITES)
def rows(request: pytest.FixtureRequest) -> Images:
    return SyntheticSource(5, 32, 32).rows(request.param, "train", 0, ROWS)


def flat(images: NDArray[Any]) -> NDArray[Any]:
    return images.reshape(len(images), -1)


def save(path: Path, values: Any, key: str = "HT", **kwargs: Any) -> Path:
    io.savemat(path, {key: values}, **kwargs)
    return path


def words(seen: Examined) -> str:
    return "; ".join(f"{f.verdict}: {f.what} -> {f.repair}" for f in seen.findings)


def exchanged(h: Images) -> NDArray[Any]:
    return flat(h.transpose(0, 1, 3, 2))


def around_zero(h: Images) -> NDArray[Any]:
    return flat(h - np.float32(0.5))


def second_dft(h: Images) -> NDArray[Any]:
    return flat(to_unit(np.fft.fft2(to_complex(h))))


def complex_values(h: Images) -> NDArray[Any]:
    return flat(to_complex(h))


def scaled_as_a_set(h: Images) -> NDArray[Any]:
    """As if rows had kept path losses that scatter by 6 dB."""
    gain = 10 ** (np.random.default_rng(0).normal(0, 6, (len(h), 1, 1, 1)) / 20)
    return flat(((h - 0.5) * gain / gain.max() + 0.5).astype(np.float32))


def with_nan(h: Images) -> NDArray[Any]:
    values = flat(h).copy()
    values[3, 7], values[9, 0] = np.nan, np.inf
    return values


def repeated(h: Images) -> NDArray[Any]:
    return flat(np.concatenate([h, h[:5]]))


def interleaved(h: Images) -> NDArray[Any]:
    return flat(np.moveaxis(h, 1, -1))


Damage = Callable[[Images], NDArray[Any]]
DAMAGES: list[tuple[Damage, str, str]] = [
    (exchanged, "suspicious", r"axes look swapped.*-> HT\.reshape\(-1, 2, 32, 32\)\.transpose"),
    (around_zero, "unusable", r"around 0 instead of 0\.5 -> add 0\.5"),
    (second_dft, "suspicious", r"spread over all angles and delays: a second DFT.*ifft2"),
    (complex_values, "unusable", r"complex values; expected 1024 real parts, then 1024 imaginary"),
    (scaled_as_a_set, "suspicious", r"peak of the whole set.* -> subtract 0\.5, divide each row"),
    (with_nan, "unusable", r"NaN or infinite values in 2 of 192 rows, first in row 3 .*remove"),
    (repeated, "suspicious", r"5 of 197 rows are duplicates"),
    (interleaved, "suspicious", r"alternate instead of filling one half of a row each"),
]


@pytest.mark.parametrize(("damage", "verdict", "message"), DAMAGES)
def test_each_damage_is_named_alone_with_its_repair(
    tmp_path: Path, rows: Images, damage: Damage, verdict: str, message: str
) -> None:
    seen = examine(save(tmp_path / "DATA_Htrainin.mat", damage(rows)))
    assert seen.verdict == verdict
    assert len(seen.findings) == 1, words(seen)
    assert re.search(message, words(seen)), words(seen)


def test_undamaged_rows_are_good(tmp_path: Path, rows: Images) -> None:
    for count in (ROWS, 70, 1):
        seen = examine(save(tmp_path / "DATA_Htrainin.mat", flat(rows[:count])))
        assert (seen.verdict, seen.findings) == ("good", [])
        assert seen.shape == (count, 2048)
        np.testing.assert_array_equal(seen.images, rows[:count])
    four_axes = examine(save(tmp_path / "four.mat", rows.astype(np.float64)))
    assert (four_axes.verdict, four_axes.dtype) == ("good", "float64")


def test_the_repairs_that_are_code_repair(rows: Images) -> None:
    back = exchanged(rows).reshape(-1, 2, 32, 32).transpose(0, 1, 3, 2).reshape(-1, 2048)
    np.testing.assert_array_equal(back, flat(rows))
    back = interleaved(rows).reshape(-1, 32, 32, 2).transpose(0, 3, 1, 2).reshape(-1, 2048)
    np.testing.assert_array_equal(back, flat(rows))
    undone = to_unit(np.fft.ifft2(to_complex(second_dft(rows).reshape(rows.shape))))
    np.testing.assert_allclose(undone, rows, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_dft_over_one_axis_is_told_apart(tmp_path: Path, rows: Images, axis: int) -> None:
    values = flat(to_unit(np.fft.ifft(to_complex(rows), axis=axis)))
    seen = examine(save(tmp_path / "DATA_Htrainin.mat", values))
    assert f"over all {('angles', 'delays')[axis - 1]}:" in words(seen)


def test_what_follows_is_judged_on_repaired_rows(tmp_path: Path, rows: Images) -> None:
    values = interleaved(rows.transpose(0, 1, 3, 2) - np.float32(0.5))
    seen = examine(save(tmp_path / "DATA_Htrainin.mat", values))
    assert re.search("alternate.*around 0.*swapped", words(seen)), words(seen)
    assert len(seen.findings) == 3
    assert seen.images is not None
    np.testing.assert_allclose(seen.images, rows.transpose(0, 1, 3, 2), atol=1e-6)


def test_two_faults_are_both_named(tmp_path: Path, rows: Images) -> None:
    values = complex_values(rows.transpose(0, 1, 3, 2))
    values[0] = np.nan
    seen = examine(save(tmp_path / "DATA_Htrainin.mat", values))
    assert [f.what.split()[0] for f in seen.findings] == ["NaN", "complex", "the"]
    assert "swapped" in words(seen)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2000), 0.5), r"shape is \(2, 2000\); expected.*antennas x subcarriers"),
        (np.full((2, 32, 1024), 1j), r"shape is \(2, 32, 1024\)"),
        (np.full((2, 2048), "a", object), r"a cell array, a struct or text"),
        (np.full((2, 2048), 7, np.int16), r"holds int16"),
        (np.zeros((0, 2048)), r"shape is \(0, 2048\)"),
        (np.full((2, 2048), 0.5), r"2 rows hold a single value throughout"),
        (np.full((2, 2048), np.nan), r"in 2 of 2 rows"),
    ],
)
def test_what_cant_be_channels(tmp_path: Path, values: Any, message: str) -> None:
    seen = examine(save(tmp_path / "DATA_Htrainin.mat", values))
    assert seen.verdict == "unusable"
    assert re.search(message, words(seen)), words(seen)


def test_range_zero_and_columns(tmp_path: Path, rows: Images) -> None:
    path = tmp_path / "DATA_Htrainin.mat"
    assert "expected [0, 1] with 0.5" in words(examine(save(path, flat(rows) * 255)))
    assert "median" in words(examine(save(path, flat(rows) * 0.6)))
    said = words(examine(save(path, around_zero(rows) * 1.2)))  # beyond a radius of 0.5
    assert "add 0.5 to every value" not in said
    assert "divide each row by twice its peak magnitude" in said
    seen = examine(save(path, complex_values(rows) * (0.9 + 0.1j)))
    values = complex_values(rows) * (0.9 + 0.1j)
    parts = np.stack([values.real, values.imag])
    assert (seen.low, seen.high) == pytest.approx((parts.min(), parts.max()))
    seen = examine(save(path, flat(rows).T))
    assert "samples are columns -> save HT.' instead" in words(seen)
    assert len(seen.findings) == 1
    seen = examine(save(path, flat(rows), key="H"))
    assert "its variable is H -> rename it to HT" in words(seen)


@pytest.mark.parametrize("content", ["cut", b"", b"<!DOCTYPE html><title>404</title>"])
def test_damaged_and_foreign_files(tmp_path: Path, rows: Images, content: Any) -> None:
    path = save(tmp_path / "DATA_Htrainin.mat", flat(rows))
    path.write_bytes(path.read_bytes()[:90_000] if content == "cut" else content)
    seen = examine(path)
    assert seen.verdict == "unusable"
    assert re.search(r"it can't be read \(.*; it has [\d,]+ bytes", words(seen))


def test_what_cannot_be_opened_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        examine(tmp_path)


def test_several_variables_without_ht(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htrainin.mat"
    io.savemat(path, {"a": 1.0, "b": 2.0})
    assert "it has no variable HT; found ['a', 'b']" in words(examine(path))


@pytest.mark.parametrize("turned", [False, True])
def test_version_7_3(tmp_path: Path, rows: Images, turned: bool) -> None:
    path = tmp_path / "DATA_Htrainin.mat"
    with h5py.File(path, "w") as file:
        file["HT"] = flat(rows).T if turned else flat(rows)
    seen = examine(path)
    assert (seen.verdict, seen.shape) == ("good", (ROWS, 2048))
    path.write_bytes(path.read_bytes()[:9000])
    assert "it can't be read" in words(examine(path))


def test_version_7_3_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htrainin.mat"
    with h5py.File(path, "w") as file:
        file.create_dataset("HT", (2048, 10**6), "f4", chunks=(2048, 1))
    assert "needs more than the 0 bytes that are stored" in words(examine(path))


# Files of one folder together


def test_rows_of_the_test_set_among_the_training_rows(tmp_path: Path, rows: Images) -> None:
    save(tmp_path / "DATA_Htrainin.mat", flat(rows[:150]))
    save(tmp_path / "DATA_Htestin.mat", flat(rows[140:]).astype(np.float64))
    found = checkup.check_folder(tmp_path, "indoor").files
    assert found["train"].verdict == "good"
    assert words(found["test"]).startswith(
        "suspicious: 10 of 52 rows are also in DATA_Htrainin.mat"
    )


@pytest.mark.parametrize("site", SITES)
def test_untruncated_channels_belong_to_the_test_rows(tmp_path: Path, site: Site) -> None:
    source = SyntheticSource(2, 32, 32)
    save(tmp_path / f"DATA_Htest{SUFFIX[site]}.mat", source.rows(site, "test", 0, 100))
    path = tmp_path / f"DATA_HtestF{SUFFIX[site]}_all.mat"
    channels = source.frequency_rows(site, "test", 0, 100)
    save(path, channels, "HF_all")
    checked = checkup.check_folder(tmp_path, site)
    assert checked.good
    assert checked.rho is not None
    assert checked.rho > 0.97
    wrong: dict[str, list[NDArray[Any]]] = {
        "expected near 1": [
            channels[::-1],
            channels[..., ::-1],
            np.fft.ifft(channels, axis=1),
            channels.conj(),
        ],
        "99 rows for 100": [channels[:99]],
        "expected complex": [np.abs(channels)],
    }
    for message, variants in wrong.items():
        for variant in variants:
            save(path, variant, "HF_all")
            test = checkup.check_folder(tmp_path, site).files["test"]
            assert test.verdict == "suspicious"
            assert message in words(test)


def test_a_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere doesn't exist; expected a folder"):
        checkup.environments(tmp_path / "nowhere")
    save(tmp_path / "channels.mat", np.ones(3))
    with pytest.raises(FileNotFoundError, match=r"none of CsiNet's files; .*'channels\.mat'"):
        checkup.environments(tmp_path)
    save(tmp_path / "DATA_Hvalout.mat", np.ones(3))
    assert checkup.environments(tmp_path) == ["outdoor"]


@pytest.mark.parametrize("site", SITES)
def test_cost_2100_files_are_good(site: Site, cost2100: Path) -> None:
    checked = checkup.check_folder(cost2100, site)
    assert {part: words(file) for part, file in checked.files.items()} == dict.fromkeys(
        ("train", "val", "test"), ""
    )


ORDERS = {
    "channels last": (0, 2, 3, 1),
    "parts between": (0, 2, 1, 3),
    "samples last": (1, 2, 3, 0),
    "samples last, parts before": (2, 3, 1, 0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_axes_in_another_order_need_a_transpose(rows: Images, tmp_path: Path, name: str) -> None:
    """Of four dimensions the shape tells; training names the same transpose as `check`."""
    order = ORDERS[name]
    given = rows.transpose(order)
    path = save(tmp_path / "DATA_Htrainin.mat", given)
    back = tuple(int(place) for place in np.argsort(order))
    seen = examine(path)
    assert seen.verdict == "unusable"
    assert f"save numpy.transpose(HT, ({', '.join(map(str, back))}))" in words(seen)
    np.testing.assert_array_equal(given.transpose(back), rows)
    assert seen.images is not None
    np.testing.assert_array_equal(seen.images, rows)
    axes = " ".join(str(place + 1) for place in back)
    with pytest.raises(ValueError, match=rf"numpy.transpose\(HT, .*permute\(HT, \[{axes}\]\)"):
        count_rows(path)


@pytest.mark.parametrize(
    ("order", "what"),
    [
        ((0, 2, 3, 1), "real and imaginary parts alternate instead"),
        ((0, 2, 1, 3), "real and imaginary parts alternate line by line"),
        ((0, 1, 3, 2), "the axes look swapped, delays before angles"),
        ((0, 3, 2, 1), "alternate.*the axes look swapped"),  # MATLAB's own flattening
    ],
)
def test_flat_rows_in_another_order_are_suspicious(
    rows: Images, tmp_path: Path, order: tuple[int, ...], what: str
) -> None:
    given = rows.transpose(order)
    seen = examine(save(tmp_path / "a.mat", flat(given)))
    assert seen.verdict == "suspicious"
    assert re.search(what, words(seen))
    again = flat(given)
    repairs = [f.repair for f in seen.findings if "HT.reshape" in f.repair]
    for repair in repairs:  # each repair follows those before
        found = re.search(r"HT(\.reshape\(.*\))", repair)
        assert found is not None
        again = eval(f"HT{found[1]}", {"HT": again})  # the line that a user would paste
    np.testing.assert_array_equal(again, flat(rows))


def test_what_octave_and_version_4_have(tmp_path: Path) -> None:
    old = save(tmp_path / "DATA_Htrainin.mat", np.full((2, 2048), 0.5), format="4")
    half = save_v73(tmp_path / "DATA_Hvalin.mat", np.full((3, 2048), 0.5, np.float16))
    octave = tmp_path / "DATA_Htestin.mat"
    with h5py.File(octave, "w") as file:
        group = file.create_group("HT")
        group["type"], group["value"] = np.bytes_("matrix"), np.full((2048, 3), 0.5)
    for path, message in (
        (old, r"version 4.*Octave with save -v7 DATA_Htrainin\.mat HT"),
        (octave, r"Octave's save -hdf5.*save -v7 DATA_Htestin\.mat HT"),
        (half, r"float16"),
    ):
        assert examine(path).verdict == "unusable"
        assert re.search(message, words(examine(path))), path
        with pytest.raises(ValueError, match=message):
            count_rows(path)
