"""How the scalars of a message are written for the wire, and read again: the codecs.

A payload has a length that both ends computed beforehand. It ends with a number (its last scalar,
scale or value) that stays NaN until the whole message has arrived, and that makes what is decoded
NaN: checks look at what is decoded, whatever crossed.

Shapes: K shares of a message, which are the rows of one UE each; n scalars of a share, in G groups
of g that have a scale, or a choice of the largest, in common; L bytes of a share's payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from csipipe.models.ranged import levels, middles
from csipipe.settings.config import CommSettings, Precision
from csipipe.settings.tables import CODECS

BLOCK = 256
"""Scalars of an update that have a scale in common, where a row of a micro-batch has one."""
_ROUNDING, _NOISE = 3000, 3001  # distinct from the seeds of the model's parts and the UEs' draws
_FEW = 2**16  # indices up to which two bytes are enough


class Codec(Protocol):
    """Writes messages of one shape, and reads them.

    Attributes:
        share: rows of a message that become one row of its payload.
        dtype: of the payload.
        rounds: whether it can round stochastically.
    """

    share: int
    dtype: torch.dtype
    rounds: bool

    def shape(self, message: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the payload of a message of that shape."""

    def encode(self, message: Tensor, noise: Tensor | None = None) -> Tensor:
        """The payload of a message; with (K, n) noise in [0, 1), rounded stochastically."""

    def decode(self, payload: Tensor) -> Tensor:
        """The message; NaN where the payload makes no sense."""


class Plain:
    """Scalar by scalar, in another type or the same."""

    share = 1
    rounds = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def shape(self, message: tuple[int, ...]) -> tuple[int, ...]:
        return message

    def encode(self, message: Tensor, noise: Tensor | None = None) -> Tensor:
        return message.to(self.dtype).contiguous()

    def decode(self, payload: Tensor) -> Tensor:
        return payload


