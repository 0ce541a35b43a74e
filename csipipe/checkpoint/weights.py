"""Weights to use: safetensors per UE and for the tail, keys by part and layer, never by rank."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csipipe.files import whole


def ue_file(folder: Path, ue: int) -> Path:
    """Encoder and head of one UE."""
    return folder / f"ue-{ue}.safetensors"


def tail_file(folder: Path) -> Path:
    """The whole decoder tail."""
    return folder / "tail.safetensors"


def save(path: Path, parts: dict[str, dict[str, Tensor]]) -> None:
    """Write the states of some parts, whole or not at all; keys are `<part>.<name>`.

    Raises:
        OSError: the file can't be written, for example on a full disk.
    """
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    with whole(path) as partial:
        write(partial, tensors)


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors on the host; other threads run meanwhile.

    Raises:
        OSError: it can't be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # has the system's number in its text alone
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise OSError(f"{file} can't be written: {error}") from error


def read(path: Path) -> dict[str, Tensor]:
    """Everything in a file that `save` wrote, by `<part>.<name>`; what is narrower is float32.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no readable weights: {error}") from error
    return {
        name: tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
        for name, tensor in tensors.items()
    }


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state whose matrices and kernels are float16: nearly half the bytes.

    What has one dimension (biases, norms and their statistics) is few bytes, and stays.

    Raises:
        ValueError: a weight beyond the range of float16.
    """
    found = {}
    for name, tensor in state.items():
        whole = tensor.ndim < 2 or not tensor.is_floating_point()
        found[name] = tensor if whole else tensor.half()
        if not whole and not found[name].isfinite().all():
            most = torch.finfo(torch.float16).max
            raise ValueError(
                f"{name} has weights up to {tensor.abs().max():.4g}, float16 ends at {most:,.0f}; "
                "keep them in float32."
            )
    return found


def fill(into: nn.Module, state: dict[str, Tensor], part: str, path: Path) -> None:
    """Set one part from what `read`, or a snapshot, found in `path`.

    Raises:
        ValueError: weights of another model.
    """
    prefix = f"{part}."
    try:
        into.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
    except RuntimeError as error:
        raise ValueError(f"{path} holds another model's {part}: {error}") from error


def flatten(module: nn.Module) -> Tensor:
    """(scalars,) float64: a module's whole state; exact for fp32 and for BatchNorm's counters."""
    return torch.cat([t.detach().cpu().double().flatten() for t in module.state_dict().values()])


def unflatten(flat: Tensor, like: nn.Module) -> dict[str, Tensor]:
    """A state like `like`'s from what `flatten` made."""
    state, start = {}, 0
    for name, tensor in like.state_dict().items():
        part = flat[start : start + tensor.numel()]
        state[name] = part.reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    assert start == flat.numel()
    return state


def switch(partial: Path, link: Path) -> None:
    """Make `link` point to the files of `partial`, all at once, and remove the previous ones.

    The files get a folder of their own, `link` is a symbolic link to it.

    Raises:
        OSError: the folder can't be written; `link` is as before.
    """
    folder = partial.with_suffix("")
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{partial.stem}.{number}")
    os.rename(partial, folder)
    fresh = link.with_name(f"{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)
    for old in link.parent.glob(f"{link.name}-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def switched(link: Path) -> int | None:
    """Of which iteration the files are that `switch` made `link` point to; None: it is no link."""
    named = re.fullmatch(rf"{link.name}-(\d+)(\.\d+)?", link.resolve().name)
    return int(named[1]) if named else None
