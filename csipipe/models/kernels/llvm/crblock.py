"""CRBlock on a CPU by kernels of our own: forward, input gradient, weight gradients.

Shapes: B images, A angles, D delays, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from csipipe.models.crblock import CRBlock
from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.host import image_of, reason_against, runner
from csipipe.models.kernels.llvm.image import Image
from csipipe.models.kernels.llvm.norm import Doubles, Norm, totals
from csipipe.models.kernels.llvm.runner import backward_taps, forward_taps
from csipipe.models.kernels.llvm.sources import Source


@dataclass
class Saved:
    """What the backward pass needs of the forward pass.

    Attributes:
        x, out: (B, 2, A, D) the block's input and output.
        z: per path and convolution, (B, 7, A, D).
        norms: likewise.
        joined, join_norm: z (B, 2, A, D) and norm of the join.
        join_weights: (2, 7) per path.
        layers: per path.
    """

    x: Tensor
    out: Tensor
    z: list[list[Tensor]]
    norms: list[list[Norm]]
    joined: Tensor
    join_norm: Norm
    join_weights: list[Tensor]
    layers: list[list[Layer]]


@dataclass
class Rest:
    """What the weight gradients need of the input gradient.

    Attributes:
        q: per path and convolution but its last, (B, 7, A, D).
        dz: (B, 2, A, D) at the join's output.
        join_weight: (2, 14) the join's weight gradient.
    """

    dz: Tensor
    q: list[list[Tensor]] = field(default_factory=list)
    join_weight: Doubles = field(default_factory=lambda: np.empty((2, 0)))


@dataclass
class Layer:
    """A convolution of a path with its BatchNorm."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def size(self) -> tuple[int, int]:
        high, wide = self.convolution.kernel_size
        return high, wide


def forward(block: CRBlock, x: Tensor, training: bool) -> tuple[Tensor, Saved]:
    """(B, 2, A, D) → (B, 2, A, D); in training mode running statistics follow."""
    x, image = x.contiguous(), image_of(x)
    z: list[list[Tensor]] = []
    norms: list[list[Norm]] = []
    paths = [layers(path) for path in block.paths]
    for path in paths:
        arrays = {"x": x}
        source: Source = "stored"
        z.append([])
        norms.append([])
        for layer in path:
            channels = layer.convolution.in_channels
            outputs = layer.convolution.out_channels
            out = x.new_empty(len(x), outputs, image.angles, image.delays)
            sums = runner().sums(len(x), 2, outputs)
            constants = (image, source, channels, layer.size, outputs, True)
            frame = runner().frame(image, channels, layer.size)
            runner().run(
                stages.convolution,
                constants,
                len(x),
                arrays | {"out z": out, "sums": sums, "weights": layer.convolution.weight},
                frame,
                forward_taps(frame),
            )
            norm = _norm(image, layer.norm, sums, training)
            z[-1].append(out)
            norms[-1].append(norm)
            arrays = {"z": out, "norm": norm.table}
            source = "active"
    joined, sums = torch.empty_like(x), runner().sums(len(x), 2, 2)
    weights = join_weights(block)
    ends = _ends(z, norms, weights)
    outputs = z[0][-1].shape[1]
    runner().run(stages.join, (image, len(z), outputs), len(x), ends | {"z": joined, "sums": sums})
    norm = _norm(image, cast(nn.BatchNorm2d, block.join[1]), sums, training)
    out = torch.empty_like(x)
    runner().run(
        stages.residual,
        (image,),
        len(x),
        {"z": joined, "norm": norm.table, "x": x, "out": out},
    )
    return out, Saved(x, out.detach(), z, norms, joined, norm, weights, paths)


