"""How the model is trained, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from csipipe.settings.sections.checks import at_least
from csipipe.settings.tables import PARTS

AUGMENTATIONS = ("angle", "phase")
Precision = Literal["fp32", "bf16"]
Moments = Literal["fp32", "bf16"]
LossName = Literal["paper", "nmse", "sgcs"]
ScheduleName = Literal["gpipe", "1f1b", "zerobubble"]


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
            at_least(f"train.{name}", getattr(self, name), 1)
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not divisible by train.micro_batches "
                f"{self.micro_batches}; every micro-batch holds the same number of rows of every "
                "UE."
            )
        at_least("train.aggregate_every", self.aggregate_every, 1)
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
        at_least("train.seed", self.seed, 0)
        at_least("train.threads", self.threads, 1)

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
