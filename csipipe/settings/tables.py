"""The known methods, models and sources, by the name that a setting gives them: facts.

A row says where its code is as `package.module:function`, which is imported when it is needed, so
that nothing heavy is loaded with the settings and rooms above can be named. Nothing outside this
file compares a name: whatever depends on a method is a fact in its row. Adding one takes a file, a
row here and a test.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("encoder", "tail", "head")
"""Parts of a model."""
_SPLIT = ("smashed", "output", "output_gradient", "smashed_gradient")
_AVERAGED = ("update", "mean_update")


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method that trains the model."""

    about: str
    """What `--help` says about it."""
    prepare: str
    """`prepare(settings, rank, world_size, device)`, as `csipipe.methods.prepare`."""
    cost: str
    """`cost(settings)`: scalars that a UE sends, and receives, in one iteration."""
    stages: int
    """BTS stages if topology.stages is null; 0: everything in one process, no BTS."""
    pipelined: bool = False
    """Whether the tail runs at the BTS, under DeepSpeed, on topology.stages stages."""
    local_steps: bool = False
    """Whether a UE may take several steps of its own between two exchanges."""
    bts_steps: bool = False
    """Whether it is the BTS that keeps and steps the shared parts; UEs have no moments of them."""
    shared: tuple[str, ...] = ()
    """Parts of the model that every UE has and the BTS averages; the other parts are private."""
    aggregates: int = 0
    """Iterations between two averagings of the shared parts if train.aggregate_every is null; 0:
    the user can't say, after every one if anything is shared."""
    crosses: tuple[str, ...] = ()
    """What crosses between UEs and BTS, as comm.codec has it."""

    def __post_init__(self) -> None:
        for fact, words in (("shared", PARTS), ("crosses", (*_SPLIT, *_AVERAGED))):
            if unknown := [word for word in getattr(self, fact) if word not in words]:
                raise ValueError(
                    f"{fact} of the method {self.about!r} has {unknown[0]!r}; it must be of "
                    f"{', '.join(words)}."
                )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An autoencoder in three parts; each builder takes `ModelSettings` and draws weights."""

    about: str
    encoder: str
    """A module: (B, 2, A, D) → (B, c1)."""
    tail: str
    """A list of modules, from which stages are cut: (B, c1) → (B, 2·A·D), or (B, c2)."""
    head: str
    """A module: what the tail makes → (B, 2, A, D). It may have no parameters."""
    partition: str
    """How the tail is cut by default, see topology.partition."""
    own_c2: bool = False
    """Whether its builders put in the second bottleneck, of c2 reals (null: as many as c1). Else
    one is inserted, two linear layers, where model.c2 is a number."""
    heads: bool = False
    """Whether model.head chooses its decoder head."""
    by_pca: tuple[str, str] | None = None
    """What sets encoder and head by a UE's rows, and the tail, where model.start is pca; None: it
    can't be."""
    plain: str | None = None
    """The same tail of PyTorch's own layers, for the benchmark; None: there is none."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where channels come from."""

    about: str
    open: str
    """`open(data, angles, delays)`: a `csipipe.channels.source.Source`; None for all that the data
    has."""
    folder: bool
    """Whether it reads files, from data.path."""
    train_samples: int | None = None
    """Training rows by default; None: all rows."""
    test_samples: int | None = None
    """Rows of the test set by default; None: all rows."""
    environment: str = "indoor"
    """The environment if data.environment is null."""
    environments: tuple[str, ...] = ("indoor", "outdoor", "noniid")
    """What data.environment may be; none: what the data has."""
    axes: tuple[str, str] = (
        "angle (bins of 1/{} cycle per antenna)",
        "delay (bins of 50 ns)",
    )
    """Labels of an image's axes in pictures; {}: the number of bins."""


