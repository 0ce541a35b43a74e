"""Generated channels as CsiNet's files, for other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from csipipe import files
from csipipe.channels.csinet import SUFFIX
from csipipe.channels.layout import ANGLES, DELAYS, HF, HT, Layout
from csipipe.channels.source import Part, Site
from csipipe.channels.synthetic import SyntheticSource

_STEP = 1024
_LARGEST = 2**31 - 1
"""Most bytes of a MAT v5 variable."""


@dataclass(frozen=True)
class Written:
    """One file that was written."""

    path: Path
    rows: int
    seconds: float
    """CPU time of generating the rows, without writing."""


def write_files(
    folder: Path, environment: Site, *, train: int, val: int, test: int, seed: int
) -> Iterator[Written]:
    """Write `HT` of the three parts and `HF_all` of the test rows, MAT v5; yields each file.

    Validation rows follow the training rows in the synthetic source's stream. A part of 0 rows
    gets no file. A file appears under its name when it is complete.

    Raises:
        FileExistsError: one of the files already exists; then none is written.
        ValueError: a negative number of rows, none at all, or more than a MAT v5 file holds.
        OSError: the folder can't be written to, or the disk is full.
    """
    counts = {"train": train, "val": val, "test": test}
    for name, count in counts.items():
        most = _LARGEST // (HF.width * 8 if name == "test" else HT.width * 4)
        if not 0 <= count <= most:
            raise ValueError(f"{name} is {count}; expected 0 … {most:,} rows, as MAT v5 can hold.")
    if not sum(counts.values()):
        raise ValueError("train, val and test are all 0; expected rows of at least one part.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0.")

    source = SyntheticSource(seed, ANGLES, DELAYS)
    suffix = SUFFIX[environment]
    plans: list[tuple[Path, Layout, Part, int, int]] = [
        (folder / f"DATA_Htrain{suffix}.mat", HT, "train", 0, train),
        (folder / f"DATA_Hval{suffix}.mat", HT, "train", train, train + val),
        (folder / f"DATA_Htest{suffix}.mat", HT, "test", 0, test),
        (folder / f"DATA_HtestF{suffix}_all.mat", HF, "test", 0, test),
    ]
    plans = [plan for plan in plans if plan[3] < plan[4]]
    for path, *_ in plans:
        if path.exists():
            raise FileExistsError(
                f"{path} exists; generate overwrites nothing. Remove it or name another folder."
            )
    save = _savemat()
    folder.mkdir(parents=True, exist_ok=True)
    for path, layout, part, start, stop in plans:
        make = source.rows if layout is HT else source.frequency_rows
        begun = time.process_time()
        values = _make(partial(make, environment, part), layout, start, stop, path.name)
        spent = time.process_time() - begun
        _save(save, path, layout.key, values)
        yield Written(path, stop - start, spent)


def _make(
    rows: Callable[[int, int], NDArray[Any]], layout: Layout, start: int, stop: int, name: str
) -> NDArray[Any]:
    """Rows start … stop-1, flat as in CsiNet's files, with a progress bar."""
    dtype = np.float32 if layout.kind == "f" else np.complex64
    values = np.empty((stop - start, layout.width), dtype)
    with tqdm(total=stop - start, desc=name, unit="row", disable=None, leave=False) as bar:
        for first in range(start, stop, _STEP):
            piece = rows(first, min(first + _STEP, stop))
            values[first - start : first - start + len(piece)] = piece.reshape(len(piece), -1)
            bar.update(len(piece))
    return values


def _savemat() -> Callable[..., None]:
    """SciPy's, imported only here: whoever writes no .mat file needs no SciPy."""
    try:
        from scipy.io import savemat
    except ImportError as error:
        raise ValueError(
            f"CsiNet's files are written by SciPy, which can't be imported ({error}). Install it "
            "with: pip install scipy."
        ) from error
    save: Callable[..., None] = savemat
    return save


def _save(save: Callable[..., None], path: Path, key: str, values: NDArray[Any]) -> None:
    """Write beside `path`, then rename, so that it is never half written."""
    with files.whole(path, path.with_name(f"{path.name}.{os.getpid()}.partial")) as partial:
        with partial.open("wb") as file:  # given a name, savemat would append an ending
            save(file, {key: values})
        files.flush(partial)
