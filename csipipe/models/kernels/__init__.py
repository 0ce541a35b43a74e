"""Who computes a CRBlock, a small convolution, a BatchNorm, a product: kernels of ours, or PyTorch.

The one place that decides. A backend is a module with four functions, see `Backend`; it computes
what it can once it has shown, on a few rows, that the numbers are the layers'. So must the kernels
for the loss and for linear layers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from csipipe.settings.config import KernelsBy

_BACKENDS = {
    ("llvm", "CRBlock"): "csipipe.models.kernels.llvm.crblock",
    ("llvm", "Conv2d"): "csipipe.models.kernels.llvm.convolution",
    ("triton", "CRBlock"): "csipipe.models.kernels.triton.crblock",
    ("triton", "Conv2d"): "csipipe.models.kernels.triton.convolution",
    ("triton", "StackedConv2d"): "csipipe.models.kernels.triton.convolution",
    ("triton", "BatchNorm2d"): "csipipe.models.kernels.triton.batchnorm",
    ("triton", "StackedBatchNorm2d"): "csipipe.models.kernels.triton.batchnorm",
}
_NAMES = {"CRBlock": "CRBlocks", "Conv2d": "small convolutions"}
_ROWS = 2
"""Rows that a backend is tried with."""
_OUTPUT, _GRADIENT, _COARSE = 1e-4, 2e-2, 0.1
"""Largest differences by norm that pass, of output, gradients, and with types shorter than
float32, where twice the layers' own difference passes too. One input of a LeakyReLU that rounding
takes to the other side of zero changes a gradient by some thousandths; a wrong kernel does by more
than a tenth."""
_PRODUCT = 1e-5
"""Of products in fp32; with TF32 the difference is thirty times as large."""
_MEASURED = (9, 0)
"""Compute capability of the GPUs whose fp32 units are slower than the kernels for products."""


LossAndFloor = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(B, 2, A, D) reconstructions and originals → (B,) losses and floors; the originals may also come
as (T, B/T, 2, A, D), which needn't lie one after the other."""


class Fusable(Protocol):
    """A module that backends may compute."""

    kernels_by: KernelsBy
    training: bool
    wide: bool
    """Autocast leaves its input as it is."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    @property
    def shape(self) -> Hashable:
        """What its code depends on."""

    def fresh(self) -> Self:
        """A new module of this shape."""


class Backend(Protocol):
    """What a backend offers. `saved` and `rest` are its own."""

    def reason(self, module: Any, x: Tensor) -> str | None:
        """Why it can't compute this module on this input; None if it can."""

    def forward(self, module: Any, x: Tensor, training: bool) -> tuple[Tensor, Any]:
        """Output and `saved`. In training mode running statistics follow as in BatchNorm2d."""

    def input_gradient(
        self, module: Any, saved: Any, dy: Tensor, wanted: bool = True
    ) -> tuple[Tensor | None, Any]:
        """Gradient at the input, which may be None unless it is `wanted`, and `rest`."""

    def weight_gradients(self, module: Any, saved: Any, rest: Any) -> list[Tensor]:
        """Gradients of all parameters, in the order of `module.parameters()`."""


class Products(Protocol):
    """A linear layer's products: B rows, I inputs, O outputs; of U stacked layers."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(…, I), (O, I), (O) → (…, O), or (U, B, I), (U, O, I), (U, O) → (U, B, O)."""

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """(…, O), (O, I) → (…, I), or (U, B, O), (U, O, I) → (U, B, I)."""


@dataclass(frozen=True)
class Choice:
    """A backend, or None for PyTorch's layers; which, or why none, in words."""

    backend: Backend | None
    why: str


_plain = ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """In here PyTorch's layers compute: others can look into them."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def computed(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes in, if it is on."""
    kind = x.device.type
    if x.dtype == torch.float32 and kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def choose(module: Fusable, x: Tensor) -> Choice:
    """Who computes `module` on `x`."""
    if module.kernels_by == "torch":
        return Choice(None, "model.kernels_by is torch")
    if _looked_into(x):
        return Choice(None, "something looks into the layers")
    x = x[:_ROWS] if module.wide else computed(x[:_ROWS])
    name = module.kernels_by
    if name == "auto":
        name = "triton" if x.device.type == "cuda" else "llvm"
    backend = _load(name, type(module).__name__)
    if isinstance(backend, str):
        return Choice(None, backend)
    reason = backend.reason(module, x)
    if reason is None:
        reason = _fault(name, backend, module, x)
    return Choice(backend, name) if reason is None else Choice(None, f"{name}: {reason}")


