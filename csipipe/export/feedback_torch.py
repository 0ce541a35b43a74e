"""CSI feedback with the exported parts. Needs torch, nothing else.

    python feedback.py                            both ends on samples.f32
    python feedback.py encode H.f32 FEEDBACK      at the UE
    python feedback.py decode FEEDBACK H_HAT.f32  at the BTS

H and H_HAT are raw float32, little-endian: channels of shape ROW, one after the other (real and
imaginary part, angles, delays), in [0, 1] with 0.5 for zero. FEEDBACK holds a codeword per channel:
ENTRIES float32, or, with BITS per entry, packed bits, each codeword padded to whole bytes.

torch.export.load can run code that somebody put into a .pt2 file. Therefore a file whose SHA-256
isn't the one below is refused, and you need to trust only this script.
"""

import ctypes
import hashlib
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROW = (2, 32, 32)
ENTRIES = 256
BITS = 0
SHA256: dict[str, str] = {}

HERE = Path(__file__).parent
WEIGHTS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])


def load(name: str) -> Callable[[Tensor], Tensor]:
    """Load the program from a file beside this script, if it is the one it was written with."""
    data = (HERE / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        sys.exit(f"{name} isn't the file that this script was written with; it is not loaded.")
    program: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(data)).module()
    return program


def read(file: str | Path, dtype: torch.dtype, *row: int) -> Tensor:
    """All rows of a raw file, (n, *row)."""
    size, least = Path(file).stat().st_size, math.prod(row) * dtype.itemsize
    if not size or size % least:
        sys.exit(f"{file} has {size:,} bytes; expected {least:,} for each channel.")
    return torch.from_file(str(file), size=size // dtype.itemsize, dtype=dtype).reshape(-1, *row)


def write(file: str | Path, values: Tensor) -> None:
    """A tensor's values, raw."""
    values = values.contiguous()
    Path(file).write_bytes(ctypes.string_at(values.data_ptr(), values.nbytes))


def encode(h: Tensor) -> Tensor:
    """(n, *ROW) → what is fed back: (n, ENTRIES) float32, or (n, bytes) packed bits."""
    codeword = load("encoder.pt2")(h)
    if not BITS:
        return codeword
    bits = torch.nn.functional.pad(codeword, (0, -ENTRIES * BITS % 8))
    return (bits.reshape(len(h), -1, 8) * WEIGHTS).sum(2).to(torch.uint8)


def decode(feedback: Tensor) -> Tensor:
    """What `encode` gave → (n, *ROW)."""
    if BITS:
        bits = (feedback[:, :, None].int() & WEIGHTS.int()).ne(0).to(torch.uint8)
        feedback = bits.flatten(1)[:, : ENTRIES * BITS]
    return load("decoder.pt2")(feedback)


def main(arguments: list[str]) -> None:
    """One of the three commands."""
    if len(arguments) not in (0, 3) or arguments[:1] not in ([], ["encode"], ["decode"]):
        sys.exit(__doc__)
    if arguments[:1] == ["decode"]:
        kind, width = (torch.uint8, -(-ENTRIES * BITS // 8)) if BITS else (torch.float32, ENTRIES)
        write(arguments[2], decode(read(arguments[1], kind, width)))
        return
    h = read(arguments[1] if arguments else HERE / "samples.f32", torch.float32, *ROW)
    feedback = encode(h)
    if arguments:
        write(arguments[2], feedback)
        return
    error = (decode(feedback) - h).square().flatten(1).sum(1)
    nmse = (error / (h - 0.5).square().flatten(1).sum(1)).mean()
    sent = feedback.shape[1] * feedback.element_size()
    print(f"{len(h)} channels, {sent} bytes of feedback each, NMSE {10 * nmse.log10():.2f} dB")


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error.filename or sys.argv[-1]}: {error.strerror}")  # a full disk names none