def input_gradient(
    block: CRBlock, saved: Saved, dy: Tensor, wanted: bool = True
) -> tuple[Tensor, Rest]:
    """The gradient at the block's input, wanted or not."""
    dy, image, rows = dy.contiguous(), image_of(dy), len(dy)
    dx, sums = torch.empty_like(saved.x), runner().sums(rows, 2, 2)
    join = {"z": saved.joined, "norm": saved.join_norm.table, "q": dx}
    arrays = join | {"out": saved.out, "dy": dy, "sums": sums}
    runner().run(stages.output_backward, (image, 2), rows, arrays)
    saved.join_norm.backward(*totals(sums))

    rest = Rest(torch.empty_like(dx))
    ends = _ends(saved.z, saved.norms, saved.join_weights)
    channels = saved.z[0][-1].shape[1]
    of_path = [runner().sums(rows, 4, channels) for _ in saved.z]
    arrays = ends | join | {"dz": rest.dz}
    arrays |= {f"{p} sums": sums for p, sums in enumerate(of_path)}
    runner().run(stages.join_backward, (image, len(saved.z), channels), rows, arrays)
    of_join = []
    for norms, sums in zip(saved.norms, of_path, strict=True):
        of_one, of_away, *of_weights = totals(sums)
        norms[-1].backward(of_one, of_away)
        of_join.append(np.stack(of_weights))
    rest.join_weight = np.concatenate(of_join, 1)

    for p, path in enumerate(saved.layers):
        rest.q.append([torch.empty_like(z) for z in saved.z[p][:-1]])
        for n, layer in reversed(list(enumerate(path))):
            channels, outputs = layer.convolution.out_channels, layer.convolution.in_channels
            source, arrays = _gradient(saved, rest, p, n)
            arrays["weights"] = layer.convolution.weight
            constants = (image, source, channels, layer.size, outputs)
            frame = runner().frame(image, channels, layer.size)
            taps = backward_taps(frame, outputs)
            if not n:
                arrays["dx"] = dx
                runner().run(stages.input_backward, constants, rows, arrays, frame, taps)
                continue
            norm, sums = saved.norms[p][n - 1], runner().sums(rows, 2, outputs)
            arrays |= {"in z": saved.z[p][n - 1], "in q": rest.q[p][n - 1]}
            arrays |= {"in norm": norm.table, "sums": sums}
            runner().run(stages.convolution_backward, constants, rows, arrays, frame, taps)
            norm.backward(*totals(sums))
    return dx, rest


def weight_gradients(block: CRBlock, saved: Saved, rest: Rest) -> list[Tensor]:
    """The gradients of all parameters, in the order of `block.parameters()`."""
    found: list[Tensor | Doubles] = []
    for p, path in enumerate(saved.layers):
        for n, layer in enumerate(path):
            gradient, arrays = _gradient(saved, rest, p, n)
            source: Source = "active" if n else "stored"
            if n:
                arrays |= {"in z": saved.z[p][n - 1], "in norm": saved.norms[p][n - 1].table}
            else:
                arrays |= {"in x": saved.x}
            weight = layer.convolution.weight
            of_convolution = runner().weight_gradient(
                image_of(saved.x), source, gradient, arrays, weight, len(saved.x)
            )
            norm = saved.norms[p][n]
            found += [of_convolution, norm.of_weight, norm.of_bias]
    found += [rest.join_weight, saved.join_norm.of_weight, saved.join_norm.of_bias]
    return [
        torch.as_tensor(gradient, dtype=torch.float32).view_as(parameter)
        for gradient, parameter in zip(found, block.parameters(), strict=True)
    ]


def _norm(image: Image, layer: nn.BatchNorm2d, sums: Tensor, training: bool) -> Norm:
    if training:
        return Norm.of_batch(layer, sums, runner().counts(image))
    return Norm.of_running(layer)


def _ends(
    z: list[list[Tensor]], norms: list[list[Norm]], weights: list[Tensor]
) -> dict[str, Tensor]:
    """What the join reads of every path."""
    return {
        f"{p} {name}": tensor
        for p in range(len(z))
        for name, tensor in (
            ("z", z[p][-1]),
            ("norm", norms[p][-1].table),
            ("w", weights[p]),
        )
    }


def _gradient(saved: Saved, rest: Rest, p: int, n: int) -> tuple[Source, dict[str, Tensor]]:
    """Where the gradient at the output of a path's convolution comes from."""
    arrays = {"z": saved.z[p][n], "norm": saved.norms[p][n].table}
    if n + 1 < len(saved.z[p]):
        return "normed", arrays | {"q": rest.q[p][n]}
    return "joined", arrays | {"dz": rest.dz, "w": saved.join_weights[p]}


def reason(block: CRBlock, x: Tensor) -> str | None:
    """Why these kernels can't compute this block on this input; None if they can."""
    if torch.is_grad_enabled() and not block.training:
        return "they have gradients in training mode only"
    if block.training and len(x) * image_of(x).size == 1:
        return "BatchNorm needs more than one value per channel"
    return reason_against(block, x)


def layers(path: nn.Module) -> list[Layer]:
    """The convolutions of a path."""
    return [Layer(*child) for child in path.children() if isinstance(child, nn.Sequential)]


def join_weights(block: CRBlock) -> list[Tensor]:
    """The join's weights, (2, 7) per path."""
    weight = cast(nn.Conv2d, block.join[0]).weight.detach().flatten(1)
    return [part.contiguous() for part in weight.chunk(len(block.paths), 1)]
