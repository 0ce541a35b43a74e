"""What the tests of channels share: small files in CsiNet's format, and settings that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import io

from csipipe.channels.scenario import SCENARIOS, draw_rays
from csipipe.channels.source import Images, Site
from csipipe.settings.config import DataSettings

SITES: tuple[Site, ...] = ("indoor", "outdoor")


def images(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).random((count, 2, 32, 32), np.float32)


def save(path: Path, values: Any, key: str = "HT", **kwargs: Any) -> Path:
    io.savemat(path, {key: values}, **kwargs)
    return path


def channels(n: int = 60, rx: int = 2, ports: int = 8, bins: int = 48, seed: int = 0) -> Any:
    """(n, rx, ports, bins) complex64: rays that come early."""
    rng = np.random.default_rng(seed)
    made = np.empty((n, rx, ports, bins), np.complex64)
    for r in range(rx):
        rays = draw_rays(SCENARIOS["indoor"], n, rng)
        over_p = np.exp(2j * np.pi * rays.frequency[..., None] * np.arange(ports))
        over_k = np.exp(-2j * np.pi * rays.delay[..., None] * np.arange(bins) / bins)
        made[:, r] = np.einsum("br,brp,brk->bpk", rays.gain, over_p, over_k)
    return made


def csinet(folder: Path, seed: int = 0) -> DataSettings:
    return DataSettings(source="csinet", path=str(folder), seed=seed)


def save_v73(path: Path, values: NDArray[Any], key: str = "HT", **options: Any) -> Path:
    """As MATLAB writes it: axes reversed, the class in an attribute, MATLAB's own 512 bytes."""
    with h5py.File(path, "w", userblock_size=512) as file:
        if values.dtype.kind == "c":
            part = values.real.dtype
            turned = np.empty(values.T.shape, [("real", part), ("imag", part)])
            turned["real"], turned["imag"] = values.T.real, values.T.imag
        else:
            turned = values.T
        name = {"f4": "single", "c8": "single", "f8": "double", "c16": "double"}
        kind = name.get(values.dtype.str[1:], str(values.dtype))
        file.create_dataset(key, data=turned, **options).attrs["MATLAB_class"] = np.bytes_(kind)
    with path.open("rb+") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path
