"""CSI feedback with the exported parts. Needs onnxruntime and numpy, no torch.

    python feedback_onnx.py                            both ends on samples.f32
    python feedback_onnx.py encode H.f32 FEEDBACK      at the UE
    python feedback_onnx.py decode FEEDBACK H_HAT.f32  at the BTS

H and H_HAT are raw float32, little-endian: channels of shape ROW, one after the other (real and
imaginary part, angles, delays), in [0, 1] with 0.5 for zero. FEEDBACK holds a codeword per channel:
ENTRIES float32, or, with BITS per entry, packed bits, each codeword padded to whole bytes.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

ROW = (2, 32, 32)
ENTRIES = 256
BITS = 0

HERE = Path(__file__).parent
Reals = NDArray[np.float32]
Feedback = NDArray[np.float32] | NDArray[np.uint8]


def read(file: str | Path, kind: str, *row: int) -> NDArray[Any]:
    """All rows of a raw file, (n, *row)."""
    values = np.fromfile(file, "u1")
    least = math.prod(row) * np.dtype(kind).itemsize
    if not values.size or values.size % least:
        sys.exit(f"{file} has {values.size:,} bytes; expected {least:,} for each channel.")
    return values.view(kind).reshape(-1, *row)


def run(name: str, values: Feedback) -> Feedback:
    """The output of a model beside this script."""
    session = onnxruntime.InferenceSession(HERE / name, providers=["CPUExecutionProvider"])
    output: Feedback = session.run(None, {session.get_inputs()[0].name: values})[0]
    return output


def encode(h: Reals) -> Feedback:
    """(n, *ROW) → what is fed back: (n, ENTRIES) float32, or (n, bytes) packed bits."""
    codeword = run("encoder.onnx", h)
    return np.packbits(codeword.astype(np.uint8), axis=1) if BITS else codeword


def decode(feedback: Feedback) -> Feedback:
    """What `encode` gave → (n, *ROW)."""
    if BITS:
        feedback = np.unpackbits(feedback.astype(np.uint8), axis=1, count=ENTRIES * BITS)
    return run("decoder.onnx", feedback)


def main(arguments: list[str]) -> None:
    """One of the three commands."""
    if len(arguments) not in (0, 3) or arguments[:1] not in ([], ["encode"], ["decode"]):
        sys.exit(__doc__)
    if arguments[:1] == ["decode"]:
        kind, width = ("u1", -(-ENTRIES * BITS // 8)) if BITS else ("<f4", ENTRIES)
        Path(arguments[2]).write_bytes(decode(read(arguments[1], kind, width)).tobytes())
        return
    h = read(arguments[1] if arguments else HERE / "samples.f32", "<f4", *ROW)
    feedback = encode(h)
    if arguments:
        Path(arguments[2]).write_bytes(feedback.tobytes())
        return
    axes = (1, 2, 3)
    nmse = np.mean(((decode(feedback) - h) ** 2).sum(axes) / ((h - 0.5) ** 2).sum(axes))
    sent = feedback[0].nbytes
    print(f"{len(h)} channels, {sent} bytes of feedback each, NMSE {10 * np.log10(nmse):.2f} dB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error.filename or sys.argv[-1]}: {error.strerror}")  # a full disk names none
