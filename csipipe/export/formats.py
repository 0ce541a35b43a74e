"""Modules as files for other programs, and those files as functions again."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

PT2, ONNX = "pt2", "onnx"
FORMATS = (PT2, ONNX)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What ONNX needs: the extra `export`."""

Function = Callable[[Tensor], Tensor]


def require(formats: tuple[str, ...]) -> None:
    """Refuse (ValueError) a format whose packages aren't installed."""
    if ONNX not in formats:
        return
    missing = []
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}; install with\n"
            "  pip install -c constraints.txt -e '.[export]'\n"
            "or export without ONNX: --formats pt2"
        )


def save(module: nn.Module, example: Tensor, names: tuple[str, str], file: Path) -> Function:
    """Write a module for any number of rows, and return what is in the file.

    Args:
        example: its input, two rows or more.
        names: of input and output.
        file: ends in .pt2 or .onnx; its name is the module's.

    Raises:
        ValueError: the module can be written for as many rows as the example has only.
    """
    rows = torch.export.Dim("rows", min=1)
    with torch.no_grad(), _quiet():
        program = _program(module, example, rows, file.stem)
        if file.suffix == f".{PT2}":
            packed = io.BytesIO()  # its own writer ends the process where the disk is full
            torch.export.save(program, packed)
            file.write_bytes(packed.getvalue())
            return _torch_function(file)
        torch.onnx.export(
            program,
            (),
            file,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return _onnx_function(file)


def _program(module: nn.Module, example: Tensor, rows: Any, end: str) -> ExportedProgram:
    """What is computed, for any number of rows; raises as `save`."""
    from torch._dynamo.exc import UserError, UserErrorType  # with torch.export's compiler

    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: rows},))
    except UserError as error:
        if error.error_type != UserErrorType.CONSTRAINT_VIOLATION:
            raise
        raise ValueError(
            f"the {end} can't be exported for any number of rows: a forward of the model makes it "
            f"a constant ({len(example)}, those of the example). len(x) does that: use x.shape[0]."
        ) from error


def _torch_function(file: Path) -> Function:
    """Only for a .pt2 that this process has just written: loading one can run code in it."""
    function: Function = torch.export.load(io.BytesIO(file.read_bytes())).module()
    return function


def _onnx_function(file: Path) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def function(rows: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: rows.numpy()})[0]))

    return function


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' notes about themselves, which don't help the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
