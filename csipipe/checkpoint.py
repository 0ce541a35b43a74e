"""Weights on disk: safetensors per UE and for the tail, keys by part and layer, never by rank."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn


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
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {error}") from error
    os.replace(partial, path)


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