class _Packed:
    """What codecs of bytes share.

    Args:
        rows, width: of a UE's share of a message.
        group: scalars of a group; the last one may be shorter.
    """

    dtype = torch.uint8
    rounds = False

    def __init__(self, rows: int, width: int, group: int) -> None:
        self.share = rows
        self.width = width
        self.n = rows * width
        self.groups, self.group = -(-self.n // group), group
        self.length = 0

    def shape(self, message: tuple[int, ...]) -> tuple[int, ...]:
        return message[0] // self.share, self.length

    def _grouped(self, scalars: Tensor) -> Tensor:
        """(K·rows, width), or (K, n) → (K, G, g), with zeros where the last group is shorter."""
        scalars_Kn = scalars.reshape(-1, self.n)
        missing = self.groups * self.group - self.n
        if missing:
            scalars_Kn = functional.pad(scalars_Kn, (0, missing))
        return scalars_Kn.view(-1, self.groups, self.group)

    def _message(self, scalars_KGg: Tensor) -> Tensor:
        """The reverse."""
        return scalars_KGg.flatten(1)[:, : self.n].reshape(-1, self.width)


class Levels(_Packed):
    """Whole multiples of a scale, which is a group's largest absolute value by the highest level.

    Levels go from -(2^(bits-1) - 1) to 2^(bits-1) - 1, so that 0 stays 0. A share's payload: its
    levels, `bits` each, then its G scales in fp32.
    """

    rounds = True

    def __init__(self, bits: int, rows: int, width: int, group: int) -> None:
        super().__init__(rows, width, group)
        self.bits = bits
        self.highest = 2 ** (bits - 1) - 1
        self._body = packed_length(bits, self.groups * group)
        self.length = self._body + 4 * self.groups

    def encode(self, message: Tensor, noise: Tensor | None = None) -> Tensor:
        x_KGg = self._grouped(message.float())
        scale_KG1 = x_KGg.abs().amax(2, keepdim=True) / self.highest  # a fifth of a norm's time
        offset = 0.5 if noise is None else self._grouped(noise).to(x_KGg)
        tiny = torch.finfo(torch.float32).tiny
        level = (x_KGg / scale_KG1.clamp(min=tiny)).add_(offset).floor_()
        level.clamp_(-self.highest, self.highest).add_(self.highest)
        body = pack(level.flatten(1).to(torch.uint8), self.bits)
        return torch.cat([body, _as_bytes(scale_KG1.flatten(1))], 1)

    def decode(self, payload: Tensor) -> Tensor:
        level = unpack(payload[:, : self._body], self.bits)[:, : self.groups * self.group]
        scale_KG = payload[:, self._body :].contiguous().view(torch.float32)
        level_KGg = level.view(-1, self.groups, self.group).float().sub_(self.highest)
        return self._message(level_KGg.mul_(scale_KG[:, :, None]))


class Cells(_Packed):
    """Numbers of the cells of entries that a UE has rounded already (`csipipe.models.ranged`).

    A share's payload: `bits` for each scalar, then 1 in fp32, or NaN if a scalar is none.
    """

    def __init__(self, bits: int, rows: int, width: int) -> None:
        super().__init__(rows, width, rows * width)
        self.bits = bits
        self._body = packed_length(bits, self.n)
        self.length = self._body + 4

    def encode(self, message: Tensor, noise: Tensor | None = None) -> Tensor:
        u_Kn = message.float().reshape(-1, self.n)
        body = pack(levels(u_Kn, self.bits).to(torch.uint8), self.bits)
        return torch.cat([body, _as_bytes((u_Kn * 0).sum(1, keepdim=True) + 1)], 1)

    def decode(self, payload: Tensor) -> Tensor:
        level = unpack(payload[:, : self._body], self.bits)[:, : self.n]
        mark_K1 = payload[:, self._body :].contiguous().view(torch.float32)
        # any other mark than 1 is none: what it comes to is unsound
        whole_K1 = torch.where(mark_K1 == 1, 1.0, torch.nan)
        return (middles(level.float(), self.bits) * whole_K1).reshape(-1, self.width)


class Largest(_Packed):
    """The `kept` scalars of each group with the largest absolute value; the others count as 0.

    A share's payload: the places of G·kept scalars within their groups, in two bytes each where
    that is enough and four otherwise; then their values in fp32.
    """

    def __init__(self, kept: int, rows: int, width: int, group: int) -> None:
        super().__init__(rows, width, group)
        self.kept = kept
        self._place = torch.int16 if group <= _FEW else torch.int32
        self._body = -(-self.groups * kept * self._place.itemsize // 4) * 4
        self.length = self._body + 4 * self.groups * kept

    def encode(self, message: Tensor, noise: Tensor | None = None) -> Tensor:
        x_KGg = self._grouped(message.float())
        places = x_KGg.abs().topk(self.kept, 2).indices
        body = _as_bytes(places.to(self._place).flatten(1))
        body = functional.pad(body, (0, self._body - body.shape[1]))
        return torch.cat([body, _as_bytes(x_KGg.gather(2, places).flatten(1))], 1)

    def decode(self, payload: Tensor) -> Tensor:
        count = self.groups * self.kept
        body = payload[:, : count * self._place.itemsize].contiguous().view(self._place)
        places = body.long() & (2 ** (8 * self._place.itemsize) - 1)
        outside = (places >= self.group).any(1)
        places = places.clamp_(max=self.group - 1).view(-1, self.groups, self.kept)
        values = payload[:, self._body :].contiguous().view(torch.float32).view(places.shape)
        x_KGg = values.new_zeros(len(payload), self.groups, self.group).scatter_(2, places, values)
        x_KGg[outside] = torch.nan
        return self._message(x_KGg)


class Rounding:
    """Noise for what is sent: by seed, kind, iteration, micro-batch and UE alone.

    Args:
        stochastic: whether rounding is.

    Attributes:
        iteration: counted from 0; None: nothing is trained, and nothing is rounded stochastically.
    """

    def __init__(self, seed: int, stochastic: bool) -> None:
        self._seed = seed
        self._stochastic = stochastic
        self._generator = torch.Generator()
        self.iteration: int | None = None

    def noise(self, kind: int, m: int, owners: Sequence[int], n: int) -> Tensor | None:
        """(K, n) in [0, 1), a row for each of `owners`; None: round to the nearest."""
        if not self._stochastic or self.iteration is None:
            return None
        words = (self._seed, _ROUNDING, kind, self.iteration, m)
        return torch.stack([torch.rand(n, generator=self._of(*words, ue)) for ue in owners])

    def blur(
        self, message: Tensor, strength: float, kind: int, m: int, owners: Sequence[int]
    ) -> Tensor:
        """A message with Gaussian noise, in all evaluations the same.

        Args:
            strength: standard deviation over the root mean square of each of K shares.
        """
        when = 0 if self.iteration is None else self.iteration + 1
        words = (self._seed, _NOISE, kind, when, m)
        x_Kn = message.float().reshape(len(owners), -1)
        n = x_Kn.shape[1]
        drawn = torch.stack([torch.randn(n, generator=self._of(*words, ue)) for ue in owners])
        rms_K1 = x_Kn.square().mean(1, keepdim=True).sqrt()
        return (x_Kn + strength * rms_K1 * drawn.to(x_Kn)).view(message.shape)

    def _of(self, *words: int) -> torch.Generator:
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)
        return self._generator.manual_seed(int(state[0]))


class Residual(nn.Module):
    """What the messages of a sender have lost so far, to be added to the next one.

    Args:
        scalars: of a message.
    """

    value: Tensor

    def __init__(self, scalars: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(1, scalars))

    def add(self, message: Tensor) -> Tensor:
        """What is to be sent."""
        return message + self.value

    def keep(self, wanted: Tensor, sent: Tensor) -> None:
        """Note what is lost; of a message that isn't finite nothing is kept."""
        lost = wanted - sent
        if lost.isfinite().all():
            self.value.copy_(lost)


def of_rows(name: str, comm: CommSettings, rows: int, width: int, smashed: bool = False) -> Codec:
    """The codec of that name for `rows` rows of a UE in a message.

    Args:
        smashed: they are smashed data, whose entries may have ranges.
    """
    bits = CODECS[name].bits
    if smashed and comm.scale == "range" and bits is not None:
        return Cells(bits, rows, width)
    return _make(name, comm, rows, width, width, width)


def of_vector(name: str, comm: CommSettings, scalars: int) -> Codec:
    """The codec of that name for a vector of (1, scalars)."""
    return _make(name, comm, 1, scalars, BLOCK, scalars)


def _make(
    name: str, comm: CommSettings, rows: int, width: int, per_scale: int, per_choice: int
) -> Codec:
    spec = CODECS[name]
    if spec.dtype is not None:
        return Plain(getattr(torch, spec.dtype))
    if spec.bits is None:
        kept = max(1, round(comm.topk * per_choice))
        return Largest(kept, rows, width, per_choice)
    group = rows * width if comm.scale == "ue" else min(per_scale, rows * width)
    return Levels(spec.bits, rows, width, group)


def chosen(comm: CommSettings, precision: Precision) -> dict[str, str]:
    """The codec of each kind of message, by the kind's name in lower case."""
    return {kind: name or precision for kind, name in vars(comm.codec).items()}


def packed_length(bits: int, levels: int) -> int:
    """Bytes of some levels: whole words of four, so that scales can follow."""
    return -(-levels * bits // 32) * 4


def pack(levels: Tensor, bits: int) -> Tensor:
    """(K, n) uint8 below 2^bits → (K, L): byte j holds levels j, j + L, j + 2L …"""
    per, length = 8 // bits, packed_length(bits, levels.shape[1])
    if missing := per * length - levels.shape[1]:
        levels = functional.pad(levels, (0, missing))
    planes = levels.view(-1, per, length)
    packed = planes[:, 0].clone() if per > 1 else planes[:, 0]
    for at in range(1, per):
        packed |= planes[:, at] << (bits * at)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(K, L) → (K, 8/bits·L): the reverse, with what was added at the end."""
    if bits == 8:
        return packed
    planes = [packed >> (bits * at) & (2**bits - 1) for at in range(8 // bits)]
    return torch.cat(planes, 1)


def _as_bytes(rows: Tensor) -> Tensor:
    """(K, x) → (K, bytes of x)."""
    return rows.contiguous().view(torch.uint8)