@dataclass(frozen=True, kw_only=True)
class KindSpec:
    """What an image shows, by data.kind."""

    axes: tuple[str, str] | None = None
    """As `SourceSpec.axes`, whatever the source; None: the source's."""
    similarity: bool = False
    """Whether SGCS compares the columns of the images themselves. It is then the figure on the
    screen, and the one by which the best weights are chosen."""


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What training minimises, by train.loss; the mean over a mini-batch."""

    function: str
    """`function(h_hat, h)`: (B, 2, A, D) twice → (B,)."""
    similarity: bool = False
    """Whether it needs images of a kind with `similarity`."""


_CROSSING = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """How scalars are written for the wire, by comm.codec.

    Neither `dtype` nor `bits`: only the largest scalars cross, comm.topk of them.
    """

    dtype: str | None = None
    """The type, of torch, in which every scalar crosses by itself: one of `_CROSSING`."""
    bits: int | None = None
    """Bits of a scalar that crosses as a multiple of a scale: 2, 4 or 8, which fill a byte."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.bits is not None:
            raise ValueError(
                f"a codec has dtype {self.dtype!r} and bits {self.bits}, but a scalar crosses in a "
                "type or as a multiple of a scale; leave one of them out."
            )
        if self.dtype not in (None, *_CROSSING):
            raise ValueError(
                f"dtype of a codec is {self.dtype!r}; it must be {', '.join(_CROSSING[:-1])} or "
                f"{_CROSSING[-1]}: narrower types can't be checked on arrival, and wider ones hold "
                "no more."
            )
        if self.bits not in (None, 2, 4, 8):
            raise ValueError(
                f"bits of a codec is {self.bits}; it must be 2, 4 or 8, so that there are levels "
                "beside 0 and whole ones fill a byte."
            )


def _federated(about: str, prepare: str, **facts: Any) -> MethodSpec:
    return MethodSpec(
        about=about,
        prepare=prepare,
        cost="csipipe.methods.cost:shared_parts",
        stages=1,
        crosses=_AVERAGED,
        **facts,
    )


_PERSONAL = ("tail", "head")

METHODS: dict[str, MethodSpec] = {
    "csilocal": MethodSpec(
        about="split, pipelined training",
        prepare="csipipe.methods.csilocal:prepare",
        cost="csipipe.methods.cost:split",
        stages=2,
        pipelined=True,
        crosses=_SPLIT,
    ),
    "splitfed": MethodSpec(
        about="csilocal, with encoders and heads averaged every so many iterations",
        prepare="csipipe.methods.splitfed:prepare",
        cost="csipipe.methods.cost:split",
        stages=2,
        pipelined=True,
        shared=("encoder", "head"),
        aggregates=10,
        crosses=(*_SPLIT, *_AVERAGED),
    ),
    "centralised": MethodSpec(
        about="the unsplit model on all data, in one process",
        prepare="csipipe.methods.centralised:prepare",
        cost="csipipe.methods.cost:shared_parts",
        stages=0,
    ),
    "fedavg": _federated(
        "the whole model on every UE, and the mean of the models",
        "csipipe.methods.fedavg:prepare_fedavg",
        local_steps=True,
        shared=PARTS,
    ),
    "fedavgper": _federated(
        "fedavg, with a personal encoder at every UE",
        "csipipe.methods.fedavg:prepare_fedavg",
        local_steps=True,
        shared=_PERSONAL,
    ),
    "fedprox": _federated(
        "fedavg with a pull towards the mean (train.mu)",
        "csipipe.methods.fedavg:prepare_fedprox",
        local_steps=True,
        shared=PARTS,
    ),
    "fedproxper": _federated(
        "fedprox, with a personal encoder at every UE",
        "csipipe.methods.fedavg:prepare_fedprox",
        local_steps=True,
        shared=_PERSONAL,
    ),
    "fedgrad": _federated(
        "the whole model on every UE, and the mean of the gradients",
        "csipipe.methods.fedgrad:prepare",
        bts_steps=True,
        shared=PARTS,
    ),
    "fedgradper": _federated(
        "fedgrad, with a personal encoder at every UE",
        "csipipe.methods.fedgrad:prepare",
        bts_steps=True,
        shared=_PERSONAL,
    ),
}

