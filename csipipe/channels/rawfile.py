"""A variable of a .mat file exactly as it is stored, for the doctor, which reads whatever it can.

Training reads through `matfile`, which refuses anything unexpected.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels import hdf5, mat5
from csipipe.channels.layout import Layout, Unfit


def read_variable(path: Path, layout: Layout) -> tuple[str, NDArray[Any]]:
    """The variable with the layout's name, or else the only one in the file; and its name.

    Raises:
        OSError: it can't be opened.
        ValueError: neither MAT v5 nor v7.3 (HDF5), damaged, or none of that name among several.
    """
    with path.open("rb") as file:
        head = file.read(128)
    try:
        if hdf5.is_hdf5(head):
            return _from_hdf5(path, layout)
        if head[:4] in mat5.VERSION_4:
            raise Unfit(
                f"it is a MAT file of version 4; save it again, in Octave with save -v7 "
                f"{path.name} {layout.key}"
            )
        found = {variable.name: variable for variable in mat5.variables(path)}
        name = _choose(layout, list(found))
        with mat5.opened(path, found[name]) as stored:
            return name, stored.rows(0, found[name].shape[0])
    except (Unfit, mat5.NoRoomError):
        raise
    except Exception as error:  # h5py raises whatever the damage leads to
        raise ValueError(
            f"it can't be read ({type(error).__name__}: {error}); it has "
            f"{path.stat().st_size:,} bytes and starts with {head[:10]!r}"
        ) from error


def _choose(layout: Layout, found: list[str]) -> str:
    if layout.key in found:
        return layout.key
    if len(found) == 1:
        return found[0]
    raise Unfit(f"it has no variable {layout.key}; found {sorted(found) or 'none'}")


def _from_hdf5(path: Path, layout: Layout) -> tuple[str, NDArray[Any]]:
    h5py = hdf5.library(path)
    with h5py.File(path, "r", locking=False) as file:
        own = [name for name in file if hdf5.is_own(h5py, file, name)]
        for name in own:
            if isinstance(file[name], h5py.Group) and hdf5.is_octaves(file[name]):
                raise Unfit(
                    f"it was saved by Octave's save -hdf5; save it again in Octave with save -v7 "
                    f"{path.name} {name}"
                )
        name = _choose(layout, [name for name in own if isinstance(file[name], h5py.Dataset)])
        hdf5.check_storage(file[name])
        values = np.asarray(file[name])
    if values.dtype.names == ("real", "imag"):  # how MATLAB writes complex numbers
        values = values["real"] + 1j * values["imag"]
    # MATLAB stores axes in reverse, other programs usually don't
    straight = values.ndim > 1 and math.prod(values.shape[1:]) == layout.width
    return name, values if straight else values.T
