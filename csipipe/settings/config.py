"""Every setting of a run: its name, default, unit and check. Nothing is read or opened here.

The defaults are the `laptop` preset; `launch/configs/` holds the presets as files. A room gets
its own section of the settings, never all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from csipipe.settings import tables
from csipipe.settings.tables import CODECS, KINDS, LOSSES, METHODS, MODELS, SOURCES, MethodSpec

Kernel = tuple[int, int]
"""Height (angles) and width (delays) of a convolution kernel."""

CRNET_KERNELS: tuple[tuple[Kernel, ...], ...] = (
    ((3, 3), (1, 9), (9, 1)),
    ((1, 5), (5, 1)),
)

PARTS = ("encoder", "tail", "head")
"""Parts of a model."""
AUGMENTATIONS = ("angle", "phase")
Environment = str
Kind = Literal["channel", "eigenvectors"]
"""What an image holds: angles x delays, or ports x subbands."""
Placement = Literal["apart", "together"]
Precision = Literal["fp32", "bf16"]
Verdict = Literal["good", "suspicious", "unusable"]
"""What `channels check` says of a file, from the best to the worst."""
Moments = Literal["fp32", "bf16"]
KernelsBy = Literal["auto", "llvm", "triton", "torch"]
LossName = Literal["paper", "nmse", "sgcs"]
HeadName = Literal["linear", "crblock"]
ScheduleName = Literal["gpipe", "1f1b", "zerobubble"]


def _at_least(name: str, value: float | None, least: float) -> None:
    """Refuse (ValueError) a value that is too small; None is one that was left out."""
    if value is not None and not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")


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
            _at_least(f"model.{name}", getattr(self, name), 1)
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


@dataclass(frozen=True, kw_only=True)
class TopologySettings:
    """Who takes part, and where: BTS pipeline stages (on ranks 0 … stages-1), and UEs."""

    placement: Placement | None = None
    """apart: the ranks that aren't stages host the UEs. together: all ranks do, those of stages
    too. null: together where there is one rank, else apart. The results are the same."""
    stages: int | None = None
    """BTS pipeline stages, one rank each. null: 2 for csilocal, splitfed (together: ≤ ranks), 1
    (all they can use) for the federated methods, none for centralised."""
    ues: int = 4
    """UEs, numbered from 0 and assigned in order to the ranks that host them."""
    participants: int | None = None
    """UEs that take part in an iteration, drawn by train.seed; the others send and receive nothing
    and stay as they are. null: all."""
    partition: str | None = None
    """How the tail's layers are cut into stages: uniform, parameters, type:REGEX (DeepSpeed's), or
    measured: by the time that each layer takes on this machine. null: as the model says, for
    example type:CRBlock; of a model of your own, and with model.split, parameters."""
    profile: str | None = None
    """File for the times of partition measured: read if it exists, else written. null: none."""

    def __post_init__(self) -> None:
        _at_least("topology.ues", self.ues, 1)
        if self.participants is not None and not 1 <= self.participants <= self.ues:
            raise ValueError(
                f"topology.participants is {self.participants}; it must lie between 1 and "
                f"topology.ues {self.ues}, or be null: all of them."
            )
        _at_least("topology.stages", self.stages, 1)
        named = ("uniform", "parameters", "measured")
        cut = self.partition
        if cut is not None and cut not in named and not cut.startswith("type:"):
            raise ValueError(
                f"topology.partition is {self.partition!r}; expected {', '.join(named)} or "
                "type:REGEX, for example type:CRBlock."
            )
        if cut is not None and cut.startswith("type:"):
            try:
                re.compile(cut.removeprefix("type:"))
            except re.error as error:
                raise ValueError(
                    f"topology.partition is {cut!r}; after type: comes a regular expression for "
                    f"names of layers, and this is none ({error}). Expected for example "
                    "type:CRBlock."
                ) from error
        if self.profile is not None and self.partition != "measured":
            raise ValueError(
                f"topology.profile is {self.profile!r}, but topology.partition {self.partition!r} "
                "measures nothing; use measured, or leave the profile out."
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Channels: where they come from and how many rows the UEs share."""

    source: str = "synthetic"
    """Where channels come from."""
    path: str | None = None
    """Folder with the source's files; csinet: DATA_Htrainin.mat and its siblings."""
    environment: Environment | None = None
    """indoor, outdoor, or noniid: the paper's mixture, UE 0 mostly indoor, the last outdoor. files:
    a name in channels.json, or all. null: indoor; files: all, to each UE its own where there is a
    file per UE."""
    alpha: float | None = None
    """noniid: every environment's rows are divided among the UEs by Dirichlet shares of this
    parameter; the smaller, the less alike the UEs are. null: the paper's mixture of two."""
    kind: Kind | None = None
    """channel: images of angles and delays. eigenvectors: of ports and subbands. null: as the data
    has them."""
    train_samples: int | None = None
    """Training rows over all UEs. null: all rows of the source; synthetic: 8000."""
    test_samples: int | None = None
    """Rows of the common test set. null: all rows of the source; synthetic: 1000."""
    holdout: float = 0.05
    """Share of each UE's training rows kept for choosing the best weights; never trained on. They
    are whole users' where converted data has several rows of a user."""
    seed: int = 0
    """Seed of the synthetic channels and of the assignment of rows to UEs."""
    accept: Verdict = "suspicious"
    """The worst verdict of channels check on a file that is trained on. suspicious: what it calls
    so is said once. good: that is refused, too. unusable: values outside of [0, 1] are let in; NaN
    and other shapes never."""

    def __post_init__(self) -> None:
        tables.check("data.source", self.source)
        if SOURCES[self.source].folder != (self.path is not None):
            needs = [name for name, source in SOURCES.items() if source.folder]
            takes = [name for name, source in SOURCES.items() if not source.folder]
            raise ValueError(
                f"data.source is {self.source} and data.path is {self.path}; {' and '.join(needs)} "
                f"need a folder in data.path, {', '.join(takes)} takes none."
            )
        known = SOURCES[self.source].environments
        if known and self.where not in known:
            raise ValueError(
                f"data.environment is {self.environment!r}; it must be one of {', '.join(known)}."
            )
        if self.alpha is not None and self.where != "noniid":
            raise ValueError(
                f"data.alpha is {self.alpha}, but data.environment {self.where}; only noniid "
                "draws shares."
            )
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"data.alpha is {self.alpha}; it must be positive and finite.")
        for name in ("train_samples", "test_samples"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        if not 0 <= self.holdout < 1:
            raise ValueError(f"data.holdout is {self.holdout}; it must lie in [0, 1).")
        _at_least("data.seed", self.seed, 0)

    @property
    def where(self) -> Environment:
        """The environment, or the source's usual one."""
        return self.environment or SOURCES[self.source].environment


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Algorithm 1: iterations, batches, Adam, precision, devices."""

    iterations: int = 500
    """Training iterations; one iteration is one exchange between the UEs and the BTS."""
    loss: LossName = "paper"
    """What is minimised, the mean over a mini-batch; reported is the same in any case. paper:
    ‖Ĥ−H‖²/‖H‖² on the [0, 1] data. nmse: ‖Ĥ−H‖²/‖H−0.5‖². sgcs: 1 - SGCS, of eigenvectors."""
    batch_size: int = 32
    """Samples per UE and iteration, drawn uniformly from the UE's own rows."""
    micro_batches: int = 4
    """Micro-batches that the tail of csilocal, splitfed and centralised runs on; must divide
    train.batch_size. A federated UE runs its whole model on its whole mini-batch."""
    schedule: ScheduleName = "zerobubble"
    """Pipeline schedule. gpipe: all forward passes, then all backward passes; 1f1b: alternating,
    with few micro-batches in memory; zerobubble: 1f1b whose weight gradients fill the gaps. All
    give the same results, to the bit."""
    local_steps: int = 1
    """E: Adam steps of a UE, each on a mini-batch, between two exchanges (FedAvg, FedProx)."""
    aggregate_every: int | None = None
    """E of splitfed: iterations between two averagings of encoders and heads; more than there are:
    never. null: 10."""
    personal_iterations: int = 0
    """splitfed: the last iterations, without averaging: UEs tune encoder and head of their own."""
    mu: float = 0.01
    """Weight of FedProx's proximal term: adds mu times (local - global model) to the gradient."""
    personalisation: Literal["fedsim", "fedalt"] = "fedsim"
    """Methods …per. fedsim: encoder and shared parts step together. fedalt: E steps of the
    encoder, then E of the shared parts."""
    lr: float = 2e-3
    """Adam's (peak) learning rate."""
    rates: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of the rate for encoder, tail and head."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: linear warm-up, then cosine decay to 0. constant: train.lr throughout."""
    warmup: float = 0.05
    """Share of the iterations that warm up (cosine only)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moments."""
    moments: Moments = "fp32"
    """How UEs keep Adam's moments. bf16: half the memory; what is learnt changes a little."""
    seed: int = 0
    """Seed of the initial weights (the same for every UE) and of every UE's batch draws."""
    average: float | None = None
    """Decay, per iteration, of an exponential mean of the weights, which is evaluated and saved
    instead of the last ones; 0.999 is over about 1,000 iterations. null: none."""
    augment: str | None = None
    """What a UE does to every row that it draws, with commas between. angle: a circular shift, as a
    turned array sees; phase: a phase common to the row. Held-out and test rows stay."""
    init: str | None = None
    """Start from the weights of this run's directory, or of a folder that `export --pack` wrote,
    under the settings given here; the model must be the same. null: weights drawn by train.seed."""
    newcomers: Literal["fresh", "mean"] = "mean"
    """What UEs that train.init doesn't have start from. mean: of its UEs' encoders and heads;
    fresh: drawn by train.seed."""
    freeze: str | None = None
    """Parts that stay as they are, with commas between: encoder, tail, head. They take no step,
    BatchNorm uses its running statistics, and what only they would need isn't exchanged."""
    precision: Precision = "fp32"
    """Arithmetic of UEs and tail, and the codec of what comm.codec doesn't name. bf16: autocast,
    fp32 weights, half the bytes exchanged; on a CPU only what is exchanged."""
    tf32: bool = False
    """Let GPUs compute fp32 convolutions and products in TF32: faster, right to three digits."""
    deepspeed: str | None = None
    """DeepSpeed file without batch keys. null: ds_configs/<precision>.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one, else CPU."""
    stacked: Literal["auto", "always", "never"] = "auto"
    """csilocal, splitfed: encoders and heads of a rank's UEs as one. auto: where faster."""
    cuda_graph: Literal["auto", "always", "never"] = "auto"
    """csilocal in one process on a GPU: iterations as one CUDA graph. auto: where possible."""
    on_bad_ue: Literal["stop", "drop"] = "stop"
    """What to do when a UE sends values that aren't finite or exceed train.max_rms. stop: end the
    run and name the UE. drop: compute the iteration as if the UE had not taken part.
    (centralised: no UE sends anything.)"""
    max_rms: float = 1e4
    """Root mean square above which a tensor that crosses between a UE and the BTS is bad. Smashed
    data are of order 1 and gradients smaller: the default only catches values that diverged."""
    threads: int | None = None
    """CPU threads per rank. null: OMP_NUM_THREADS, unless it is torchrun's 1, else cores / ranks of
    the node."""

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "micro_batches", "local_steps"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not divisible by train.micro_batches "
                f"{self.micro_batches}; every micro-batch holds the same number of rows of every "
                "UE."
            )
        _at_least("train.aggregate_every", self.aggregate_every, 1)
        if not 0 <= self.personal_iterations <= self.iterations:
            raise ValueError(
                f"train.personal_iterations is {self.personal_iterations}; it must lie between 0 "
                f"and train.iterations {self.iterations}."
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"train.lr is {self.lr}; it must be positive and finite.")
        if not all(0 < factor < math.inf for factor in self.rates):
            raise ValueError(
                f"train.rates is {self.rates}; all three must be positive and finite (train.freeze "
                "keeps a part as it is)."
            )
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(
                f"train.average is {self.average}; it must lie between 0 and 1, such as 0.999, or "
                "be null."
            )
        if not {*self.augmentation} <= {*AUGMENTATIONS}:
            raise ValueError(
                f"train.augment is {self.augment!r}; expected {' or '.join(AUGMENTATIONS)}, or "
                "both with a comma between, or null."
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"train.warmup is {self.warmup}; it must lie in [0, 1].")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {self.betas}; both must lie in [0, 1).")
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"train.mu is {self.mu}; it must be finite and at least 0.")
        if not {*self.frozen} < {*PARTS}:
            raise ValueError(
                f"train.freeze is {self.freeze!r}; expected one or two of {', '.join(PARTS)}, "
                "with a comma between, or null."
            )
        if not self.max_rms > 0:
            raise ValueError(f"train.max_rms is {self.max_rms}; it must be a positive number.")
        _at_least("train.seed", self.seed, 0)
        _at_least("train.threads", self.threads, 1)

    @property
    def augmentation(self) -> tuple[str, ...]:
        """What is done to the rows that a UE draws."""
        return () if self.augment is None else tuple(self.augment.split(","))

    def rate_of(self, part: str) -> float:
        """Factor of a part's rate."""
        return self.rates[PARTS.index(part)]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts that stay as they are."""
        return () if self.freeze is None else tuple(self.freeze.split(","))

    def lr_at(self, iteration: int) -> float:
        """Learning rate of iteration `iteration`, counted from 0."""
        if self.lr_schedule == "constant":
            return self.lr
        warm = round(self.warmup * self.iterations)
        if iteration < warm:
            return self.lr * (iteration + 1) / warm
        done = (iteration - warm) / max(1, self.iterations - warm)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """How each kind of message is written: fp32, bf16, int8, int4, int2 or topk."""

    smashed: str | None = None
    """Smashed data, UE to BTS: fp32, bf16, int8, int4, int2 (levels of that many bits) or topk (the
    largest, with their places). null, here and below: as train.precision says."""
    output: str | None = None
    """The tail's output, BTS to UE."""
    output_gradient: str | None = None
    """The gradient at the head's input, UE to BTS."""
    smashed_gradient: str | None = None
    """The gradient at the encoder's output, BTS to UE."""
    update: str | None = None
    """Federated methods and splitfed: the change of the shared parts or their gradient, UE to
    BTS."""
    mean_update: str | None = None
    """Federated methods and splitfed: the mean of the UEs' updates, BTS to UE."""

    def __post_init__(self) -> None:
        for kind, name in vars(self).items():
            if name is not None and name not in CODECS:
                raise ValueError(
                    f"comm.codec.{kind} is {name!r}; it must be one of {', '.join(CODECS)}."
                )