def _looked_into(x: Tensor) -> bool:
    return _plain.get() or type(x) is not Tensor or torch.compiler.is_compiling()


def why_not(name: str, module: str, kernels_by: KernelsBy) -> str | None:
    """Why a backend isn't asked for modules of a type; None: it is."""
    if kernels_by not in ("auto", name):
        return f"model.kernels_by is {kernels_by}"
    backend = _load(name, module)
    return backend if isinstance(backend, str) else None


def describe(module: Fusable, x: Tensor) -> str:
    """What a run says of its kernels."""
    choice = choose(module, x)
    by = "PyTorch's layers" if choice.backend is None else "fused kernels"
    return f"{_NAMES[type(module).__name__]} are computed by {by} ({choice.why})"


@functools.cache
def _load(name: str, module: str) -> Backend | str:
    """A backend, or why there is none."""
    try:
        return cast(Backend, importlib.import_module(_BACKENDS[name, module]))
    except KeyError:
        return f"{name} has no kernels for {module}"
    except Exception as error:  # of a package that is missing or broken
        return f"{name} can't be loaded: {type(error).__name__}: {error}"


@functools.cache
def loss_and_floor(kernels_by: KernelsBy, device: torch.device) -> LossAndFloor | None:
    """A kernel that computes the paper's loss and its floor on a device; None: none is right."""
    if kernels_by not in ("auto", "triton") or device.type != "cuda":
        return None
    if not _right("the loss", lambda: _try_loss(device)):
        return None
    from csipipe.models.kernels.triton import loss

    return loss.loss_and_floor


def products(kernels_by: KernelsBy, x: Tensor, weight: Tensor) -> Products | None:
    """Kernels for a linear layer's products with `x`, rows of it; None: PyTorch multiplies."""
    if torch.is_grad_enabled() or _looked_into(x):  # the kernels have no gradient
        return None
    if not x.numel() or {computed(x[:0]).dtype, weight.dtype} != {torch.float32}:
        return None
    if torch.backends.cuda.matmul.allow_tf32:
        return None
    return _products(kernels_by, x.device)


@functools.cache
def _products(kernels_by: KernelsBy, device: torch.device) -> Products | None:
    """Kernels that are right on a device and, unless they are asked for, faster than PyTorch."""
    if kernels_by not in ("auto", "triton") or device.type != "cuda":
        return None
    if kernels_by == "auto" and torch.cuda.get_device_capability(device) != _MEASURED:
        return None
    if not _right("linear layers", lambda: _try_products(device)):
        return None
    from csipipe.models.kernels.triton import product

    return product


_Pairs = Iterable[tuple[Tensor, Tensor, float]]
"""What was found, what is wanted, and the largest difference that passes."""


def _right(what: str, trial: Callable[[], _Pairs]) -> bool:
    """Whether Triton's kernels pass a trial; says so where they don't."""
    fault = None
    try:
        for found, wanted, bound in trial():
            if not _away(found, wanted) <= bound:
                fault = f"it differs by {_away(found, wanted):.1e} of its norm"
    except Exception as error:  # of a compiler or a driver
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        instead = f"PyTorch's operations instead of triton's kernel for {what}"
        print(f"csipipe: {instead}: {fault}", file=sys.stderr, flush=True)
    return fault is None


