"""Arrays of other programs, in any form, are read as rows; what can't is refused by name."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from convertruns import K, N, P, R, error, everything, run, saved, source
from csifiles import channels, save_v73
from scipy import io

from csipipe.channels import convert as converting
from csipipe.channels import inputs, rawarray, transform
from csipipe.channels.axes import parse
from csipipe.channels.command import main
from csipipe.channels.format import Description
from csipipe.channels.reading import example, guess


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
    with h5py.File(folder / "groups.h5", "w") as file:
        file["of/one/H"], file["of/rate"] = h, 20.0
        file["of/loop"] = file["of"]
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
        "HDF5, in groups": (folder / "groups.h5", [*usual, "--key", "of/one/H"]),
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
    assert "launch/train.py" in capsys.readouterr().out
    assert run(file, tmp_path / "half", *axes, "--sets", "test", "--key", "H_test") == 0
    assert capsys.readouterr().out.endswith("no training yet: there are no train rows\n")
    words = error(capsys, file, file, tmp_path / "c", *sets, "--key", "H_train H_test H_val")
    assert "--key 'H_train H_test H_val' has 3 words; expected 2, one for each file" in words


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
    assert main(["check", str(file)]) == 1
    twice = [file, file, tmp_path / "twice", "--axes", "sample rx tx subcarrier"]
    assert run(*twice, "--sets", "train test") == 0
    assert main(["check", str(tmp_path / "twice")]) == 1
    said = capsys.readouterr().out
    assert "SUSPICIOUS\n  suspicious: 200 of 200 test rows are also training rows" in said


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
    assert main(["check", str(tmp_path / "n.npy")]) == 1
    assert "  convert it, once its axes are right: python -m" in capsys.readouterr().out


def test_real_and_imaginary_parts_in_two_arrays_are_to_be_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = channels(rx=1)[:, 0]
    np.savez(tmp_path / "h.npz", re=h.real, im=h.imag)
    assert main(["check", str(tmp_path / "h.npz")]) == 1
    said = capsys.readouterr().out
    assert said.count("numpy.save('channels.npy', re + 1j * im)") == 2
    assert "convert it" not in said


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
        ("time tx subcarrier", "over time, call time sample"),
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
    with pytest.raises(
        ValueError, match=r"part \(real, imaginary\) has 3 entries in \(9, 8, 3, 4\)"
    ):
        parse("sample tx part subcarrier").sizes((9, 8, 3, 4))


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
    (folder / "remark.csv").write_text("1,2\n# 3,4\n5,6\n")
    pairs = ["--axes", "sample (part=2 tx=1 subcarrier)"]
    (folder / "x.dat").write_bytes(b"abcdefghijklmnop")
    axes = ["--axes", "sample tx subcarrier"]
    return {
        "axes": ([good, "--axes", "sample rx tx subcarrier"], r"names 4 axes.*\(60, 8, 48\)"),
        "part": ([good, "--axes", "sample part subcarrier"], "either tx or angle"),
        "finite": (
            [saved(folder / "n.npy", nan), *axes],
            r"first at \(17, 2, 5\).*all\(\(1, 2\)\)\]",
        ),
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
        "header": ([folder / "head.csv", *axes], "'re' is no number.*If that is a header"),
        "ragged csv": ([folder / "short.csv", *pairs], "lines 1 to 3.* at row 3; expected 2"),
        "remark in csv": ([folder / "remark.csv", *pairs], "string '# 3' .*1; expected 2"),
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
