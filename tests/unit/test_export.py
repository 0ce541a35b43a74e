"""Exported parts against their originals; the scripts, run without this package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trainedruns
from runs import small
from torch import nn

from csipipe import models
from csipipe.export import bits as curve
from csipipe.export import check, command, folder, formats
from csipipe.export.learning import learn
from csipipe.export.parts import Pair, nmse_db, operations, run
from csipipe.measure.metrics import centred_nmse
from csipipe.run import trained
from csipipe.run.trained import Autoencoder
from csipipe.settings.commandline import RunParser
from csipipe.settings.config import CodecSettings, ModelSettings
from csipipe.settings.tables import MODELS

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX isn't installed: pip install -c constraints.txt -e '.[export]'",
)


# Size and operations


def test_operations_by_hand() -> None:
    size = ModelSettings(angles=32, delays=32)
    model = Autoencoder(size, nn.Sequential(*models.build_tail(size, 0)))
    pair = Pair.of(model.eval())
    pixels = 32 * 32
    row = torch.rand(1, 2, 32, 32)
    assert operations(pair.encoder, row) == 2 * 2 * 9 * pixels + 2048 * 256
    block = 2 * 7 * 9 + 7 * 7 * (9 + 9) + 2 * 7 * 5 + 7 * 7 * 5 + 14 * 2
    decoder = 256 * 2048 + 2 * 2 * 9 * pixels + 2 * block * pixels + 2048 * 256 + 256 * 2048
    assert operations(pair.decoder, pair.encoder(row).detach()) == decoder


# The command


def export(*arguments: object) -> None:
    parser = RunParser("export", "")
    command.add_arguments(parser)
    options, settings = parser.parse([str(argument) for argument in arguments])
    command.export(options, settings)


def alone(
    script: Path, without: tuple[str, ...], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own that can't import this package, nor some others."""
    gone = dict.fromkeys((*without, "csipipe", "deepspeed"))
    code = (
        f"import runpy, sys; sys.modules |= {gone}\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    line = [sys.executable, "-W", "ignore", "-c", code, str(script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=script.parent)


def wanted(place: Path, ue: int) -> tuple[Pair, torch.Tensor, torch.Tensor]:
    """The run's own parts of a UE, the exported samples, and their codewords."""
    pair = Pair.of(trained.read(place).models([ue])[0])
    [out] = (place / "export").iterdir()
    h = torch.from_numpy(np.fromfile(out / "samples.f32", "<f4")).reshape(-1, 2, 8, 8)
    return pair, h, run(pair.encoder, h)


def test_a_pair_goes_out_and_does_feedback_with_torch_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = trainedruns.finish(tmp_path / "run")
    export(tmp_path / "run", "--ue", 2, "--formats", "pt2")
    printed = capsys.readouterr().out
    assert "UE 2 of" in printed
    assert "isn't finished" not in printed
    out = tmp_path / "run" / "export" / "ue-2"
    names = ["decoder.pt2", "encoder.pt2", "export.json", "feedback.py", "samples.f32"]
    assert sorted(path.name for path in out.iterdir()) == names
    content = json.loads((out / "export.json").read_text())
    assert content["checked"]["pt2"]["encoder"] <= check.BOUND
    part = content["parts"]["encoder"]
    assert part["parameters"] == models.count_parts(worker.settings.model)["encoder"]
    data = (out / "encoder.pt2").read_bytes()
    file = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert part["files"] == {"encoder.pt2": file}

    pair, h, z = wanted(tmp_path / "run", 2)
    torch.testing.assert_close(h, worker.test[: command.SAMPLES])
    ended = alone(out / "feedback.py", ("numpy", "safetensors"))
    assert ended.returncode == 0, ended.stderr
    db = nmse_db(run(pair.decoder, z), h)
    assert ended.stdout == f"16 channels, {24 * 4} bytes of feedback each, NMSE {db:.2f} dB\n"

    (out / "encoder.pt2").write_bytes(data[:-1] + b"?")
    refused = alone(out / "feedback.py", ())
    assert refused.returncode == 1
    assert "encoder.pt2 isn't the file that this script was written with" in refused.stderr


def test_a_codeword_that_was_trained_for_its_bits_goes_out_with_them(tmp_path: Path) -> None:
    trained_for = {"codec": CodecSettings(smashed="int2"), "scale": "range"}
    worker = trainedruns.finish(tmp_path / "run", comm=trained_for)
    export(tmp_path / "run", "--ue", 1, "--formats", "pt2")
    out = tmp_path / "run" / "export" / "ue-1-2bit"
    content = json.loads((out / "export.json").read_text())
    assert (content["bits_per_entry"], content["bits_per_channel"]) == (2, 48)
    assert content["checked"]["pt2"]["encoder"] <= check.BOUND
    # with the wire in training, without it in evaluations, and exported: the same
    ue = worker.ues[1]
    for part in (ue, worker.tail):
        part.train(False)
    with torch.no_grad():
        h_hat = ue.head(worker.tail(ue.encoder(worker.test)))
    assert content["original"]["nmse_db"] == pytest.approx(nmse_db(h_hat, worker.test), abs=1e-4)
    lines = (out / "bits.csv").read_text().splitlines()
    points = {int(line.split(",")[0]): float(line.split(",")[2]) for line in lines[1:]}
    assert points[2] == pytest.approx(content["original"]["nmse_db"], abs=1e-3)
    assert len({round(db, 6) for db in points.values()}) > 3  # others are quantised afterwards


def test_with_bits_the_codeword_is_packed_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainedruns.finish(tmp_path / "a run", model={"c1": 21})  # 63 bits: not whole bytes
    export(tmp_path / "a run", "--ue", 1, "--bits", 3, "--formats", "pt2")
    printed = capsys.readouterr().out
    out = tmp_path / "a run" / "export" / "ue-1-3bit"
    assert f"try it:       python '{out}/feedback.py'" in printed
    pair, _, z = wanted(tmp_path / "a run", 1)
    ue = trainedruns.begin(tmp_path / "again", model={"c1": 21}).ues[1]
    quantiser = learn(run(pair.encoder, ue.rows), 3)  # from the UE's training rows, no others
    code = quantiser.to_bits(z)
    script = runpy.run_path(str(out / "feedback.py"))["main"]
    with torch.no_grad():
        script(["encode", str(out / "samples.f32"), str(out / "up")])
        script(["decode", str(out / "up"), str(out / "back")])
    sent = np.fromfile(out / "up", np.uint8).reshape(16, 8)
    np.testing.assert_array_equal(np.unpackbits(sent, axis=1, count=63), code)
    h_hat = np.fromfile(out / "back", np.float32).reshape(16, 2, 8, 8)
    np.testing.assert_allclose(h_hat, run(pair.decoder, quantiser.from_bits(code)), atol=1e-6)

    (out / "short").write_bytes(b"x" * 9)
    for way, size in (("encode", 512), ("decode", 8)):
        with pytest.raises(SystemExit, match=f"short has 9 bytes; expected {size} for each"):
            script([way, str(out / "short"), str(out / "none")])
    for source, target, said in (
        ("missing", "up", "missing: No such file or directory"),
        ("samples.f32", "no/up", "no/up: No such file or directory"),
        ("samples.f32", "/dev/full", "/dev/full: No space left on device"),
    ):
        ended = alone(out / "feedback.py", (), "encode", source, target)
        assert (ended.returncode, ended.stderr) == (1, f"{said}\n")

    weak = 0.5 + 0.02 * (torch.rand(16, 2, 8, 8) - 0.5)  # the error is larger
    weak.numpy().tofile(out / "samples.f32")
    with torch.no_grad():
        script([])
        code = quantiser.to_bits(run(pair.encoder, weak))
    db = nmse_db(run(pair.decoder, quantiser.from_bits(code)), weak)
    [said] = capsys.readouterr().out.splitlines()
    assert said == f"16 channels, 8 bytes of feedback each, NMSE {db:.2f} dB"
    assert abs(db) > 0.1

    lines = (out / "bits.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [str(b), str(21 * b)] for b in range(1, 11)
    ]
    content = json.loads((out / "export.json").read_text())
    assert float(lines[3].split(",")[2]) == pytest.approx(
        content["checked"]["pt2"]["nmse_db"], abs=1e-4
    )
    assert content["bits_per_channel"] == 63
    assert (out / "bits.png").read_bytes()[:4] == b"\x89PNG"
    assert "bits per entry" in printed


@needs_onnx
@pytest.mark.parametrize("bits", [3, pytest.param(None, marks=pytest.mark.long)])
def test_onnx_does_the_same_without_torch(bits: int | None, tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run", "fedavgper", model={"c1": 21})
    more = [] if bits is None else ["--bits", bits]
    export(tmp_path / "run", "--ue", 0, "--formats", "onnx", *more)
    [out] = (tmp_path / "run" / "export").iterdir()
    assert not list(out.glob("*.pt2"))
    ended = alone(out / "feedback_onnx.py", ("torch",))
    assert ended.returncode == 0, ended.stderr
    _, h, _ = wanted(tmp_path / "run", 0)
    for arguments in (("encode", out / "samples.f32", "up"), ("decode", "up", "back")):
        ended = alone(out / "feedback_onnx.py", ("torch",), *arguments)
        assert ended.returncode == 0, ended.stderr
    (out / "short").write_bytes(b"x" * 9)
    for way in ("encode", "decode"):
        ended = alone(out / "feedback_onnx.py", ("torch",), way, out / "short", "none")
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"{out / 'short'} has 9 bytes; expected ")
    ended = alone(out / "feedback_onnx.py", ("torch",), "encode", "samples.f32", "/dev/full")
    assert (ended.returncode, ended.stderr) == (1, "/dev/full: No space left on device\n")
    assert (out / "up").stat().st_size == 16 * (21 * 4 if bits is None else 8)  # 63 bits
    h_hat = torch.from_numpy(np.fromfile(out / "back", np.float32)).reshape(h.shape)
    content = json.loads((out / "export.json").read_text())
    assert content["checked"]["onnx"]["decoder"] <= check.BOUND
    db = 10 * float(centred_nmse(h_hat, h).mean().log10())
    assert abs(db - content["original"]["nmse_db"]) < (0.5 if bits is None else 3)
    assert f"NMSE {db:.2f} dB" in alone(out / "feedback_onnx.py", ("torch",)).stdout


@needs_onnx
@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_out_in_both_formats(name: str, tmp_path: Path) -> None:
    """Files are compared with the modules, and refused if they differ by more than 1e-5."""
    trainedruns.finish(tmp_path / "run", model={"name": name, "c2": None})
    export(tmp_path / "run", "--ue", 1, "--formats", "pt2", "onnx")
    [out] = (tmp_path / "run" / "export").iterdir()
    content = json.loads((out / "export.json").read_text())
    assert set(content["checked"]) == {"pt2", "onnx"}
    for end in ("encoder", "decoder"):
        assert all(found[end] <= check.BOUND for found in content["checked"].values())
    pair, h, z = wanted(tmp_path / "run", 1)
    db = f"NMSE {nmse_db(run(pair.decoder, z), h):.2f} dB"
    assert db in alone(out / "feedback.py", ()).stdout
    assert db in alone(out / "feedback_onnx.py", ("torch",)).stdout


def test_unfinished_training_is_exported_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainedruns.snapshot(tmp_path / "run", trainedruns.begin(tmp_path / "run"), 7)
    out = tmp_path / "elsewhere"
    export(tmp_path / "run", "--ue", 0, "--formats", "pt2", "--out", out)
    first = capsys.readouterr().out.splitlines()[0]
    assert "iteration 7 of 10" in first
    assert "training isn't finished" in first
    assert json.loads((out / "export.json").read_text())["finished"] is False


def test_mistakes_are_named_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run"
    trainedruns.finish(place)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis").touch()
    torch_alone = ["--formats", "pt2"]
    for arguments, message in (
        ([place, *torch_alone], "--ue is missing; the run has UEs 0 … 3"),
        ([place, "--ue", 4, *torch_alone], "--ue is 4; the run has UEs 0 … 3"),
        ([place, "--ue", -1, *torch_alone], "--ue is -1"),
        ([place, "--ue", 0, "--bits", 0, *torch_alone], "0 bits per entry"),
        (
            [place, "--ue", 0, "--out", tmp_path / "taken", *torch_alone],
            "taken exists and holds no export.json; choose",
        ),
        ([place, "--ue", 0, "--formats", "tflite"], "invalid choice: 'tflite'"),
        ([place, "--ue", 0, "--bits", 4, "--data.seed", 1, *torch_alone], "the manifest's"),
    ):
        with pytest.raises(ValueError, match=message):
            export(*arguments)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs .*onnxruntime.*\n  pip install .*'\.\[export\]'"):
        export(place, "--ue", 0)
    assert not (place / "export").exists()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis"]


class _Counting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), 2, 3)


