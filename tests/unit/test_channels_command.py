"""csipipe channels, run in this process; statistics and pictures on the way."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from csifiles import channels
from matplotlib.figure import Figure
from scipy import io

from csipipe.channels import command, open_source, statistics
from csipipe.channels.csinet import frequency_channels
from csipipe.channels.source import Images, Part, Site, check_range
from csipipe.channels.synthetic import SyntheticSource
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import SOURCES, SourceSpec


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


# Statistics, worked out by hand


def four_bins() -> Images:
    """Two samples of 2 angles x 2 delays, energies .04 + .12 (of .16) and .01."""
    images = np.full((3, 2, 2, 2), 0.5, np.float32)
    images[0, 0, 0, 0] += 0.2
    images[0, 1, 1, 1] -= 0.12**0.5
    images[1, 0, 1, 1] += 0.1
    return images  # the third has no energy


def test_statistics_by_hand() -> None:
    found = statistics.measure(four_bins())
    assert found.rows == 2
    assert found.power == pytest.approx(0.17 / 16)
    np.testing.assert_allclose(found.delay_profile, [0.125, 0.875], atol=1e-6)
    np.testing.assert_allclose(found.angle_profile, [0.125, 0.875], atol=1e-6)
    assert found.first_delays == pytest.approx({1: 0.125, 2: 1.0})
    assert found.best_bins == pytest.approx({1: 0.875, 2: 1.0, 4: 1.0})
    assert found.near_zero == pytest.approx(13 / 16)
    # ||h||^2 is 8 x .25 + energy + the sum of the deviations, as .25 + d + d^2 each
    first, second = 0.16 / (2.16 + 0.2 - 0.12**0.5), 0.01 / (2.01 + 0.1)
    assert found.floor == pytest.approx((first + second) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="none of 1 rows has energy"):
        statistics.measure(four_bins()[2:])


def test_pca_of_rows_in_a_subspace_leaves_nothing_of_them() -> None:
    rng = np.random.default_rng(0)
    code, basis = rng.normal(size=(400, 64)), np.linalg.qr(rng.normal(size=(200, 64)))[0]
    images = (0.5 + 0.01 * code @ basis.T).astype(np.float32).reshape(400, 2, 10, 10)
    found = statistics.pca_db(*statistics.four_fifths(images))
    assert list(found) == [64, 128]  # 256 components of 320 rows say nothing
    assert found[64] < -40
    other = (0.5 + 0.01 * rng.normal(size=(80, 200))).astype(np.float32).reshape(80, 2, 10, 10)
    # of the energy in no particular direction, 64 of 200 components hold 32 %
    assert statistics.pca_db(images, other)[64] == pytest.approx(10 * np.log10(0.68), abs=0.2)
    assert statistics.pca_db(images[:100], other) == {}


def test_bars_and_spacing() -> None:
    assert statistics.bars(np.array([0.0, 0.25, 0.5, 1.0])) == " ▂▄█"
    assert statistics.spaced(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert statistics.spaced(np.arange(3), 4).tolist() == [0, 1, 2]


# generate


def test_generated_files_hold_the_synthetic_rows(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    counts = ("--train", 40, "--val", 10, "--test", 7, "--seed", 3)
    assert run("generate", folder, "--environment", "outdoor", *counts) == 0
    names = ["Htrainout", "Hvalout", "Htestout", "HtestFout_all"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"DATA_{n}.mat" for n in names)
    made = SyntheticSource(3, 32, 32)
    train = [io.loadmat(folder / f"DATA_{name}.mat")["HT"] for name in names[:2]]
    assert {values.dtype for values in train} == {np.dtype(np.float32)}
    expected = made.rows("outdoor", "train", 0, 50).reshape(50, 2048)
    np.testing.assert_array_equal(np.concatenate(train), expected)
    source = open_source(DataSettings(source="csinet", path=str(folder)), 32, 32)
    test = source.rows("outdoor", "test", 0, 7)
    np.testing.assert_array_equal(test, made.rows("outdoor", "test", 0, 7))
    channels = frequency_channels(folder, "outdoor")
    np.testing.assert_array_equal(channels, made.frequency_rows("outdoor", "test", 0, 7))


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "DATA_Htestin.mat").write_text("mine")
    assert run("generate", tmp_path, "--train", 4, "--val", 0, "--test", 2) == 1
    error = capsys.readouterr().err
    assert error.startswith("csipipe: error: ")
    assert error.count("\n") == 1
    assert "DATA_Htestin.mat exists" in error
    assert [path.name for path in tmp_path.iterdir()] == ["DATA_Htestin.mat"]


def test_a_failed_write_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(file: object, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scipy.io.savemat", full)
    assert run("generate", tmp_path, "--train", 4, "--val", 0, "--test", 0) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", -1), r"train is -1; expected 0 … 262,143 rows"),
        (("--test", 70_000), r"test is 70000; expected 0 … 67,108 rows"),
        (("--train", 0, "--val", 0, "--test", 0), r"are all 0"),
        (("--seed", -1), r"seed is -1"),
        (("--environment", "attic"), r"environment.*attic"),
        (("--trian", 3), r"trian"),
        (("--env", "outdoor"), r"--env"),
    ],
)
def test_arguments_that_cant_be_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    assert run("generate", tmp_path / "new", *arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"csipipe: error: [^\n]*{message}[^\n]*\n", error), error
    assert not (tmp_path / "new").exists()


# check


def test_check_reports_and_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csipipe.channels.checkup.GENERATED", (300, 100))
    run("generate", tmp_path, "--train", 200, "--val", 0, "--test", 100)
    capsys.readouterr()
    assert run("check", tmp_path, "--beside", "synthetic") == 0
    said = capsys.readouterr().out
    assert "DATA_Htrainin.mat: GOOD" in said
    assert "HT (200, 2048) float32, from " in said
    assert "ρ with HF_all 0.99" in said
    lines = {line[:27].strip(): line[27:].split() for line in said.splitlines()}
    assert lines["rows looked at"] == ["200", "300"]
    columns = lines["energy in the first 2"]
    assert len(columns) == 2
    assert float(columns[0]) == pytest.approx(0.86, abs=0.05)
    assert lines["NMSE of PCA-64"][1] == "dB"
    assert lines["NMSE of PCA-256"][:3] == ["too", "few", "rows"]

    path = tmp_path / "DATA_Htrainin.mat"
    io.savemat(path, {"HT": io.loadmat(path)["HT"] - np.float32(0.5)})
    assert run("check", tmp_path, "--environment", "indoor") == 1
    said = capsys.readouterr().out
    assert "DATA_Htrainin.mat: UNUSABLE" in said
    assert "unusable: values lie in [-0.5, 0.5] around 0" in said
    assert "repair: add 0.5 to every value" in said
    assert "DATA_Htestin.mat: GOOD" in said


def test_check_shows_a_converted_folder_beside_another_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csipipe.channels.checkup.GENERATED", (300, 100))
    np.save(tmp_path / "h.npy", channels(100))
    words = "--axes", "sample rx tx subcarrier"
    for folder, places in (("one", "indoor"), ("other", "hall"), ("vectors", "hall")):
        more = ("--eigenvectors", "true") if folder == "vectors" else ()
        files = tmp_path / "h.npy", tmp_path / folder
        assert run("convert", *files, *words, "--environments", places, *more) == 0
    run("generate", tmp_path / "csinet", "--train", 200, "--val", 0, "--test", 100)

    def columns(source: str, beside: str) -> list[tuple[str, str]]:
        """Headings, and the rows of each."""
        other = beside if beside == "synthetic" else tmp_path / beside
        capsys.readouterr()
        run("check", tmp_path / source, "--beside", other)
        lines = capsys.readouterr().out.splitlines()
        rows = next(n for n, line in enumerate(lines) if line.startswith("rows looked at"))
        return list(zip(*(re.split(" {2,}", lines[n])[1:] for n in (rows - 1, rows)), strict=True))

    generated = "beside: synthetic"
    one = [("indoor", "180")]
    assert columns("one", "synthetic") == [*one, (f"{generated} indoor", "300")]
    assert columns("one", "other") == [*one, ("beside: other hall", "180")]
    both = [(f"{generated} {site}", "300") for site in ("indoor", "outdoor")]
    assert columns("other", "synthetic") == [("hall", "180"), *both]
    assert columns("csinet", "other") == [("csinet", "200"), ("beside: other hall", "180")]
    assert columns("vectors", "vectors")[1] == ("beside: vectors hall", "90")
    for source, beside in (("one", "vectors"), ("vectors", "synthetic"), ("csinet", "nowhere")):
        other = beside if beside == "synthetic" else tmp_path / beside
        assert run("check", tmp_path / source, "--beside", other) == 1
    said = capsys.readouterr().err
    assert "its images are of kind eigenvectors, those of" in said
    assert "give a folder of the same kind" in said
    assert "nowhere doesn't exist" in said
    monkeypatch.chdir(tmp_path)  # a folder may be called as a source is that reads one
    run("check", "csinet")
    assert "DATA_Htrainin.mat: GOOD" in capsys.readouterr().out


def test_check_of_what_isnt_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", tmp_path / "nowhere") == 1
    assert "nowhere doesn't exist" in capsys.readouterr().err
    run("generate", tmp_path, "--train", 2, "--val", 0, "--test", 0)
    assert run("check", tmp_path, "--environment", "outdoor") == 1
    assert "has no environment 'outdoor'; expected one of indoor." in capsys.readouterr().err


def test_unreadable_files_are_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "DATA_Htestin.mat").write_bytes(b"\0" * 300)
    assert run("check", tmp_path) == 1
    said = capsys.readouterr()
    assert "DATA_Htestin.mat: UNUSABLE" in said.out
    assert said.err == ""
    assert run("look", tmp_path) == 1
    assert "has rows that can be drawn" in capsys.readouterr().err


# look


def test_look_writes_a_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csipipe.channels.checkup.GENERATED", (10, 20))
    path = tmp_path / "channels.png"
    assert run("look", "synthetic", "--output", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    run("generate", tmp_path, "--train", 0, "--val", 0, "--test", 2)
    assert run("look", tmp_path, "--output", path) == 0  # fewer rows than panels
    assert run("look", "synthetic", "--output", tmp_path / "channels.pdf") == 1
    assert "ends in .png" in capsys.readouterr().err
    assert "matplotlib.pyplot" not in sys.modules


def test_one_environment_of_a_converted_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    file = tmp_path / "h.npy"
    np.save(file, channels(100))
    words = ["--axes", "sample rx tx subcarrier", "--environments", "street hall"]
    assert run("convert", file, file, tmp_path / "c", *words) == 0
    for name in ("check", "look"):
        capsys.readouterr()
        assert run(name, tmp_path / "c", "--environment", "hall") == 0
        said = capsys.readouterr().out
        assert "hall" in said
        assert "street" not in said
        assert run(name, tmp_path / "c", "--environment", "attic") == 1
        expected = "has no environment 'attic'; expected one of street, hall."
        assert expected in capsys.readouterr().err


def test_look_at_a_file_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "h.npy"
    np.save(file, channels())
    assert run("look", file) == 1
    said = capsys.readouterr().err
    assert "is a file; expected a folder" in said
    assert said.endswith(f"Convert it first; how, says: python -m csipipe channels check {file}\n")


def test_look_names_the_axes_as_far_as_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: set[str] = set()

    def looked_at(source: object) -> set[str]:
        labels.clear()
        assert run("look", source) == 0
        return labels - {""}

    def read(figure: Figure, *_: object, **__: object) -> None:
        for axis in figure.axes:
            labels.update((axis.get_xlabel(), axis.get_title()))

    monkeypatch.setattr(Figure, "savefig", read)
    monkeypatch.setattr("csipipe.channels.checkup.GENERATED", (10, 20))
    samples = {"sample 1", "sample 2", "sample 3"}
    profiles = samples | {"mean delay profile", "mean angle profile"}
    by_antenna = "angle (bins of 1/{} cycle per antenna)"
    known = {"delay (bins of 50 ns)", by_antenna.format(32)}
    assert looked_at("synthetic") == profiles | known

    np.save(tmp_path / "h.npy", channels())
    words = tmp_path / "h.npy", "--axes", "sample rx tx subcarrier"
    assert run("convert", words[0], tmp_path / "line", *words[1:]) == 0
    assert looked_at(tmp_path / "line") == profiles | {"delay bin", by_antenna.format(8)}
    planar = "--array", "2x2x2"
    assert run("convert", words[0], tmp_path / "planar", *words[1:], *planar) == 0
    assert looked_at(tmp_path / "planar") == profiles | {"delay bin", "angle bin, 8 in all"}
    vectors = "--eigenvectors", "true", "--subbands", 4
    assert run("convert", words[0], tmp_path / "vectors", *words[1:], *vectors) == 0
    profiles = samples | {"mean port profile", "mean subband profile"}
    assert looked_at(tmp_path / "vectors") == profiles | {"port (of 8)", "subband (of 4)"}


class Hall(SyntheticSource):
    """Few rows of another size, in another environment."""

    environments = ("hall",)

    def available(self, environment: Site, part: Part) -> int:
        return 30 if part == "train" else 12

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        check_range(start, stop, self.available(environment, part))
        return super().rows("indoor", part, start, stop)


def open_hall(data: DataSettings, angles: int | None, delays: int | None) -> Hall:
    assert data.path is None or Path(data.path).is_dir()
    return Hall(data.seed, angles or 8, delays or 4)


@pytest.mark.parametrize("folder", [False, True])
def test_a_source_of_ones_own_is_shown_as_what_it_is(
    folder: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes = "beam {}", "tap"
    row = SourceSpec(about="thrown away", open=f"{__name__}:open_hall", folder=folder, axes=axes)
    monkeypatch.setitem(SOURCES, "mine", row)
    mine = f"mine:{tmp_path}" if folder else "mine"
    labels: set[str] = set()
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *_, **__: labels.update(axis.get_xlabel() for axis in figure.axes),
    )
    assert run("look", mine, "--output", tmp_path / "channels.png") == 0
    assert f"hall ({mine}, 12 test rows)" in capsys.readouterr().out
    assert labels - {""} == {"beam 8", "tap"}
    assert run("check", mine, "--beside", mine) == 0
    said = capsys.readouterr().out
    assert f"beside: {mine} hall" in said
    assert re.search(r"rows looked at +30 +30", said)


def test_look_knows_the_width_of_a_delay_bin_of_a_generated_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: set[str] = set()

    def read(figure: Figure, *_: object, **__: object) -> None:
        labels.update(axis.get_xlabel() for axis in figure.axes)

    monkeypatch.setattr(Figure, "savefig", read)
    made = tmp_path / "made"
    numbers = "--train", 8, "--val", 0, "--test", 4, "--array", "8x1x1", "--bandwidth", 30
    assert run("generate", made, "--model", "indoor", *numbers) == 0
    assert run("look", made) == 0
    assert "delay (bins of 33.33 ns)" in labels
    said = json.loads((made / "channels.json").read_text())
    for scene in (3, {"bandwidth_mhz": "wide"}, {"bandwidth_mhz": -1}):  # written by others
        (made / "channels.json").write_text(json.dumps(said | {"made": {"scene": scene}}))
        labels.clear()
        assert run("look", made) == 0
        assert "delay bin" in labels


def test_a_traceback_may_be_asked_for_behind_the_command() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere doesn't exist"):
        run("check", "/nowhere", "--debug")