MODELS: dict[str, ModelSpec] = {
    "csilocal": ModelSpec(
        about="the paper's: CsiNet's encoder, two CRBlocks in the tail, a linear head",
        encoder="csipipe.models.csilocal:encoder",
        tail="csipipe.models.csilocal:tail",
        head="csipipe.models.csilocal:head",
        partition="type:CRBlock",
        own_c2=True,
        heads=True,
        by_pca=("csipipe.models.pca:start_ends", "csipipe.models.pca:start_tail"),
        plain="csipipe.bench.plain:tail",
    ),
    "csinet": ModelSpec(
        about="CsiNet (2018): a convolution, two RefineNet blocks",
        encoder="csipipe.models.csinet:encoder",
        tail="csipipe.models.csinet:tail",
        head="csipipe.models.csinet:head",
        partition="type:RefineBlock",
    ),
    "crnet": ModelSpec(
        about="CRNet (2020): convolutions of several resolutions, two CRBlocks",
        encoder="csipipe.models.crnet:encoder",
        tail="csipipe.models.crnet:tail",
        head="csipipe.models.crnet:head",
        partition="type:CRBlock",
    ),
    "clnet": ModelSpec(
        about="CLNet (2021): CRNet with attention in the encoder and smaller CRBlocks",
        encoder="csipipe.models.clnet:encoder",
        tail="csipipe.models.clnet:tail",
        head="csipipe.models.clnet:head",
        partition="type:CRBlock",
    ),
    "transnet": ModelSpec(
        about="TransNet (2022): transformer layers, attention within a sample",
        encoder="csipipe.models.transnet:encoder",
        tail="csipipe.models.transnet:tail",
        head="csipipe.models.transnet:head",
        partition="type:DecoderLayer",
    ),
    "linear": ModelSpec(
        about="linear layers only, to compare with: no better than PCA",
        encoder="csipipe.models.linear:encoder",
        tail="csipipe.models.linear:tail",
        head="csipipe.models.linear:head",
        partition="uniform",
    ),
}

SOURCES: dict[str, SourceSpec] = {
    "synthetic": SourceSpec(
        about="made by the package",
        open="csipipe.channels.synthetic:open_source",
        folder=False,
        train_samples=8000,
        test_samples=1000,
    ),
    "csinet": SourceSpec(
        about="CsiNet's .mat files in data.path",
        open="csipipe.channels.csinet:open_source",
        folder=True,
    ),
    "files": SourceSpec(
        about="what `channels convert` wrote into data.path",
        open="csipipe.channels.filesource:open_source",
        folder=True,
        environment="all",
        environments=(),
        axes=("angle bin, {} in all", "delay bin"),
    ),
}

KINDS: dict[str, KindSpec] = {
    "channel": KindSpec(),
    "eigenvectors": KindSpec(
        axes=("port (of {})", "subband (of {})"),
        similarity=True,
    ),
}

LOSSES: dict[str, LossSpec] = {
    "paper": LossSpec(
        function="csipipe.measure.metrics:paper_loss",
    ),
    "nmse": LossSpec(
        function="csipipe.measure.metrics:centred_nmse",
    ),
    "sgcs": LossSpec(
        function="csipipe.measure.metrics:sgcs_loss",
        similarity=True,
    ),
}

CODECS: dict[str, CodecSpec] = {
    "fp32": CodecSpec(dtype="float32"),
    "bf16": CodecSpec(dtype="bfloat16"),
    "int8": CodecSpec(bits=8),
    "int4": CodecSpec(bits=4),
    "int2": CodecSpec(bits=2),
    "topk": CodecSpec(),
}

TABLES: dict[str, Mapping[str, MethodSpec | ModelSpec | SourceSpec]] = {
    "method": METHODS,
    "model.name": MODELS,
    "data.source": SOURCES,
}
"""By the setting that names a row."""
OWN = {"model.name": "package.module:function, a function of (angles, delays, c1, c2)"}
"""Settings that may name the user's own code instead of a row, and what it must be."""

OWN_PARTITION = "parameters"
"""How a tail is cut where topology.partition says nothing and no row knows its layers: that of a
user's own model, or of model.split."""


def is_own(name: str) -> bool:
    """Whether a name is that of the user's own code, module:function."""
    return ":" in name


def check(setting: str, name: str) -> None:
    """Refuse (ValueError) a name that is in no row; the user's own code isn't looked for yet."""
    table = TABLES[setting]
    if name in table or (setting in OWN and is_own(name)):
        return
    own = f", or {OWN[setting]}" if setting in OWN else ""
    raise ValueError(f"{setting} is {name!r}; it must be one of {', '.join(table)}{own}.")


def listed(setting: str) -> str:
    """Every name with what it is, for `--help`."""
    rows = [f"{name}: {row.about}" for name, row in TABLES[setting].items()]
    own = [f"Or {OWN[setting]}"] if setting in OWN else []
    return "; ".join(rows) + "." + "".join(f" {text}." for text in own)


def found(name: str, setting: str = "") -> Any:
    """What `package.module:function` names.

    Args:
        setting: the setting in which a user wrote it, for the error.

    Raises:
        ValueError: of a setting: there is no such module or function, or the module fails.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's own module may raise anything
        if not setting:
            raise
        raise ValueError(
            f"{setting} is {name!r}, which can't be imported ({type(error).__name__}: {error}); "
            "write package.module:function, of a package that is installed or in PYTHONPATH."
        ) from error