def test_a_model_for_one_number_of_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^the decoder can't be .*\(2, those.* use x\.shape\[0\]\."
    ):
        formats.save(_Counting(), torch.zeros(2, 6), ("a", "b"), tmp_path / "decoder.pt2")


def test_a_pair_that_does_something_else_is_refused() -> None:
    settings = small()
    tail = nn.Sequential(*models.build_tail(settings.model, 0))
    pair = Pair.of(Autoencoder(settings.model, tail).eval())
    h = torch.rand(9, 2, 8, 8)

    def off(rows: torch.Tensor) -> torch.Tensor:
        return run(pair.decoder, rows) + torch.tensor([2e-5])

    fine = check.compare(pair, lambda rows: run(pair.encoder, rows), off, h)
    assert fine.encoder == 0
    with pytest.raises(RuntimeError, match=r"exported decoder \(pt2\) differs .* by 2\.0e-05"):
        fine.check("pt2")
    found = check.compare(pair, lambda rows: run(pair.encoder, rows) * (1 + 1e-4), off, h)
    with pytest.raises(RuntimeError, match="exported encoder"):
        found.check("pt2")

    def one_entry_off(rows: torch.Tensor) -> torch.Tensor:
        z = run(pair.encoder, rows)
        z[3, 5] += 1e-3 * z.abs().max()
        return z

    assert check.compare(pair, one_entry_off, off, h).encoder == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(RuntimeError, match="exported encoder"):
        check.Difference(float("nan"), 0.0, (0, 0), 0.0).check("pt2")
    quantised = Pair.of(Autoencoder(settings.model, tail).eval(), learn(run(pair.encoder, h), 4))
    flipped = check.compare(
        quantised, lambda rows: 1 - run(quantised.encoder, rows), quantised.decoder, h
    )
    assert flipped.bits[0] == flipped.bits[1] == 9 * 24 * 4
    assert flipped.encoder > 0.01