def _try_loss(device: torch.device) -> _Pairs:
    from csipipe.models.kernels.triton import loss

    with torch.random.fork_rng(devices=[]):
        h, h_hat = torch.rand(2, _ROWS, 2, 40, 19).to(device)
        g = torch.rand(_ROWS).to(device)
    energy = h.square().sum((1, 2, 3))
    for dtype in (torch.float32, torch.bfloat16):
        leaf = h_hat.to(dtype).requires_grad_()
        found, floor = loss.loss_and_floor(leaf, h)
        (gradient,) = torch.autograd.grad(found, leaf, g)
        off = leaf.detach() - h
        bound = _OUTPUT if dtype == torch.float32 else _COARSE
        yield found, off.square().sum((1, 2, 3)) / energy, bound
        yield floor, (h - 0.5).square().sum((1, 2, 3)) / energy, bound
        yield gradient, off * (2 * g / energy)[:, None, None, None], bound


def _try_products(device: torch.device) -> _Pairs:
    """Two layers beside float64, of sizes that end within a tile."""
    from csipipe.models.kernels.triton import product

    with torch.random.fork_rng(devices=[]):
        shapes = (2, 80, 144), (2, 208, 144), (2, 208), (2, 80, 208)
        x, weight, bias, g = (torch.randn(shape).to(device) for shape in shapes)
    y = torch.baddbmm(bias[:, None].double(), x.double(), weight.mT.double())
    dx = torch.bmm(g.double(), weight.double())
    for tile in product.TILES:
        yield product.linear(x, weight, bias, tile), y, _PRODUCT
        yield product.input_gradient(g, weight, tile), dx, _PRODUCT


_faults: dict[Hashable, str | None] = {}


def _fault(name: str, backend: Backend, module: Fusable, x: Tensor) -> str | None:
    """What is wrong with a backend on this machine; None: nothing. Tried once per process."""
    about = (name, type(module), module.shape, x.shape[1:], x.dtype, x.device)
    if about not in _faults:
        try:
            _faults[about] = _try(backend, module, x)
        except Exception as error:  # of a compiler or a driver
            _faults[about] = f"{type(error).__name__}: {error}"
        if _faults[about] is not None:
            what = f"PyTorch's layers instead of {name}'s kernels for {type(module).__name__}"
            print(f"csipipe: {what}: {_faults[about]}", file=sys.stderr, flush=True)
    return _faults[about]


def _try(backend: Backend, like: Fusable, x: Tensor) -> str | None:
    """Compare a backend with the layers, on a new module and random rows like x's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = (cast(nn.Module, like.fresh()) for _ in range(2))
        for parameter in one.parameters():
            if parameter.dim() < 3:
                nn.init.uniform_(parameter, 0.2, 0.4)
        two.load_state_dict(one.state_dict())
        rows = torch.randn(_ROWS, *x.shape[1:]).to(x.device, x.dtype)
        one.to(x.device)
        two.to(x.device)
        with torch.no_grad():
            y, saved = backend.forward(one, rows, True)
            dy = torch.randn(y.shape).to(y.device, y.dtype)
            dx, rest = backend.input_gradient(one, saved, dy)
            assert dx is not None
            found = [y, dx, *backend.weight_gradients(one, saved, rest), *one.buffers()]
    wanted, theirs = (_layers(copy.deepcopy(two), rows, dy, d) for d in (torch.float32, x.dtype))
    names = ["the output", "the input's gradient", *(name for name, _ in two.named_parameters())]
    names += [name for name, _ in two.named_buffers()]
    for name, a, b, c in zip(names, found, wanted, theirs, strict=True):
        bound = _OUTPUT if name == "the output" else _GRADIENT
        if x.dtype != torch.float32:
            bound = max(_COARSE, 2 * _away(c, b))
        if not _away(a, b) <= bound:
            return f"{name} differs from theirs by {_away(a, b):.1e} of its norm"
    return None


def _layers(module: nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients and buffers after a pass through PyTorch's layers, computed in `dtype`."""
    coarse = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)
    with plain_layers(), torch.enable_grad(), coarse:
        leaf = x.float().requires_grad_()
        y = module(leaf)
        end = (y * dy.to(y.dtype)).sum()  # as in `backward`, without SymPy
        gradients = torch.autograd.grad(end, [leaf, *module.parameters()])
    return [y, *gradients, *module.buffers()]


def _away(found: Tensor, wanted: Tensor) -> float:
    """‖difference‖ / ‖wanted‖."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
