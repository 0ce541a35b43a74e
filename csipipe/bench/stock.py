"""Peer: DeepSpeed's stock PipelineEngine, `engine.train_batch` with its own 1F1B schedule.

Pipeline-parallelism tutorial of DeepSpeed 0.19: a PipelineModule with a loss_fn, a data iterator
on the first and the last stage. It has no way to know the UEs, so the last stage waits for them
in loss_fn (see `exchange`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from csipipe.bench.peerstage import PeerStage
from csipipe.methods.base import adam
from csipipe.pipeline import settings as deepspeed_settings
from csipipe.pipeline.engine import TailStage


class _Module(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """A PipelineModule that is cut where it is told."""

    def __init__(self, cuts: list[int], layers: list[nn.Module], **keys: object) -> None:
        self._cuts = cuts
        super().__init__(layers, partition_method="uniform", **keys)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self._cuts
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class _Engine(PipelineEngine):  # type: ignore[misc]
    """What `deepspeed.initialize` makes, but for weights without dimensions."""

    _broadcast_model = TailStage._broadcast_model


class StockStage(PeerStage):
    """One stage of the tutorial; its engine is built by hand, as `deepspeed.initialize` does it."""

    def build(self, layers: list[nn.Module]) -> None:
        train = self.settings.train
        module = _Module(
            self.parts, layers, num_stages=self.settings.stages, loss_fn=self._scaled_loss
        )
        keys = deepspeed_settings.load(train.deepspeed, train.precision)
        config, mpu = (
            deepspeed_settings.with_batches(keys, self.rows, self.micro_batches),
            module.mpu(),
        )
        self.engine = _Engine(
            args=None,
            model=module,
            optimizer=adam({"tail": module.parameters()}, train),
            mpu=mpu,
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
        )
        self.optimizer = self.engine.optimizer
        self.labels = torch.zeros(1, device=self.device)  # the labels are at the UEs

    def iterate(self) -> None:
        self.engine.train_batch(self._batches())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.micro_batches):
            yield (self.next_smashed() if self.first else self.labels), self.labels

    def _scaled_loss(self, output: Tensor, _: Tensor) -> Tensor:
        """The engine divides by the number of micro-batches; UEs' losses are means already."""
        return self.loss(output) * self.micro_batches