def test_what_each_bit_gains_by_hand() -> None:
    points = [curve.Point(1, 4, -3.0), curve.Point(2, 8, -9.5)]
    _, one, two, whole = curve.table(points, -10.0).splitlines()
    assert one.split() == ["1", "4", "-3.00", "7.00"]
    assert two.split() == ["2", "8", "-9.50", "0.50"]
    assert whole.split()[-3:] == ["128", "-10.00", "0.00"]  # 4 entries of 32 bits


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"

    def fill(text: str, fail: bool = False) -> None:
        with folder.whole(out, folder.MANIFEST) as place:
            (place / folder.MANIFEST).write_text(text)
            assert not fail

    with pytest.raises(AssertionError):
        fill("first", fail=True)
    assert list((tmp_path / "a").iterdir()) == []
    fill("second")
    with pytest.raises(AssertionError):
        fill("third", fail=True)
    assert (out / folder.MANIFEST).read_text() == "second"
    fill("fourth")
    assert (out / folder.MANIFEST).read_text() == "fourth"
    assert list((tmp_path / "a").iterdir()) == [out]


def test_every_number_of_bits_has_its_point(tmp_path: Path) -> None:
    worker = trainedruns.finish(tmp_path / "run")
    [model] = trained.read(tmp_path / "run").models([0])
    z = run(Pair.of(model).encoder, worker.ues[0].rows)
    points, whole = curve.measure(model, lambda bits: learn(z, bits), worker.test)
    assert [point.total for point in points] == [24 * b for b in range(1, 11)]
    assert points[9].nmse_db == pytest.approx(whole, abs=1e-3)
    assert points[0].nmse_db != pytest.approx(whole, abs=1e-6)
    assert f"{whole:.2f}" in curve.table(points, whole).splitlines()[-1]


def test_rows_without_energy_have_no_part_in_the_mean() -> None:
    h = torch.full((3, 2, 4, 4), 0.5)
    h[0, 0, 0, 0], h[1, 0, 0, 0] = 1.0, 0.0
    h_hat = h.clone()
    h_hat[1, 0, 0, 0] = 0.5  # NMSE 0 and 1; the third row has none
    assert nmse_db(h_hat, h) == pytest.approx(10 * math.log10(0.5))
