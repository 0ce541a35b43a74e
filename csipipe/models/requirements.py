"""What a part of a user's own model must be before it is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csipipe.models.layers import Deferring

_COUNTERS = (torch.float32, torch.int64)


def layers(part: str, built: Any) -> list[nn.Module]:
    """The layers of what a builder returned for a part.

    Raises:
        TypeError: it isn't a module, or for the tail a list of modules; says what it is.
    """
    if part != "tail":
        built = [built]
    elif not isinstance(built, list | tuple | nn.Sequential | nn.ModuleList):
        raise TypeError(f"it is a {type(built).__name__}; the tail must be a list of layers")
    for number, layer in enumerate(built):
        if not isinstance(layer, nn.Module):
            which = f"layer {number}" if part == "tail" else "it"
            raise TypeError(
                f"{which} is a {type(layer).__name__}; expected a torch.nn.Module (a function has "
                "one around it: class F(nn.Module) with a forward)"
            )
    return list(built)


def check(part: str, found: Sequence[nn.Module]) -> None:
    """Refuse layers that can't be trained, saved or exchanged.

    Raises:
        ValueError: nothing to train, or parameters or buffers of another type.
    """
    modules = nn.ModuleList(found)
    if part != "head" and not any(p.requires_grad for p in modules.parameters()):
        raise ValueError("it has no parameters to train; let it begin with a layer that has some")
    for name, parameter in modules.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"parameter {name} is {parameter.dtype}; parameters must be float32")
    for name, buffer in modules.named_buffers():
        if buffer.dtype not in _COUNTERS:
            raise ValueError(
                f"buffer {name} is {buffer.dtype}; buffers must be float32, or int64 for counts "
                "(a constant can be made in forward, or be registered with persistent=False and "
                "one of these types)"
            )


def check_apart(encoder: nn.Module, tail: Iterable[nn.Module], head: nn.Module) -> None:
    """Refuse a tensor that is in a model twice.

    Parts are built one by one, each with copies of its own, and so are a stage's layers: the two
    would be trained apart. Within a layer they couldn't be saved.

    Raises:
        ValueError: names both places, as weights are named in files.
    """
    parts = {"encoder": encoder, "tail": nn.ModuleList(tail), "head": head}
    first: dict[Tensor, str] = {}
    for name, tensor in nn.ModuleDict(parts).state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and first.setdefault(tensor, name) != name:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ValueError(
                f"{first[tensor]} and {name} are the same {kind}; parts and stages are trained "
                f"apart, so each place needs a {kind} of its own (copy.deepcopy makes one). A "
                "layer may call one module several times, if it holds it once"
            )


def whole_backward(found: Sequence[nn.Module]) -> list[str]:
    """Kinds of layers whose weight gradients can't wait: with matrices, and none of ours."""
    kinds: dict[str, None] = {}
    for layer in found:
        ours = {id(m) for d in layer.modules() if isinstance(d, Deferring) for m in d.modules()}
        for module in layer.modules():
            own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            if own and id(module) not in ours:
                kinds[type(module).__name__] = None
    return list(kinds)
