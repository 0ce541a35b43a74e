"""This machine's vectors, and LLVM as the compiler of kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import __version__, binding, ir

from csipipe.models.kernels.llvm import objects
from csipipe.models.kernels.llvm.language import Function
from csipipe.models.kernels.llvm.objects import Compiled
from csipipe.models.kernels.llvm.team import parallel


@dataclass(frozen=True)
class Machine:
    """What kernels are generated for.

    Attributes:
        triple, cpu, features: LLVM's names of the machine.
        lanes: floats in a vector.
        registers: how many vectors it holds.
        openmp: whether several threads can share a kernel's work.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    registers: int
    openmp: bool = True


AARCH64 = Machine("aarch64-unknown-linux-gnu", "generic", "+neon", lanes=4, registers=32)


def this_machine() -> Machine | None:
    """The machine that this runs on; None if it has none of the vectors that are known."""
    triple, cpu = binding.get_process_triple(), binding.get_host_cpu_name()
    features = binding.get_host_cpu_features()
    openmp = parallel() is not None
    if triple.startswith(("aarch64", "arm64")):
        return Machine(triple, cpu, features.flatten(), 4, 32, openmp)
    if not triple.startswith("x86_64"):
        return None
    if features.get("avx512f"):  # LLVM prefers half the register unless told
        flags = features.flatten() + ",-prefer-256-bit"
        return Machine(triple, cpu, flags, 16, 32, openmp)
    if features.get("avx2") and features.get("fma"):
        return Machine(triple, cpu, features.flatten(), 8, 16, openmp)
    return None


Describe = Callable[..., None]
"""What emits a kernel's code: takes a `Function`, then the kernel's constants."""
_NAME = "kernel"


def described(machine: Machine, describe: Describe, *constants: object) -> tuple[str, list[str]]:
    """A kernel in LLVM's language, and the names of its arrays in order."""
    module = ir.Module()
    f = Function(module, _NAME, machine.lanes, machine.registers, machine.openmp)
    describe(f, *constants)
    f.close()
    return str(module), f.arrays


def target(machine: Machine) -> Any:
    """LLVM's compiler for a machine."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    found = binding.Target.from_triple(machine.triple)
    return found.create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3, reloc="pic", jit=True
    )


def optimised(text: str, compiler: Any) -> Any:
    """LLVM's module, checked and optimised for a target."""
    module = binding.parse_assembly(text)
    module.triple = compiler.triple
    module.data_layout = str(compiler.target_data)
    module.verify()
    # what LLVM would unroll or make vectors of is so already: these give the same speed as all
    # its passes in a third of the time
    passes = binding.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    options = binding.create_pipeline_tuning_options()
    passes.run(module, binding.create_pass_builder(compiler, options))
    return module


def compiled(machine: Machine, describe: Describe, *constants: object) -> Compiled:
    """A kernel's machine code: from the cache, or compiled now."""
    of = repr((describe.__name__, constants, machine, __version__, binding.llvm_version_info))
    kernel = objects.load(of)
    if kernel is None:
        text, arrays = described(machine, describe, *constants)
        compiler = target(machine)
        kernel = Compiled(arrays, compiler.emit_object(optimised(text, compiler)))
        objects.store(of, kernel)
    return kernel


class Kernel:
    """A compiled kernel.

    Attributes:
        address: of its function.
        arrays: names of the arrays in its table.
    """

    def __init__(self, machine: Machine, describe: Describe, *constants: object) -> None:
        kernel = compiled(machine, describe, *constants)
        self.arrays = kernel.arrays
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target(machine))
        self._engine.add_object_file(binding.ObjectFileRef.from_data(kernel.code))
        self._engine.finalize_object()
        self.address = self._engine.get_function_address(_NAME)
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
        self._together = parallel() if machine.openmp else None

    def __call__(self, table: int, threads: int) -> None:
        """Run with the table at an address, by so many threads where the machine has a team, else
        by one. Meanwhile other threads of Python can run."""
        if threads == 1 or self._together is None:
            self._alone(table)
        else:
            self._together(self.address, table, threads)


class Library:
    """Kernels for a machine, each compiled when it is first asked for."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._kernels: dict[tuple[object, ...], Kernel] = {}

    def kernel(self, describe: Describe, *constants: object) -> Kernel:
        key = (describe, *constants)
        if key not in self._kernels:
            self._kernels[key] = Kernel(self.machine, describe, *constants)
        return self._kernels[key]
