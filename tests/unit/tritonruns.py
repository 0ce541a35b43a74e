"""Runs Triton's kernels without a GPU and prints what was found, as JSON: one process per run.

    TRITON_INTERPRET=1 python tests/unit/tritonruns.py numbers CASE…
    python tests/unit/tritonruns.py compile

Triton reads TRITON_INTERPRET when it is imported, which another test may have done.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from csipipe import models
from csipipe.gpucheck import compiling
from csipipe.measure.metrics import loss_and_floor
from csipipe.models import crblock, kernels
from csipipe.models.crblock import CRBlock
from csipipe.models.kernels.triton import crblock as fused
from csipipe.models.kernels.triton import loss, product
from csipipe.models.layers import Conv2d, Linear, accumulate, put_off
from csipipe.models.norm import BatchNorm2d
from csipipe.models.stacked import Stack
from csipipe.settings.config import CRNET_KERNELS

FEW = (((3, 3), (1, 3)), ((3, 1),))
LONG = (((3, 3), (1, 9), (9, 1)),)
CASES: dict[str, tuple[int, Any, tuple[int, ...]]] = {
    # channels in paths, kernels (None: a convolution of two channels), shape of the input
    "convolution": (7, None, (3, 2, 6, 5)),
    "no bias": (7, None, (2, 2, 5, 6)),
    "norm": (3, None, (2, 3, 5, 6)),
    "norm of tiles": (2, None, (2, 2, 40, 33)),
    "one path": (2, (((1, 3), (3, 1)),), (2, 2, 3, 3)),
    "two channels": (2, FEW, (3, 2, 6, 5)),
    "CRNet": (7, CRNET_KERNELS, (2, 2, 4, 9)),
    "several tiles": (2, FEW, (2, 2, 40, 33)),
    "5 x 9": (2, LONG, (2, 2, 5, 9)),  # sizes around a run's 8 pixels
    "16 x 8": (2, LONG, (2, 2, 16, 8)),
    "12 x 20": (2, LONG, (2, 2, 12, 20)),
    "1 x 17": (2, LONG, (2, 2, 1, 17)),
    "one row": (2, (((1, 9), (9, 1)),), (1, 2, 3, 3)),
}


def numbers(case: str) -> dict[str, Any]:
    """Largest distances by norm from PyTorch's layers in float64."""
    channels, paths, shape = CASES[case]
    for place in (crblock, fused):
        vars(place)["CHANNELS"] = channels
    torch.manual_seed(0)
    module: CRBlock | Conv2d | BatchNorm2d
    if case in ("norm", "norm of tiles"):
        module = BatchNorm2d(channels)
        module.kernels_by = "triton"
    elif paths is None:
        module = Conv2d(2, 2, (3, 3), case != "no bias", "triton")
    else:
        module = CRBlock(paths, "triton")
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.2, 0.4)
    x, dy = torch.randn(shape), torch.randn(shape)
    exact = copy.deepcopy(module).double()
    wanted = passes(exact, x.double(), dy.double())
    found: dict[str, Any] = {"by": kernels.choose(module, x).why}
    trained = copy.deepcopy(module)
    first = passes(trained, x, dy)
    found["fp32"] = distances(first, wanted)
    found["buffers"] = distances(list(trained.buffers()), list(exact.buffers()))
    late = copy.deepcopy(module)
    pending = put_off([late])
    leaf = x.clone().requires_grad_()
    y = late(leaf)
    y.backward(dy)
    waited = all(parameter.grad is None for parameter in late.parameters())
    accumulate(pending)
    later = [y.detach(), leaf.grad, *(parameter.grad for parameter in late.parameters())]
    same = all(torch.equal(a, b) for a, b in zip(first, later, strict=True) if b is not None)
    found["put off"] = waited and same and None not in later
    with torch.no_grad():
        found["evaluation"] = distances([trained.eval()(x)], [exact.eval()(x.double())])
    if case == "one path":
        return found
    if isinstance(module, BatchNorm2d):  # whose input autocast leaves as it is
        with torch.autocast("cpu", torch.bfloat16):
            assert passes(copy.deepcopy(module), x, dy)[0].dtype == torch.float32
        x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), models.plain_layers():
        theirs = passes(copy.deepcopy(module), x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        found["bf16 by"] = kernels.choose(module, x).why
        rounded = passes(copy.deepcopy(module), x, dy)
    found["bf16 type"] = str(rounded[0].dtype)
    found["bf16"], found["theirs"] = distances(rounded, wanted), distances(theirs, wanted)
    found["evaluation's gradients"] = distances(
        passes(trained, x.float(), dy), passes(exact, x.double(), dy.double())
    )
    return found


def stacked() -> dict[str, Any]:
    """Three stacks of convolutions and BatchNorms beside the same in float64, one by one."""
    torch.manual_seed(0)
    modules = [
        nn.Sequential(Conv2d(2, 3, (3, 3), True, "triton"), BatchNorm2d(3), nn.LeakyReLU(0.3))
        for _ in range(3)
    ]
    for module in modules:
        module.append(Conv2d(3, 2, (1, 5), False, "triton"))
        norm: Any = module[1]
        norm.kernels_by = "triton"
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    exact = copy.deepcopy(modules)
    x, dy = torch.randn(3, 4, 2, 6, 5), torch.randn(3, 4, 2, 6, 5)
    stack = Stack(modules)
    leaf = x.clone().requires_grad_()
    y = stack(leaf)
    torch.autograd.backward(y, dy)
    stack.hand_out(range(3))
    layers: list[Any] = stack._layers
    inner = torch.randn(3, 4, 3, 6, 5)
    asked = (layers[0], x), (layers[1], inner), (layers[2], inner)
    found: dict[str, Any] = {"by": [kernels.choose(*pair).why for pair in asked]}
    assert leaf.grad is not None
    for name, module, other, mine, h, d, dh in zip(
        "012", modules, exact, y, x, dy, leaf.grad, strict=True
    ):
        wanted = passes(other.double(), h.double(), d.double())
        weights = [p.grad for p in module.parameters()]
        pairs = list(zip([mine.detach(), dh, *weights], wanted, strict=True))
        del pairs[3]  # of the bias before BatchNorm, whose true gradient is zero
        found[name] = distances([a for a, _ in pairs], [b for _, b in pairs])
        found[f"{name} buffers"] = distances(list(module.buffers()), list(other.buffers()))
    return found


def leaky() -> dict[str, Any]:
    """BatchNorms stacked with the LeakyReLU behind them: distances from both in float64.

    And which numbers aren't, to the bit, those of the BatchNorm's kernels and PyTorch's LeakyReLU.
    Of the inputs, which are short and sum up to zero, BatchNorm makes zero exactly in many places,
    of the last channel everywhere.
    """
    vars(triton.runtime.interpreter)["_convert_float"] = _converted
    torch.manual_seed(0)
    found: dict[str, Any] = {"by": [], "slopes": [], "zeros": [], "far": [], "other bits": []}
    shapes, types = ((3, 2, 3, 5, 6), (2, 2, 2, 40, 33)), (torch.float32, torch.bfloat16)
    for (ues, rows, channels, a, d), dtype in itertools.product(shapes, types):
        norms = [BatchNorm2d(channels) for _ in range(ues)]
        for norm in norms:
            norm.kernels_by = "triton"
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.zeros_(norm.bias)
            nn.init.zeros_(norm.weight[-1:])
        pairs = [nn.Sequential(copy.deepcopy(norm), nn.LeakyReLU(0.3)) for norm in norms]
        exact = copy.deepcopy(pairs)
        half = torch.randint(-8, 9, (ues, rows // 2, channels, a, d)) / 4
        x = torch.cat([half, -half], 1).to(dtype)
        dy = torch.randn(x.shape).to(dtype)
        both, alone = Stack(pairs), Stack([nn.Sequential(norm) for norm in norms])
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        (layer,) = cast(list[Any], both._layers)
        found["by"].append(kernels.choose(layer, x).why)
        found["slopes"].append(layer.slope)
        y, before = both(one), alone(other)
        found["zeros"].append(int((before[:, :, :-1] == 0).sum()))
        y_other = functional.leaky_relu(before, 0.3)
        torch.autograd.backward([y, y_other], [dy, dy])
        assert one.grad is not None
        assert other.grad is not None
        far = []
        for u, (module, norm, true) in enumerate(zip(pairs, norms, exact, strict=True)):
            both.hand_out([u])
            alone.hand_out([u])
            mine = [y[u].detach(), one.grad[u], *(p.grad for p in module.parameters())]
            theirs = [y_other[u].detach(), other.grad[u], *(p.grad for p in norm.parameters())]
            wanted = passes(true.double(), x[u].double(), dy[u].double())
            mine, theirs = [*mine, *module.buffers()], [*theirs, *norm.buffers()]
            far.append(distances(cast(list[Tensor], mine), [*wanted, *true.buffers()]))
            names = "y", "dx", "dw", "db", "mean", "var", "count"
            found["other bits"] += [
                f"{dtype}: {name} of {u}"
                for name, p, q in zip(names, mine, theirs, strict=True)
                if p is None or q is None or p.dtype != q.dtype or not torch.equal(p, q)
            ]
        found["far"].append(max(far))
    return found


def _converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Between float32 and bfloat16, as PyTorch does: the interpreter loses carries of its own."""
    tensor = torch.from_numpy(values)
    if source.name == "fp32":
        return tensor.bfloat16().view(torch.uint16).numpy()
    return tensor.view(torch.bfloat16).float().view(torch.uint32).numpy()


def losses() -> dict[str, Any]:
    """The paper's loss of rows, its floor and gradient, in float32 and bfloat16, beside float64."""
    torch.manual_seed(0)
    h, h_hat, g = torch.rand(2, 5, 2, 40, 19)[:, 1:4], torch.rand(6, 2, 40, 19), torch.rand(6)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        one = h_hat.to(dtype).requires_grad_()
        exact = one.detach().double().requires_grad_()
        mine, theirs = loss.loss_and_floor(one, h), loss_and_floor(exact, h.double())
        pairs = zip(
            (*mine, *torch.autograd.grad(mine[0], one, g)),
            (*theirs, *torch.autograd.grad(theirs[0], exact, g.double())),
            strict=True,
        )
        found[str(dtype)] = [distances([a.detach()], [b.detach()]) for a, b in pairs]
    return found


def products() -> dict[str, Any]:
    """Linear layers, one by one and stacked, of sizes that end within a tile, beside float64."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    trial = kernels._right("linear layers", lambda: kernels._try_products(cpu))
    vars(kernels)["_products"] = lambda kernels_by, device: product
    found: dict[str, Any] = {"trial": trial, "far": {}}
    for biased, count, tile in itertools.product((True, False), (1, 3), product.TILES):
        vars(product)["_tile"] = lambda *_, tile=tile: tile
        layers = [Linear(70, 133, biased) for _ in range(count)]
        stack = Stack([nn.Sequential(copy.deepcopy(layer)) for layer in layers])
        x = torch.randn(count, 70, 83).mT  # rows lie side by side,
        dy = torch.randn(count, 83, 1).expand(count, 83, 133)  # and these have no length
        leaf = x.clone().requires_grad_()
        y = stack(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        for u, layer in enumerate(layers):
            wanted = passes(copy.deepcopy(layer).double(), x[u].double(), dy[u].double())
            far = [
                distances(passes(layer, x[u], dy[u]), wanted),
                distances([y[u].detach(), dx[u]], wanted[:2]),
            ]
            found["far"][f"{biased}, {count}, {tile}, {u}"] = far
    layer, x = Linear(5, 70), torch.randn(2, 3, 100, 5)  # more rows than a group of tiles has
    with torch.no_grad():
        found["several axes"] = distances([layer(x)], [copy.deepcopy(layer).double()(x.double())])
    return found


def passes(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    return [
        y.detach(),
        *torch.autograd.grad(y, [leaf, *module.parameters()], dy.to(y.dtype)),
    ]


def distances(found: list[Tensor], wanted: list[Tensor]) -> float:
    every = (
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
        for a, b in zip(found, wanted, strict=True)
    )
    return max(every, default=0.0)


def compiled() -> dict[str, Any]:
    """What `gpucheck` compiles, compiled for compute capability 9.0."""
    launched: dict[str, Any] = {}

    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    backend = triton.compiler.make_backend(target)

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        share = compiling.belongs(self.fn.__name__, options, 7)
        bind = triton.runtime.jit.create_function_from_signature(
            self.signature, self.params, backend
        )
        bound, special, options = bind(*args, debug=False, **options)
        kept, *of_source = self._pack_args(backend, options, bound, special, options)
        key = json.dumps([self.fn.__name__, *map(str, of_source), str(kept)])
        launched[key] = (triton.compiler.ASTSource(self, *of_source), kept, share)

    triton.runtime.JITFunction.run = note
    compiling.launch_all(torch.device("cpu"), 32)
    found = {}
    for key, (source, options, share) in launched.items():
        made = triton.compile(source, target=target, options=options.__dict__)
        found[key] = {
            "bytes": len(made.asm["cubin"]),
            "shared": made.metadata.shared,
            "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
            "share": share,
        }
    return found


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "stacked": stacked,
    "leaky": leaky,
    "loss": losses,
    "products": products,
}

if __name__ == "__main__":
    what, *cases = sys.argv[1:]
    if what == "compile":
        print(json.dumps(compiled()))
    else:
        print(json.dumps({c: OTHERS[c]() if c in OTHERS else numbers(c) for c in cases}))
