"""The autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from csipipe.settings import tables
from csipipe.settings.sections.checks import at_least
from csipipe.settings.tables import MODELS

Kernel = tuple[int, int]
"""Height (angles) and width (delays) of a convolution kernel."""
CRNET_KERNELS: tuple[tuple[Kernel, ...], ...] = (
    ((3, 3), (1, 9), (9, 1)),
    ((1, 5), (5, 1)),
)
KernelsBy = Literal["auto", "llvm", "triton", "torch"]
HeadName = Literal["linear", "crblock"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The autoencoder: encoder and decoder head at each UE, decoder tail at the BTS."""

    name: str = "csilocal"
    """Which autoencoder."""
    c1: int = 256
    """Codeword dimension: reals per sample that the encoder outputs (smashed data)."""
    c2: int | None = None
    """Tail-output dimension: reals per sample that the BTS sends to the decoder heads. null: the
    model as published (csilocal: as many as c1; the others: an image's 2·angles·delays). A number
    inserts a bottleneck of that width: a linear layer at the tail's end, one before the head."""
    head: HeadName = "linear"
    """csilocal's decoder head. linear: the paper's, one linear layer, which can do no better than
    PCA with c2 components. crblock: a CRBlock behind it, 1,425 parameters more at the UE."""
    split: tuple[int, int] | None = None
    """[i, j]: the model's layers before i are computed at the UE as encoder, those before j at the
    BTS as tail, the others at the UE as head. null: as the model says."""
    angles: int | None = None
    """Angular bins (or ports) of the images. null: the data's own. Fewer: as a smaller array of
    that many antennas would have measured, where the source can tell."""
    delays: int | None = None
    """Delay bins (or subbands) of the images. null: the data's own. Fewer: the first ones."""
    kernels: tuple[tuple[Kernel, ...], ...] = CRNET_KERNELS
    """CRBlock: one sequence of odd kernels (angles, delays) per parallel path."""
    start: Literal["random", "pca"] = "random"
    """Weights before training. random: the same for every UE. pca: encoder and head by the
    principal components of the UE's own rows, and a tail that passes codewords on; csilocal and
    centralised only, since encoders that start apart can't be averaged."""
    kernels_by: KernelsBy = "auto"
    """Who computes CRBlocks, the other small convolutions and, on GPUs, BatchNorm, the paper's loss
    and linear layers in fp32: llvm (kernels for CPUs), triton (for GPUs), torch (PyTorch's layers).
    auto: kernels where they run (for linear layers: where they are faster); what can't gives way to
    torch and says why."""

    def __post_init__(self) -> None:
        tables.check("model.name", self.name)
        if self.head != "linear" and (self.name not in MODELS or not MODELS[self.name].heads):
            several = [name for name, spec in MODELS.items() if spec.heads]
            raise ValueError(
                f"model.head is {self.head}, but {self.name} has a decoder head of its own; leave "
                f"it out, or use model.name {', '.join(several)}."
            )
        for name in ("c1", "c2", "angles", "delays"):
            at_least(f"model.{name}", getattr(self, name), 1)
        known = MODELS.get(self.name)
        able = known is not None and known.by_pca and self.head == "linear" and not self.split
        if self.start == "pca" and not able:
            names = ", ".join(name for name, model in MODELS.items() if model.by_pca)
            raise ValueError(
                f"model.start is pca, with model.name {self.name}, model.head {self.head} and "
                f"model.split {self.split}; it is known for {names} with a linear head and no "
                "model.split; use model.start random."
            )
        if not self.kernels or not all(self.kernels):
            raise ValueError(
                f"model.kernels is {self.kernels}; every path of a CRBlock needs a kernel."
            )
        for kernel in (k for path in self.kernels for k in path):
            if any(size < 1 or size % 2 == 0 for size in kernel):
                raise ValueError(
                    f"model.kernels holds {kernel}; sizes must be odd and positive, "
                    "so that padding keeps the image's size."
                )

    @property
    def image(self) -> tuple[int, int, int]:
        """(2, A, D): the shape of a row; the data's own sizes have been asked for."""
        assert self.angles is not None, "it is the data's own"
        assert self.delays is not None, "it is the data's own"
        return 2, self.angles, self.delays

    @property
    def reals(self) -> int:
        """Reals of a row: 2·A·D."""
        return math.prod(self.image)
