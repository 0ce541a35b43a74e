"""The threads that share a kernel's work: those of PyTorch's own operations.

Others would compete with them for the cores, on which PyTorch's may spin between two operations.
So kernels are run by the library that PyTorch has its threads from, OpenMP, by the function that
GCC's code calls for a parallel region. It hands work over in microseconds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from llvmlite import binding

from csipipe.models.kernels.llvm.language import BARRIER, THREAD, THREADS

_PARALLEL = "GOMP_parallel"
_CALLED = THREAD, THREADS, BARRIER
"""By kernels."""


@functools.cache
def parallel() -> Callable[[int, int, int], None] | None:
    """Has threads call a function with an address: function, address, number of threads.

    None: PyTorch has its threads from elsewhere, and kernels are computed by one.
    """
    here = ctypes.CDLL(None)
    if not all(hasattr(here, name) for name in (_PARALLEL, *_CALLED)):
        return None
    for name in _CALLED:
        binding.add_symbol(name, ctypes.cast(here[name], ctypes.c_void_p).value)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
        (_PARALLEL, here)
    )
    return lambda function, address, threads: call(function, address, threads, 0)
