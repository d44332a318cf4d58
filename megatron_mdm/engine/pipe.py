"""DeepSpeed's pipeline engine: stages over pipeline ranks, ZeRO 0–1 over data-parallel ranks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.schedule import OptimizerStep
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_mdm.batch import IdRange, ModelInputs, RowStatistics
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.engine.base import Load, TrainOutput
from megatron_mdm.engine.deepspeed_config import deepspeed_config
from megatron_mdm.engine.deepspeed_engine import DeepSpeedEngine
from megatron_mdm.engine.optimizer import scaled_unless_faulty
from megatron_mdm.engine.statistics import StatisticsCopy, TokenLossesCopy
from megatron_mdm.models.attention import Visibility
from megatron_mdm.models.costs import layer_costs
from megatron_mdm.models.four_bit import quantize_frozen
from megatron_mdm.models.fp8 import Fp8
from megatron_mdm.models.layers import Head, layer_builders, prepare_parameters
from megatron_mdm.parallel.groups import ParallelContext, group_of
from megatron_mdm.parallel.heartbeat import beat
from megatron_mdm.parallel.layout import partition

_PHASES = {  # by DeepSpeed's instructions; the others are messages to and from other stages
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "ReduceGrads": "backward",
    "ReduceTiedGrads": "backward",
    "OptimizerStep": "optimizer",
}


class PipeEngine(DeepSpeedEngine):
    """engine.base.Engine over a pipeline. Every pipeline rank is given the same inputs and gets the same answers."""

    def __init__(self, config: RunConfig, context: ParallelContext, load: Load | None = None) -> None:
        """load: fills this rank's layers, before the optimizer takes its master weights from them."""
        self.layout = context.layout
        self.model = config.model
        self.positions_split = config.parallel.tensor if config.parallel.sequence else 1
        seed = None if load else config.seed
        module = _Stage(config, context, self._score, seed)
        if load:
            load(module)
        quantize_frozen(module, config.model)
        super().__init__(module, config, context, deepspeed_config(config, context.layout.world_size))
        module.fp8 = self.fp8
        assert self.engine.grid.get_data_parallel_rank() == context.data_rank
        assert self.engine.grid.get_pipe_parallel_rank() == context.pipeline_rank
        # DeepSpeed runs a schedule of instructions, each by its entry in this table.
        self.engine._INSTRUCTION_MAP = {
            instruction: self.clock.timed(_PHASES.get(instruction.__name__, "pipeline"), run)
            for instruction, run in self.engine._INSTRUCTION_MAP.items()
        }
        step = self.engine._INSTRUCTION_MAP[OptimizerStep]
        self.engine._INSTRUCTION_MAP[OptimizerStep] = partial(self._step, step)
        # What a stage receives it knows beforehand, and the loss that DeepSpeed shares out only its own reports read:
        # both cost messages, and a wait for the device.
        self.engine._send_tensor_meta = lambda *_: None
        self.engine._recv_tensor_meta = lambda _: self._received()
        if not self.engine.monitor.enabled and "steps_per_print" not in config.deepspeed:
            self.engine._aggregate_total_loss = lambda: None
        self._micro_batches: list[ModelInputs] = []  # of the step
        self._to_receive: Iterator[ModelInputs] = iter(())  # those of them whose hidden states are still to come
        self._want_logits = False
        self._ids: IdRange | None = None  # of the logits; None: all
        self._answers: list[Tensor] = []  # on the last stage: row statistics or logits of each micro-batch
        self._copy: StatisticsCopy  # of the last step

    def train_batch(self, micro_batches: Sequence[ModelInputs], lr: float) -> TrainOutput:
        self.begin_step(lr)
        micro_batches = self._prepare(micro_batches)
        if len(micro_batches) != self.engine.micro_batches:  # a token budget makes more or fewer of them
            per_micro_batch = self.engine.train_micro_batch_size_per_gpu() * self.layout.data
            self.engine.set_train_batch_size(len(micro_batches) * per_micro_batch)
        self.engine.train_batch(self._batches(micro_batches))
        norm = self.norm()
        return TrainOutput(self._copy.wait(), norm)

    def evaluate(self, micro_batches: Sequence[ModelInputs], row_gradients: bool = False) -> list[RowStatistics]:
        micro_batches = self._prepare(micro_batches)
        head = self.engine.module.head if self.engine.is_last_stage() else None
        with head.with_row_gradients(row_gradients) if head else contextlib.nullcontext():
            self._forward(micro_batches)
        return self._statistics(micro_batches).wait()

    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        prepared = self._prepare([inputs._replace(dropout_keys=None) for inputs in micro_batches])
        head = self.engine.module.head if self.engine.is_last_stage() else None
        with self.engine.module.always_training(), head.with_token_losses() if head else contextlib.nullcontext():
            self._forward(prepared)
        shapes = [inputs.selected.shape for inputs in prepared]
        size = torch.Size([sum(shape.numel() for shape in shapes)])
        losses = self._from_last_stage(size, torch.float32, dim=0)
        return TokenLossesCopy(losses, shapes).wait(micro_batches)

    def logits(self, inputs: ModelInputs, *, ids: IdRange | None = None) -> Tensor:
        (inputs,) = self._prepare([inputs])
        self._want_logits = True
        self._ids = ids
        try:
            self._forward([inputs])
        finally:
            self._want_logits = False
        width = ids[1] if ids else int(self.model.vocab_size)
        shape = torch.Size((len(inputs.selected_places()), width))
        return self._from_last_stage(shape, self._dtype, dim=0)

    def _forward(self, micro_batches: Sequence[ModelInputs]) -> None:
        self.engine.eval_batch(
            self._batches(micro_batches), num_micro_batches=len(micro_batches), reduce_output=None, bcast_loss=False
        )

    def _prepare(self, micro_batches: Sequence[ModelInputs]) -> list[ModelInputs]:
        return [self.input_layout.on_device(inputs) for inputs in micro_batches]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.engine.module.parameters()).dtype

    def _batches(self, micro_batches: Sequence[ModelInputs]) -> Iterator[tuple[Tensor, tuple[()]]]:
        """What DeepSpeed loads on the first and the last stage. The rest each stage has: see _Stage.forward."""
        self._micro_batches = list(micro_batches)
        self._to_receive = iter(micro_batches)
        self.engine.module.take(micro_batches)
        return iter([(inputs.tokens, ()) for inputs in micro_batches])

    def _score(self, hidden: Tensor, _: tuple[()]) -> Tensor:
        """The last stage's loss function: keeps the micro-batch's answer, returns the total to differentiate."""
        module = self.engine.module
        result = module.head(hidden, module.inputs, self._want_logits, self._ids)
        if self._want_logits:
            self._answers.append(result)
            return result.new_zeros((), dtype=torch.float32)
        total, losses = result
        self._answers.append(losses.reshape(-1) if module.head.token_losses else torch.stack(list(losses)))
        # The engine divides by the accumulation steps and averages over data-parallel ranks; the total wants neither.
        return scaled_unless_faulty(total, self.engine.gradient_accumulation_steps() * self.layout.data)

    def _received(self) -> Tensor:
        """Memory for the next micro-batch's hidden states from the stage before: [S, R, H] as Embed gives them."""
        rows, length = next(self._to_receive).tokens.shape
        shape = [length // self.positions_split, rows, self.model.hidden_size]
        return self.engine._allocate_or_extend_buffers(0, shape, self._dtype)

    def _step(self, step: Callable[..., None], engine: Any, **named: Any) -> None:
        """The optimizer's step, behind the start of the copy of the statistics: its wait for the norm is one for them,
        too. Every stage takes it after its last backward pass."""
        with self.clock.measure("pipeline"):
            self._copy = self._statistics(self._micro_batches)
        step(engine, **named)

    def _statistics(self, micro_batches: Sequence[ModelInputs]) -> StatisticsCopy:
        rows = [len(inputs.selected) for inputs in micro_batches]
        shape = torch.Size((len(RowStatistics._fields), sum(rows)))
        return StatisticsCopy(self._from_last_stage(shape, torch.float32, dim=1), rows)

    def _from_last_stage(self, shape: torch.Size, dtype: torch.dtype, dim: int) -> Tensor:
        """The last stage's answers, put together along dim, on every stage."""
        if self.engine.is_last_stage():
            answer = torch.cat(self._answers, dim).contiguous()
        else:
            answer = torch.empty(shape, dtype=dtype, device=self.engine.device)
        self._answers = []
        dist.broadcast(answer, src=self.context.last_stage_rank, group=self.context.pipeline_group)
        return answer


class _Stage(PipelineModule):
    """This pipeline rank's layers, named by layer index as in the whole model.

    Every pipeline rank has the micro-batches of the step, so that only hidden states travel between stages.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, loss_fn: Callable[..., Tensor], seed: int | None
    ) -> None:
        self._always_training = False
        self._costs = layer_costs(config.model, config.data.max_length)
        builders = layer_builders(config.model, config.parallel, context.tensor_group)
        layout = context.layout
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its layers
            super().__init__(
                [LayerSpec(build.func, *build.args) for build in builders],
                topology=PipeModelDataParallelTopology(
                    num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
                ),
                loss_fn=loss_fn,
                dynamic_shape=True,
            )
        prepare_parameters(self, config.model, config.parallel, context, seed)
        self._tie(config.model, context)
        self.fp8: Fp8  # the engine's, which is built around the stage
        self.inputs: ModelInputs  # the micro-batch of the last forward pass
        self._micro_batches: Iterator[ModelInputs] = iter(())

    @property
    def head(self) -> nn.Module:
        return self._modules[str(self._num_layers - 1)]

    @contextlib.contextmanager
    def always_training(self) -> Iterator[None]:
        """Inside, DeepSpeed's evaluation runs the kernels of training: blocks are compiled for that only."""
        self._always_training = True
        try:
            yield
        finally:
            self._always_training = False

    def train(self, mode: bool = True) -> _Stage:
        return super().train(mode or self._always_training)

    def take(self, micro_batches: Sequence[ModelInputs]) -> None:
        """The micro-batches of the forward passes to come, which DeepSpeed's schedules run in this order."""
        self._micro_batches = iter(micro_batches)

    def forward(self, hidden: Tensor) -> Tensor:
        """One micro-batch through this stage's layers but the head, which the loss function calls. hidden: tokens
        [R, S] on the first stage, else what the stage before it gave."""
        beat()
        self.inputs = next(self._micro_batches)
        visible = Visibility(self.inputs)
        with self.fp8.micro_batch():
            for layer in self.forward_funcs:
                if not isinstance(layer, Head):
                    hidden = layer(hidden, visible)
        return hidden

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """What DeepSpeed sums the gradients of, over the first and the last stage."""
        return self._tied

    def _partition_layers(self, method: str = "") -> None:
        self.parts = partition(self._costs, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _tie(self, model: ModelConfig, context: ParallelContext) -> None:
        self._tied: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        if not model.tie_embeddings:
            return
        for first in range(context.layout.stride("pipeline")):  # every rank takes part in making every group
            stages = context.layout.peers(first, "pipeline")
            ranks = [stages[0], stages[-1]]
            group = group_of(ranks)
            if context.rank == ranks[0]:
                self._tied.append((self._modules["0"].word_embeddings.weight, group))
            if context.rank == ranks[1]:
                weight = cast(Any, self.head.vocabulary_weight)
                weight.ds_pipe_replicated = True  # the first stage's copy counts in norms
                self._tied.append((weight, group))
        self._tied = [(weight, group) for weight, group in self._tied if weight.requires_grad]
