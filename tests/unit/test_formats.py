"""Files that people really have, made by their own libraries: converted, trained on, evaluated.

`pytest -m long -s tests/unit/test_formats.py` prints the table of docs/data.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from csifiles import channels, save_v73
from harness import run_program
from scipy import io

from csipipe.channels import rawcheck, statistics
from csipipe.channels.command import main
from csipipe.channels.format import Description
from csipipe.channels.scenario import SCENARIOS, draw_rays
from csipipe.evaluation import command as evaluation

USERS = 400


def some(rx: int = 1, ports: int = 32, bins: int = 64, users: int = USERS) -> Any:
    """(users, rx, ports, bins) complex64."""
    return channels(users, rx, ports, bins)


def deepmimo_4(folder: Path) -> Path:
    """Its own channel generator on rays of ours, since its scenarios must be downloaded."""
    deepmimo = pytest.importorskip("deepmimo")
    rays = draw_rays(SCENARIOS["indoor"], USERS, np.random.default_rng(0))
    right = np.full(rays.delay.shape, 90.0)
    paths = {
        "power": 20 * np.log10(np.abs(rays.gain)),
        "phase": np.degrees(np.angle(rays.gain)),
        "delay": rays.delay * 50e-9,
        "aod_az": np.degrees(np.arcsin(np.clip(2 * rays.frequency, -1, 1))),
        "aod_el": right,
        "aoa_az": right - 60,
        "aoa_el": right,
    }
    for values in paths.values():
        values[::50] = np.nan  # blocked
    still = {"tx_vel": np.zeros(3), "rx_vel": np.zeros((USERS, 3))}
    places = {"tx_pos": np.zeros(3), "rx_pos": np.zeros((USERS, 3))}
    scene = SimpleNamespace(objects=[])
    dataset = deepmimo.Dataset({**paths, **still, **places, "scene": scene})
    asked = deepmimo.ChannelParameters(doppler=False, num_paths=20)
    asked.bs_antenna.shape, asked.ue_antenna.shape = np.array([32, 1]), np.array([2, 1])
    asked.ofdm.subcarriers, asked.ofdm.bandwidth = 256, 20e6
    asked.ofdm.selected_subcarriers = np.arange(256)
    np.save(folder / "deepmimo.npy", dataset.compute_channels(asked))
    return folder / "deepmimo.npy"


def sionna_ofdm(folder: Path) -> Path:
    """[batch, rx, rx antenna, tx, tx antenna, symbol, subcarrier], as Sionna's OFDM channel."""
    pytest.importorskip("sionna.phy")
    from sionna.phy import channel, config, ofdm
    from sionna.phy.channel import tr38901

    config.seed = 0
    common = {"carrier_frequency": 3.5e9, "antenna_pattern": "omni", "device": "cpu"}
    one = {"polarization": "single", "polarization_type": "V"}
    ue = tr38901.PanelArray(num_rows_per_panel=1, num_cols_per_panel=2, **one, **common)
    bts = tr38901.PanelArray(num_rows_per_panel=1, num_cols_per_panel=16, **one, **common)
    model = tr38901.CDL("C", 100e-9, 3.5e9, ue, bts, "downlink", min_speed=3.0, device="cpu")
    gain, delay = model(USERS // 2, 2, 30e3)
    bins = channel.subcarrier_frequencies(64, 300e3)
    assert ofdm is not None
    h = channel.cir_to_ofdm_channel(bins, gain, delay)
    np.save(folder / "sionna.npy", h.cpu().numpy())
    return folder / "sionna.npy"


def quadriga_mat(folder: Path) -> Path:
    """UE x BTS antenna x subcarrier x time, by SciPy."""
    h = some(rx=3).transpose(0, 2, 3, 1)
    io.savemat(folder / "H.mat", {"H": h})
    return folder / "H.mat"


def csv_rows(folder: Path) -> Path:
    """2,048 columns without a header, CsiNet's convention."""
    delays = np.fft.ifft(some()[:, 0], axis=-1)[..., :32]
    image = np.fft.fft(delays, axis=1)
    image = image / np.abs(image).max(axis=(1, 2), keepdims=True) / 2
    rows = np.stack([image.real, image.imag], axis=1).reshape(USERS, -1) + 0.5
    np.savetxt(folder / "rows.csv", rows, "%.6f", ",")
    return folder / "rows.csv"


def wifo(folder: Path) -> Path:
    """MAT v7.3, as MATLAB writes it: time x subcarrier x antenna per sample."""
    return save_v73(folder / "X_train.mat", some(rx=4).transpose(0, 1, 3, 2), "X_train")


def samples_last(folder: Path) -> Path:
    """The same with samples last."""
    return save_v73(folder / "X_last.mat", some(rx=4).transpose(1, 3, 2, 0), "X_train")


def hdata(folder: Path) -> Path:
    """(N, 1024) = 32 angles x 16 delays x 2."""
    c = np.fft.fft(np.fft.ifft(some()[:, 0], axis=-1)[..., :16], axis=1)
    io.savemat(folder / "Hdata.mat", {"H": np.stack([c.real, c.imag], -1).reshape(USERS, -1)})
    return folder / "Hdata.mat"


def paired_h5(folder: Path) -> Path:
    """126 subcarriers x 128 antennas x 2, by h5py, as h5py writes it."""
    h = some(ports=128, bins=126)[:, 0].transpose(0, 2, 1)
    with h5py.File(folder / "h.h5", "w") as file:
        file["h"] = np.stack([h.real, h.imag], -1)
    return folder / "h.h5"


def wifi_npy(folder: Path) -> Path:
    np.save(folder / "wifi.npy", some(rx=3, ports=4, bins=56))
    return folder / "wifi.npy"


def torch_pt(folder: Path) -> Path:
    torch.save({"h": torch.from_numpy(some(rx=2))}, folder / "h.pt")
    return folder / "h.pt"


def npz(folder: Path) -> Path:
    np.savez_compressed(folder / "h.npz", h=some()[:, 0])
    return folder / "h.npz"


FORMATS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "DeepMIMO v4": (deepmimo_4, "user rx tx subcarrier"),
    "Sionna": (sionna_ofdm, "user user rx bts tx time subcarrier"),
    "QuaDRiGa array, MAT v5": (quadriga_mat, "user tx subcarrier time"),
    "CsiNet's rows, CSV": (csv_rows, "sample (part angle=32 delay=32)"),
    "WiFo, MAT v7.3": (wifo, "sample time subcarrier tx"),
    "WiFo's derivative, samples last": (samples_last, "time subcarrier tx sample"),
    "Hdata.mat": (hdata, "sample (angle=32 delay=16 part)"),
    "126 × 128 × 2, HDF5": (paired_h5, "sample subcarrier tx part"),
    "Wi-Fi, .npy": (wifi_npy, "sample rx tx subcarrier"),
    "PyTorch, .pt": (torch_pt, "sample rx tx subcarrier"),
    "NumPy, .npz": (npz, "sample tx subcarrier"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_files_that_people_have_are_trained_on(name: str, tmp_path: Path) -> None:
    make, axes = FORMATS[name]
    file, folder, run = make(tmp_path), tmp_path / "data", tmp_path / "run"
    assert main(["convert", str(file), str(folder), "--axes", axes]) == 0
    said = Description.read(folder)
    [sets] = rawcheck.sets_of(folder, said.environments).values()
    pca = statistics.pca_db(*sets, (64,))[64] if said.angles * said.delays > 64 else None
    train = ["--data.source", "files", "--data.path", str(folder), "--run.dir", str(run)]
    size = ["--topology.ues", "2", "--train.batch_size", "16", "--train.micro_batches", "2"]
    few = ["--train.iterations", "60", "--model.c1", "64", "--model.name", "linear"]
    [rank] = run_program(1, [*train, *size, *few])
    assert rank.code == 0, rank.err
    assert evaluation.main([str(run)]) == 0
    found = json.loads((run / "evaluation" / "figures.json").read_text())
    [nmse_db] = [one["mean"]["nmse_db"] for one in found["runs"]]
    assert np.isfinite(nmse_db)
    rows = sum(one.rows for one in said.sets)
    lost = f"{said.made['energy_lost']:.2%}"
    reached = "—" if pca is None else f"{pca:.1f} dB"
    print(
        f'\nROW | {name} | `--axes "{axes}"` | {rows:,} | {said.angles} × {said.delays} | {lost} '
        f"| {reached} | {nmse_db:.1f} dB |"
    )
