"""Generated channels of any array, converted like anybody's to csipipe's own format."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from csipipe.channels import convert, planar, tr38901
from csipipe.channels.convert import Tally
from csipipe.channels.format import Description, SetPart
from csipipe.channels.inputs import Input, Plan
from csipipe.channels.scene import Block, Scene, stream

BLOCKS: dict[str, Block] = {
    **dict.fromkeys(planar.MODELS, planar.block),
    **dict.fromkeys(tr38901.MODELS, tr38901.block),
}
"""Who makes the channels of a model."""
AXES = "sample time rx tx subcarrier"


def generate(
    folder: Path, model: str, scene: Scene, users: dict[SetPart, int], plan: Plan
) -> tuple[Description, Tally]:
    """Make channels, beside `folder`, and convert them into it; see `convert.convert`.

    Args:
        users: how many of each set; of 0 there is no set.
        plan: its axes and geometry are the scene's.

    Raises:
        ValueError: an unknown model, negative numbers of users, none at all, or no Sionna.
        FileExistsError, OSError: as `convert.convert`.
    """
    if model not in BLOCKS:
        raise ValueError(f"--model is {model!r}; it must be one of {', '.join(BLOCKS)}.")
    if min(users.values()) < 0 or not sum(users.values()):
        raise ValueError(f"rows are {users}; expected at least 0 of each set, and one of any.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    inputs = []
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        for number, (part, count) in enumerate(users.items()):
            if count:
                path = Path(place) / f"{model}-{part}.npy"
                try:
                    _write(path, model, scene, plan.seed, number, count)
                except OSError as error:
                    error.filename = str(folder)
                    raise
                inputs.append(Input(path, "all", part))
        return convert.convert(inputs, folder, plan, {"model": model, "scene": asdict(scene)})


def _write(path: Path, model: str, scene: Scene, seed: int, part: int, users: int) -> None:
    """(users, T, R, P, K) complex64 into an .npy file, with a progress bar."""
    described = {"descr": "<c8", "fortran_order": False, "shape": (users, *scene.shape)}
    with (
        tqdm(total=users, desc=path.stem, unit="UE", disable=None, leave=False) as bar,
        path.open("wb") as file,  # not mapped: a full disk would kill the process
    ):
        np.lib.format.write_array_header_1_0(file, described)
        for channels in stream(BLOCKS[model], scene, model, seed, part, users):
            file.write(np.ascontiguousarray(channels, "<c8").data.cast("B"))
            bar.update(len(channels))
