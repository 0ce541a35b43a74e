"""A small language for loops over vectors of numbers, emitting LLVM IR.

A kernel is a Python function that describes one function of machine code. What is an `int` in
Python is a constant there; loops of Python are unrolled, `Function.loop` loops at run time:

    def double(f: Function) -> None:
        with f.shared(f.rows) as row:
            i = row * f.lanes
            f.array("y").store(i, f.array("x").load(i) * 2.0)

Arithmetic is IEEE's, but that a product and a sum may become one operation (`contract`): NaN and
infinity pass through as they do in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

_FLOAT, _DOUBLE, _INT = ir.FloatType(), ir.DoubleType(), ir.IntType(64)
_POINTER = ir.PointerType()
_ALLOWED = ("contract",)
THREAD, THREADS, BARRIER = "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"
"""Functions of OpenMP: a thread's number in its team, how many there are, and the wait for all."""


class Index:
    """An integer that is known when the kernel runs: sums and products, with `int`s as well."""

    def __init__(self, f: Function, value: Any) -> None:
        self.f, self.value = f, value

    def __add__(self, other: Index | int) -> Index:
        return Index(self.f, self.f.ir.add(self.value, self.f.integer(other)))

    def __mul__(self, other: Index | int) -> Index:
        return Index(self.f, self.f.ir.mul(self.value, self.f.integer(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: int) -> Index:
        return Index(self.f, self.f.ir.sdiv(self.value, self.f.integer(other)))

    def smaller(self, other: Index) -> Index:
        """The smaller of both."""
        less = self.f.ir.icmp_signed("<", self.value, other.value)
        return Index(self.f, self.f.ir.select(less, self.value, other.value))

    def doubles(self) -> Vector:
        """This number in all lanes."""
        return self.f.splat(self.f.ir.sitofp(self.value, _DOUBLE))


class Vector:
    """As many floats as the machine takes at a time, or as many doubles."""

    def __init__(self, f: Function, value: Any) -> None:
        self.f, self.value = f, value

    def __add__(self, other: Vector | float) -> Vector:
        return self._with(self.f.ir.fadd, other)

    def __sub__(self, other: Vector | float) -> Vector:
        return self._with(self.f.ir.fsub, other)

    def __mul__(self, other: Vector | float) -> Vector:
        return self._with(self.f.ir.fmul, other)

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._with(self.f.ir.fdiv, other)

    def _with(self, operation: Callable[..., Any], other: Vector | float) -> Vector:
        if not isinstance(other, Vector):
            other = Vector(self.f, ir.Constant(self.value.type, [other] * self.f.lanes))
        return Vector(self.f, operation(self.value, other.value, flags=_ALLOWED))

    def doubles(self) -> Vector:
        """These floats as doubles."""
        return Vector(self.f, self.f.ir.fpext(self.value, self.f.wide))

    def floats(self) -> Vector:
        """These doubles as floats."""
        return Vector(self.f, self.f.ir.fptrunc(self.value, self.f.type))

    def root(self) -> Vector:
        """Square roots of these doubles."""
        name, wide = f"llvm.sqrt.v{self.f.lanes}f64", self.f.wide
        return Vector(self.f, self.f.ir.call(self.f.intrinsic(name, wide, [wide]), [self.value]))

    def total(self) -> Vector:
        """The sum of these doubles, in all lanes."""
        name = f"llvm.vector.reduce.fadd.v{self.f.lanes}f64"
        add = self.f.intrinsic(name, _DOUBLE, [_DOUBLE, self.f.wide])
        return self.f.splat(self.f.ir.call(add, [_DOUBLE(0.0), self.value]))

    def where_positive(self, yes: Vector, no: Vector) -> Vector:
        """`yes` where this is positive, `no` elsewhere and for NaN."""
        positive = self.f.ir.fcmp_ordered(">", self.value, self.f.vector(0.0))
        return Vector(self.f, self.f.ir.select(positive, yes.value, no.value))

    def largest(self, other: Vector | float) -> Vector:
        """The larger of both; `other` where this is NaN or both are."""
        other = Vector(self.f, self.f.vector(other))
        larger = self.f.ir.fcmp_ordered(">", self.value, other.value)
        return Vector(self.f, self.f.ir.select(larger, self.value, other.value))

    def only(self, lanes: int) -> Vector:
        """The first lanes of this, 0 in the others."""
        if lanes == self.f.lanes:
            return self
        kept = self.f.ir.select(self.f.mask(lanes), self.value, self.f.vector(0.0))
        return Vector(self.f, kept)


class Array:
    """Floats in memory, by the index of the first."""

    def __init__(self, f: Function, pointer: Any) -> None:
        self.f, self.pointer = f, pointer

    def at(self, index: Index | int) -> Array:
        """The same floats, counted from `index`."""
        b = self.f.ir
        return Array(self.f, b.gep(self.pointer, [self.f.integer(index)], source_etype=_FLOAT))

    def load(self, index: Index | int, lanes: int | None = None) -> Vector:
        """A vector; with `lanes`, no more than the first are read, and the others are 0."""
        pointer, f = self.at(index).pointer, self.f
        if lanes is None or lanes == f.lanes:
            value = f.ir.load(pointer, typ=f.type, align=4)
        else:
            types = [_POINTER, ir.IntType(32), ir.VectorType(ir.IntType(1), f.lanes), f.type]
            args = [pointer, ir.Constant(types[1], 4), f.mask(lanes), f.vector(0.0)]
            name = f"llvm.masked.load.v{f.lanes}f32.p0"
            value = f.ir.call(f.intrinsic(name, f.type, types), args)
        return Vector(f, value)

    def store(self, index: Index | int, value: Vector, lanes: int | None = None) -> None:
        """Write a vector; with `lanes`, no more than the first."""
        pointer, f = self.at(index).pointer, self.f
        if lanes is None or lanes == f.lanes:
            f.ir.store(value.value, pointer, align=4)
        else:
            types = [f.type, _POINTER, ir.IntType(32), ir.VectorType(ir.IntType(1), f.lanes)]
            args = [value.value, pointer, ir.Constant(types[2], 4), f.mask(lanes)]
            name = f"llvm.masked.store.v{f.lanes}f32.p0"
            f.ir.call(f.intrinsic(name, ir.VoidType(), types), args)

    def expect(self, index: Index | int, written: bool) -> None:
        """Have the cache line at `index` fetched, to be read or written soon."""
        number = ir.IntType(32)
        types = [_POINTER, number, number, number]
        prefetch = self.f.intrinsic("llvm.prefetch.p0", ir.VoidType(), types)
        near, data = number(2), number(1)
        args = [self.at(index).pointer, number(int(written)), near, data]
        self.f.ir.call(prefetch, args)

    def everywhere(self, index: Index | int) -> Vector:
        """One float in all lanes."""
        return self.f.splat(self.f.ir.load(self.at(index).pointer, typ=_FLOAT, align=4))


class Integers:
    """64-bit integers in memory."""

    def __init__(self, f: Function, pointer: Any) -> None:
        self.f, self.pointer = f, pointer

    def __getitem__(self, index: Index | int) -> Index:
        place = self.f.ir.gep(self.pointer, [self.f.integer(index)], source_etype=_INT)
        return Index(self.f, self.f.ir.load(place, typ=_INT, align=8))


class Sum:
    """A vector that grows, in a register."""

    def __init__(self, f: Function, start: Vector | float) -> None:
        self.f, value = f, f.vector(start)
        self._type = value.type
        with f.ir.goto_entry_block():
            self.place = f.ir.alloca(self._type)
        f.ir.store(value, self.place)

    @property
    def value(self) -> Vector:
        return Vector(self.f, self.f.ir.load(self.place, typ=self._type))

    def add(self, value: Vector) -> None:
        self.f.ir.store((self.value + value).value, self.place)


class Function:
    """One function of machine code: void f(void **table), called by each thread of a team.

    The table holds the number of rows, then the addresses of the arrays.

    Attributes:
        lanes, registers: the machine's, see `Machine`.
        type, wide: of a vector of floats, of one of doubles.
        rows: of the mini-batch.
        arrays: names of the arrays, in the order in which their addresses are passed; an array
            gets its place when the description first asks for it.
    """

    def __init__(
        self, module: ir.Module, name: str, lanes: int, registers: int, openmp: bool
    ) -> None:
        self.lanes, self.registers, self._openmp = lanes, registers, openmp
        self.type, self.wide = ir.VectorType(_FLOAT, lanes), ir.VectorType(_DOUBLE, lanes)
        self._function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
        (self._table,) = self._function.args
        self.ir = ir.IRBuilder(self._function.append_basic_block("entry"))
        self._thread, self._threads = (
            (self._asked(name) for name in (THREAD, THREADS)) if openmp else (_INT(0), _INT(1))
        )
        self.rows = Index(self, self.ir.load(self._table, typ=_INT))
        body = self._function.append_basic_block()
        self.ir.branch(body)  # the entry block holds variables and addresses
        self.ir.position_at_end(body)
        self._pointers: dict[str, Any] = {}
        self._own: dict[str, Array] = {}

    @property
    def arrays(self) -> list[str]:
        return list(self._pointers)

    def array(self, name: str) -> Array:
        return Array(self, self._pointer(name))

    def own(self, name: str, size: int) -> Array:
        """This thread's part of an array (threads, size)."""
        if name not in self._own:
            array = self.array(name)
            with self.ir.goto_entry_block():
                self._own[name] = array.at(Index(self, self._thread) * size)
        return self._own[name]

    def integers(self, name: str) -> Integers:
        return Integers(self, self._pointer(name))

    def _pointer(self, name: str) -> Any:
        if name not in self._pointers:
            place = _INT(1 + len(self._pointers))
            with self.ir.goto_entry_block():
                entry = self.ir.gep(self._table, [place], source_etype=_POINTER)
                self._pointers[name] = self.ir.load(entry, typ=_POINTER)
        return self._pointers[name]

    def close(self) -> None:
        self.ir.ret_void()

    def call(self, address: Index, table: Index) -> None:
        """Call another function like this one, and wait until all threads have."""
        kind = ir.PointerType(self._function.function_type)
        function = self.ir.inttoptr(address.value, kind)
        self.ir.call(function, [self.ir.inttoptr(table.value, _POINTER)])
        if self._openmp:
            self.ir.call(self.intrinsic(BARRIER, ir.VoidType(), []), [])

    @contextmanager
    def shared(self, number: Index | int) -> Iterator[Index]:
        """A loop over this thread's share of 0 … `number`."""
        first, end = (
            Index(self, self.ir.sdiv(self.ir.mul(self.integer(number), n), self._threads))
            for n in (self._thread, self.ir.add(self._thread, _INT(1)))
        )
        with self.loop(first, end) as index:
            yield index

    @contextmanager
    def loop(self, start: Index | int, end: Index | int, step: int = 1) -> Iterator[Index]:
        """A loop at run time."""
        with self.ir.goto_entry_block():
            place = self.ir.alloca(_INT)
        self.ir.store(self.integer(start), place)
        head, body, after = (self._function.append_basic_block() for _ in range(3))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        index = self.ir.load(place, typ=_INT)
        self.ir.cbranch(self.ir.icmp_signed("<", index, self.integer(end)), body, after)
        self.ir.position_at_end(body)
        yield Index(self, index)
        self.ir.store(self.ir.add(index, self.integer(step)), place)
        self.ir.branch(head)
        self.ir.position_at_end(after)

    def integer(self, value: Index | int) -> Any:
        return value.value if isinstance(value, Index) else ir.Constant(_INT, value)

    def vector(self, value: Vector | float) -> Any:
        if isinstance(value, Vector):
            return value.value
        return ir.Constant(self.type, [value] * self.lanes)

    def splat(self, scalar: Any) -> Vector:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        first = self.ir.insert_element(undefined, scalar, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return Vector(self, self.ir.shuffle_vector(first, undefined, zeros))

    def constants(self, values: Sequence[float]) -> Vector:
        """A vector that is known now."""
        return Vector(self, ir.Constant(self.type, list(values)))

    def mask(self, lanes: int) -> Any:
        bits = [int(lane < lanes) for lane in range(self.lanes)]
        return ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), bits)

    def _asked(self, name: str) -> Any:
        """What a function of OpenMP's says."""
        return self.ir.sext(self.ir.call(self.intrinsic(name, ir.IntType(32), []), []), _INT)

    def intrinsic(self, name: str, result: Any, types: Sequence[Any]) -> Any:
        module = self._function.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(result, types), name)
        return module.globals[name]