@dataclass(frozen=True, kw_only=True)
class CommSettings:
    """What crosses between UEs and BTS: as how many bytes, and how it is rounded."""

    codec: CodecSettings = field(default_factory=CodecSettings)
    """How each kind of message is written."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How int8, int4 and int2 round in training. stochastic: up or down at random, right in the
    mean; drawn by train.seed, kind, iteration and UE."""
    scale: Literal["row", "ue", "range"] = "row"
    """What has a scale, of 4 bytes, in common (int8, int4, int2). row: a row of a micro-batch; 256
    scalars of an update. ue: all that a UE sends or receives in a message. range: as row, but every
    entry of the smashed data has a range that is fixed in the first iteration, and the encoder is
    trained for it."""
    topk: float = 0.05
    """Share of the scalars of a row, or of an update, that topk sends."""
    noise: float = 0.0
    """Gaussian noise that a UE adds to its smashed data, in training and evaluations: standard
    deviation over the root mean square of what it sends in a message."""
    error_feedback: bool = False
    """Federated methods and splitfed: what an update loses at its codec is added to the next one,
    at the UEs and at the BTS."""

    def __post_init__(self) -> None:
        if not 0 < self.topk <= 1:
            raise ValueError(f"comm.topk is {self.topk}; it must lie in (0, 1].")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"comm.noise is {self.noise}; it must be finite and at least 0.")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run is stored, how often it evaluates, how long it waits for a peer."""

    dir: str | None = None
    """Directory of the run, seen by all nodes. null: runs/<method>-<environment>-<time>, with
    the model behind the method where it isn't csilocal."""
    resume: str = "auto"
    """auto: an unfinished run in run.dir resumes from its newest checkpoint if the settings are the
    same; a finished one is left alone. never: run.dir must not hold a run. Otherwise a path: a
    run's directory, or one of its checkpoints/<iteration>, to resume from in run.dir."""
    save_every: int | None = None
    """Iterations between checkpoints; the last iteration always saves. null: a tenth of the run."""
    keep: int = 2
    """How many of the newest checkpoints are kept; the best weights are kept separately."""
    eval_every: int | None = None
    """Iterations between evaluations; the last one always evaluates. null: a tenth of the run."""
    eval_ues: int | None = None
    """UEs that evaluations are over, drawn by train.seed, the same throughout the run: what is
    shown, and the choice of the best weights. null: all."""
    timeout: float = 60.0
    """Longest wait for a peer inside an iteration, in seconds, on every process group."""
    profile: bool = False
    """Record some iterations on every rank: traces for TensorBoard and Perfetto in profile/, and a
    picture of the pipeline, timeline.png."""
    profile_after: int = 5
    """Iterations before the first profiled one, at least 2: one to learn how large traces get, one
    for the ranks to resynchronise."""
    profile_iterations: int = 3
    """Number of consecutive iterations to profile."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every"):
            _at_least(f"run.{name}", getattr(self, name), 1)
        _at_least("run.keep", self.keep, 1)
        _at_least("run.profile_after", self.profile_after, 2)
        _at_least("run.profile_iterations", self.profile_iterations, 1)
        if not self.resume:
            raise ValueError("run.resume is empty; it must be auto, never or a path.")
        if not 0 < self.timeout < math.inf:
            raise ValueError(
                f"run.timeout is {self.timeout}; it must be a positive, finite number of seconds."
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of one method."""

    method: str = "csilocal"
    """How it is trained."""
    model: ModelSettings = field(default_factory=ModelSettings)
    topology: TopologySettings = field(default_factory=TopologySettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        tables.check("method", self.method)
        # said in full, as it is stored and shown
        object.__setattr__(self, "data", replace(self.data, environment=self.data.where))
        if self.train.local_steps > 1 and not self.spec.local_steps:
            several = [name for name, method in METHODS.items() if method.local_steps]
            raise ValueError(
                f"train.local_steps is {self.train.local_steps}, but {self.method} exchanges after "
                f"every step; leave it at 1, or use one of {', '.join(several)}."
            )
        if self.topology.participants is not None and not self.spec.stages:
            raise ValueError(
                f"topology.participants is {self.topology.participants}, but {self.method} has the "
                "rows of all UEs in one process, and nobody takes part or doesn't; leave it out."
            )
        loss, kinds = self.train.loss, [n for n, kind in KINDS.items() if kind.similarity]
        if LOSSES[loss].similarity and self.data.kind not in (None, *kinds):
            raise ValueError(
                f"train.loss is {loss}, which needs images of data.kind {', '.join(kinds)}, but "
                f"these are of kind {self.data.kind}; use another train.loss, or convert the data."
            )
        if self.run.eval_ues is not None and not 1 <= self.run.eval_ues <= self.topology.ues:
            raise ValueError(
                f"run.eval_ues is {self.run.eval_ues}; it must lie between 1 and topology.ues "
                f"{self.topology.ues}, or be null: all of them."
            )
        if self.model.start == "pca" and self.spec.shared:
            raise ValueError(
                f"model.start is pca and method {self.method}, whose UEs average "
                f"{', '.join(self.spec.shared)}: parts that start from each UE's own components "
                "can't be averaged; use model.start random."
            )
        if self.train.average and self.spec.shared and self.participants < self.topology.ues:
            raise ValueError(
                f"train.average is {self.train.average} and topology.participants "
                f"{self.participants} of {self.topology.ues} UEs, with method {self.method}: a UE "
                "that takes no part has no mean of what all have in common; leave one of them out."
            )
        if self.model.start == "pca" and self.feedback_bits is not None:
            raise ValueError(
                "model.start is pca and comm.scale range, which scales every entry of the codeword "
                "by itself, so that the tail would not put it together again; use model.start "
                "random, or another comm.scale."
            )
        if "angle" in self.train.augmentation and self.similarity:
            raise ValueError(
                f"train.augment is {self.train.augment}, but images of data.kind {self.data.kind} "
                "have no angles that could be shifted; leave angle out."
            )
        shared = self.spec.shared
        if shared and not set(shared) - set(self.train.frozen):
            raise ValueError(
                f"train.freeze is {self.train.freeze}, which are all the parts that {self.method} "
                "exchanges; freeze fewer."
            )
        if self.train.stacked == "always" and not self.spec.pipelined:
            raise ValueError(
                f"train.stacked is always, but {self.method} has no UEs whose encoders and heads "
                "could be computed as one; leave it at auto."
            )
        last = self.run.profile_after + self.run.profile_iterations
        if self.run.profile and last > self.train.iterations:
            raise ValueError(
                f"run.profile_iterations is {self.run.profile_iterations} and run.profile_after "
                f"{self.run.profile_after}, but train.iterations {self.train.iterations}: the last "
                f"profiled iteration would be {last}; profile fewer, or train more."
            )

    def check_comm(self) -> None:
        """Refuse (ValueError) what is said of messages that the method doesn't exchange."""
        crosses, train = self.spec.crosses, self.train
        for name in ("aggregate_every", "personal_iterations"):
            if getattr(train, name) and not self.spec.aggregates:
                able = [method for method, spec in METHODS.items() if spec.aggregates]
                raise ValueError(
                    f"train.{name} is {getattr(train, name)}, but {self.method} has no iterations "
                    f"with and without an averaging; leave it out, or use {', '.join(able)}."
                )
        for kind, name in vars(self.comm.codec).items():
            if name is not None and kind not in crosses:
                what = ", ".join(crosses) or "nothing"
                raise ValueError(
                    f"comm.codec.{kind} is {name}, but {self.method} exchanges {what}; leave it "
                    "out."
                )
        if self.comm.noise and "smashed" not in crosses:
            raise ValueError(
                f"comm.noise is {self.comm.noise}, but {self.method} exchanges no smashed data; "
                "leave it out."
            )
        if self.comm.scale == "range" and self.feedback_bits is None:
            raise ValueError(
                f"comm.scale is range, but comm.codec.smashed is {self.comm.codec.smashed}; ranges "
                "are for smashed data in int8, int4 or int2. Name one of them, or use comm.scale "
                "row."
            )
        if self.comm.scale == "range" and self.spec.shared:
            raise ValueError(
                f"comm.scale is range, but {self.method} averages encoders, whose ranges are found "
                "by every UE for itself; use comm.scale row or ue."
            )
        if self.comm.error_feedback and "update" not in crosses:
            raise ValueError(
                f"comm.error_feedback is true, but {self.method} sends no updates, whose losses "
                "could be made up for by the next one; leave it out."
            )

    def on(self, ranks: int) -> Settings:
        """The same run on `ranks` processes: who is where is decided, unless it was."""
        place = self.topology
        placement = place.placement or ("together" if ranks == 1 else "apart")
        stages = self.stages
        if place.stages is None and placement == "together":
            stages = min(stages, ranks)
        decided = replace(place, placement=placement, stages=stages or None)
        return replace(self, topology=decided)

    @property
    def spec(self) -> MethodSpec:
        """What there is to know of the method."""
        return METHODS[self.method]

    @property
    def feedback_bits(self) -> int | None:
        """Bits for which every entry of the codeword is trained; None: for none."""
        name = self.comm.codec.smashed
        if name is None or self.comm.scale != "range":
            return None
        return CODECS[name].bits

    @property
    def stages(self) -> int:
        """BTS pipeline stages of this run; the unsplit model has none."""
        return self.topology.stages or self.spec.stages

    @property
    def participants(self) -> int:
        """UEs that take part in an iteration."""
        return self.topology.participants or self.topology.ues

    @property
    def aggregate_every(self) -> int:
        """Iterations between two averagings of what the UEs share."""
        return self.train.aggregate_every or self.spec.aggregates or 1

    @property
    def aggregated(self) -> int:
        """Iterations up to the last averaging; in those that follow, every UE is on its own."""
        common = self.train.iterations - self.train.personal_iterations
        return common - common % self.aggregate_every

    @property
    def similarity(self) -> bool:
        """Whether SGCS compares the columns of the images themselves."""
        return self.data.kind is not None and KINDS[self.data.kind].similarity

    @property
    def axes(self) -> tuple[str, str]:
        """What stands at an image's axes in pictures, see `SourceSpec.axes`."""
        kind = self.data.kind and KINDS[self.data.kind]
        return (kind and kind.axes) or SOURCES[self.data.source].axes

    @property
    def partition(self) -> str:
        """How this run's tail is cut into stages."""
        row = MODELS.get(self.model.name) if self.model.split is None else None
        return self.topology.partition or (row.partition if row else tables.OWN_PARTITION)

    @property
    def eval_every(self) -> int:
        """Iterations between evaluations."""
        return self.run.eval_every or max(1, self.train.iterations // 10)

    @property
    def save_every(self) -> int:
        """Iterations between checkpoints."""
        return self.run.save_every or max(1, self.train.iterations // 10)


def suited(method: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, by section, without what is said only to other methods than `method`.

    They needn't suit any single method before: a report's are for several.
    """
    spec = METHODS[method]
    comm, train, topology = (sections[name] for name in ("comm", "train", "topology"))
    kinds = [field.name for field in fields(CodecSettings)]
    split, ranged = "smashed" in spec.crosses, comm.scale == "range"
    comm = replace(
        comm,
        codec=replace(comm.codec, **dict.fromkeys(set(kinds) - set(spec.crosses))),
        error_feedback=comm.error_feedback and "update" in spec.crosses,
        noise=comm.noise if split else 0.0,
        scale="row" if ranged and (spec.shared or not split) else comm.scale,
    )
    train = replace(
        train,
        local_steps=train.local_steps if spec.local_steps else 1,
        aggregate_every=train.aggregate_every if spec.aggregates else None,
        personal_iterations=train.personal_iterations if spec.aggregates else 0,
        stacked="auto" if train.stacked == "always" and not spec.pipelined else train.stacked,
    )
    topology = replace(topology, stages=topology.stages if spec.pipelined else None)
    found = {"method": method, "comm": comm, "train": train, "topology": topology}
    return {**sections, **found}
