"""The BTS stage: DeepSpeed's pipeline engine, executing csipipe's schedule.

DeepSpeed partitions the tail, holds the stage's parameters, runs its forward and backward pass
(autocast, ZeRO) and the optimiser step. The order of the instructions and the transfers are ours; a
stage doesn't know whether its neighbours are stages or UEs.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger as ds_logger
from torch import Tensor, nn

from csipipe.comm import trust
from csipipe.comm.channel import Ports
from csipipe.device import computable
from csipipe.measure.clock import Clock
from csipipe.models import Pending, add_up, backward, hand_over, put_off
from csipipe.pipeline import subworld
from csipipe.pipeline.schedule import Instruction, Op, Plan, execute, held
from csipipe.pipeline.settings import with_batches


class TailModule(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """The decoder tail, cut into stages; this rank keeps its own layers.

    Args:
        cuts: first layer of every stage, then the number of layers.
    """

    def __init__(self, layers: list[nn.Module], cuts: list[int]) -> None:
        self._cuts = cuts
        # PipelineModule prints its seeds and topology from rank 0
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(layers, num_stages=len(cuts) - 1, partition_method="uniform")
        self._layer_specs: list[nn.Module] = []  # the other stages' layers

    def _partition_layers(self, method: str = "uniform") -> None:
        stage = self.stage_id
        self.parts = self._cuts
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class TailStage(PipelineEngine):  # type: ignore[misc]
    """One stage of the tail on this rank.

    Args:
        module: the tail; its parameters are this stage's.
        optimizer: over the module's parameters.
        deepspeed: DeepSpeed's settings, without batch keys.
        rows: rows of a micro-batch in training, over the UEs that take part.
        micro_batches: micro-batches per iteration.
        ports: where messages come from and go to.
        clock: counts this rank's time while it trains.
        calls: what this rank does at instructions that don't belong to the stage.
        frozen: the tail stays as it is, BatchNorm's running statistics included.

    Attributes:
        before_step: called when the iteration's gradients are complete.
        taking: rows of every micro-batch that the stage computes with, if some are left out; what
            crosses keeps its shape, with zeros for them.
    """

    def __init__(
        self,
        module: TailModule,
        optimizer: torch.optim.Optimizer,
        deepspeed: dict[str, Any],
        rows: int,
        micro_batches: int,
        ports: Ports,
        clock: Clock,
        calls: Mapping[Op, Callable[[], None]],
        frozen: bool,
    ) -> None:
        mpu = module.mpu()
        config = with_batches(deepspeed, rows, micro_batches)
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            model_parameters=list(module.parameters()),
            mpu=mpu,
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
        )
        self.ports = ports
        self.clock = clock
        self.before_step: Callable[[], None] = lambda: None
        self.calls = calls
        self.taking: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self.frozen = frozen
        if frozen:  # only now: DeepSpeed's optimiser wants something to do
            module.requires_grad_(False)
        self._pending = [] if frozen else put_off([module])
        self._weights: dict[int, list[Pending]] = {}
        self._sums: dict[Tensor, Tensor] = {}

    def _broadcast_model(self) -> None:
        """Nothing: a stage is on one rank. DeepSpeed's fails for a parameter without dimensions."""

    def open(self, plan: Plan) -> None:
        """These instructions of a training iteration follow."""
        self.module.train(not self.frozen)
        self._open(list(plan), Op.WEIGHTS)

    def finish(self) -> None:
        """Wait until what was sent has been taken."""
        self.clock.begin("send", "finish sending")
        self.ports.forward_out.finish()
        self.ports.backward_out.finish()

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums.clear()
        self.zero_grad()

    def evaluate_iteration(self, plan: Plan) -> None:
        """Execute forward passes only, BatchNorm by its running statistics."""
        plan = list(plan)
        self.module.eval()
        self._open(plan, Op.FORWARD)
        with torch.no_grad():
            execute(plan, self.whole, self.each, Clock())
        self.ports.forward_out.finish()

    def _open(self, plan: list[Instruction], end: Op) -> None:
        """Post receives for as many micro-batches as are held at a time until `end`, and one more.

        The number of sends in flight is limited likewise, so that memory follows the schedule and
        not the mini-batch.
        """
        most = held(plan, Op.RECEIVE_FORWARD, end)
        if not most:  # nothing crosses
            return
        ahead = most + 1
        self.ports.forward_in.post(ahead)
        self.ports.forward_out.window = self.ports.backward_out.window = ahead
        if end is Op.WEIGHTS and any(i.op is Op.RECEIVE_BACKWARD for i in plan):
            self.ports.backward_in.post(held(plan, Op.RECEIVE_BACKWARD, end) + 1)

    def _receive_forward(self, m: int) -> None:
        self._inputs[m] = self.ports.forward_in.receive(m)

    def _forward_micro_batch(self, m: int) -> None:
        # a leaf, so that its gradient can be sent back
        x = computable(self._some(self._inputs.pop(m))).detach()
        x.requires_grad_(torch.is_grad_enabled())
        # not PipelineEngine's, which works only with its own schedules
        self._outputs[m] = DeepSpeedEngine.forward(self, x)
        if torch.is_grad_enabled():
            self._inputs[m] = x
        else:
            self.ports.forward_in.release(m)

    def _send_forward(self, m: int) -> None:
        keep = torch.is_grad_enabled()
        output = self._outputs[m] if keep else self._outputs.pop(m)
        self.ports.forward_out.send(m, self._all(output))

    def _receive_backward(self, m: int) -> None:
        self._gradients[m] = self.ports.backward_in.receive(m)

    def _backward_micro_batch(self, m: int) -> None:
        output, gradient = self._outputs.pop(m), self._some(self._gradients.pop(m))
        with self._allowed():
            backward([output], [gradient.to(output.dtype)])
        self._weights[m] = self._pending.copy()
        self._pending.clear()

    def _send_backward(self, m: int) -> None:
        gradient = self._inputs.pop(m).grad
        assert gradient is not None
        self.ports.backward_out.send(m, self._all(gradient))

    def _weight_gradients(self, m: int) -> None:
        if m in self._weights:
            add_up(self._weights.pop(m), self._sums)
            self.ports.backward_in.release(m)
        # only now: the first and the last layer kept what was received
        self.ports.forward_in.release(m)
        # of a micro-batch that isn't gone back through, or whose gradient nobody needs
        self._inputs.pop(m, None)
        self._outputs.pop(m, None)

    def _step(self) -> None:
        if self.frozen:
            return
        with self._allowed():
            hand_over(self._sums)
        trust.check_gradients("the tail's", self.module.named_parameters())
        self.before_step()
        # a stage is one rank: only ZeRO does more here than to send itself its own gradients
        if self.zero_optimization():
            self._exec_reduce_grads()
        self._exec_optimizer_step()

    def _some(self, rows: Tensor) -> Tensor:
        """The rows that aren't left out."""
        return rows if self.taking is None else rows[self.taking]

    def _all(self, rows: Tensor) -> Tensor:
        """The whole micro-batch, with zeros for rows that are left out."""
        if self.taking is None:
            return rows
        whole = rows.new_zeros(self.ports.forward_in.shape[0], *rows.shape[1:])
        whole[self.taking] = rows.detach()
        return whole

    def _report_progress(self, step: int) -> None:
        """Nothing: DeepSpeed would read the rate, which may lie on a GPU."""

    @contextlib.contextmanager
    def _allowed(self) -> Iterator[None]:
        """DeepSpeed refuses backward passes that it did not start itself."""
        self._running_engine_backward = True
        try:
            yield
        finally:
            self._running_engine_backward = False

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        """Leave gradients as they come: DeepSpeed would divide the last stage's by M.

        The UEs' losses are means over their whole mini-batch already.
        """
        return grad

    @property
    def whole(self) -> dict[Op, Callable[[], None]]:
        """What the stage does at instructions on the whole mini-batch."""
        return {Op.STEP: self._step, **self.calls}

    @property
    def each(self) -> dict[Op, Callable[[int], None]]:
        """What it does at instructions on one micro-batch."""
        return {
            Op.RECEIVE_FORWARD: self._receive_forward,
            Op.FORWARD: self._forward_micro_batch,
            Op.SEND_FORWARD: self._send_forward,
            Op.RECEIVE_BACKWARD: self._receive_backward,
            Op.BACKWARD: self._backward_micro_batch,
            Op.SEND_BACKWARD: self._send_backward,
            Op.WEIGHTS: self._weight_gradients,
        }


def open_subworld(group: dist.ProcessGroup, timeout: float) -> None:
    """Prepare DeepSpeed on this BTS rank: confined to `group`, logging only warnings."""
    ds_logger.setLevel(logging.WARNING)
    subworld.install(group, timeout)
