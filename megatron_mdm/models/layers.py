"""The model as a list of layers: Embed, Block …, Head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_mdm.batch import IdRange, ModelInputs, RowStatistics
from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.models.adapter_rows import targets_of
from megatron_mdm.models.adapters import AdaptedEmbedding, HeadAdapter, NoHeadAdapter, attach_adapters
from megatron_mdm.models.attention import AttentionInputs, Visibility
from megatron_mdm.models.cache import Window
from megatron_mdm.models.compiled import compiled
from megatron_mdm.models.cross_entropy import weighted_cross_entropy
from megatron_mdm.models.extensions import extensions_of
from megatron_mdm.models.four_bit import attach_four_bit
from megatron_mdm.models.fp8 import recompute_by
from megatron_mdm.models.initialize import initialize_weights
from megatron_mdm.models.loss_kernels import resolve_loss_kernel
from megatron_mdm.models.naming import Layer, rows_of
from megatron_mdm.models.norms import RMSNorm
from megatron_mdm.models.parameters import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix, padded_vocab_size
from megatron_mdm.models.rotary import Rotation, angles_at
from megatron_mdm.models.sharding import mark_shards
from megatron_mdm.models.spec import (
    FUSED_NORMS,
    LAYER_SPECS,
    resolve_kernels,
    transformer_config,
    use_kernels_for_any_length,
)
from megatron_mdm.parallel.groups import ParallelContext


class Embed(Layer):
    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size(model, config.tensor_model_parallel_size),
            model.hidden_size,
            init_method=config.init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        if "embedding" in targets_of(model):
            self.word_embeddings = AdaptedEmbedding(self.word_embeddings, model, config)
        self.sequence_parallel = config.sequence_parallel
        _attach_extensions(self, 0, model, config)

    def table_name(self, own: str) -> str:
        return f"embedding.{own}"

    def forward(self, tokens: Tensor, _: Visibility) -> Tensor:
        """tokens [R, S] → hidden [S, R, H]; packed, [1, T] → [T, 1, H]. Under sequence parallelism a rank holds
        1 / tensor-parallel degree of the positions."""
        hidden = self.word_embeddings(tokens)
        return hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()


class Block(Layer):
    """One transformer layer. With recompute it keeps only its input and runs again in the backward pass."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, index: int, parallel: ParallelConfig) -> None:
        super().__init__()
        spec = LAYER_SPECS[resolve_kernels(model)](model, parallel.recompute == "selective")
        self.layer = TransformerLayer(config, spec, layer_number=index + 1)
        if model.lora.rank and model.lora.base == "nf4":
            attach_four_bit(self.layer)
        self.dropouts = attach_adapters(self.layer, index, model, config) if model.lora.rank else []
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        self.index = index
        self.recompute = parallel.recompute == "full" and index % parallel.recompute_interval == 0
        self.checkpoint = recompute_by(model)
        self.compiled = compiled(self._layer) if model.compile else None
        _attach_extensions(self, index + 1, model, config)

    def table_name(self, own: str) -> str:
        own = own.removeprefix("layer.")  # megatron-core's, which this one holds
        return layer_prefix(self.index) + FUSED_NORMS.get(own, own)

    def forward(self, hidden: Tensor, visible: Visibility) -> Tensor:
        """hidden as Embed gives it → the same."""
        layer = self._layer
        if self.compiled and self.training:  # in training only: decoding's lengths would be compiled for ever
            layer = self.compiled
        if hidden.dtype not in visible.rotations:
            visible.rotations[hidden.dtype] = Rotation.of(self._angles(visible), hidden.dtype)
        rotation = visible.rotations[hidden.dtype]
        if self.recompute and torch.is_grad_enabled():
            return self.checkpoint(layer, hidden, visible, rotation)
        return layer(hidden, visible, rotation)

    def _layer(self, hidden: Tensor, visible: Visibility, rotation: Rotation) -> Tensor:
        for dropout in self.dropouts:  # here, as recomputation comes by here: other micro-batches may have passed
            dropout.keys = visible.dropout_keys
        return self.layer(hidden, attention_mask=AttentionInputs(visible, rotation))[0]

    def _angles(self, visible: Visibility) -> Tensor:
        if visible.positions is None:
            # Not as a module: ranks of ZeRO 3 must call the same modules, also where one's micro-batch is packed.
            return self.rotary.forward(visible.length)  # [S, 1, 1, D]
        return angles_at(visible.positions, self.rotary.inv_freq)  # [S, R or 1, 1, D]


class Head(Layer):
    """Final norm and vocabulary projection, of the selected positions only: [R, S, V] never exists."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        degree = config.tensor_model_parallel_size
        self.vocab_size = model.vocab_size
        self.group = group
        self.z_loss = model.z_loss
        self.loss_kernel = resolve_loss_kernel(model)
        self.row_gradients = False  # compute RowStatistics.gradient_square without autograd, too
        self.token_losses = False  # give the tokens' own losses in place of row statistics
        self.logit_shift = model.logit_shift
        self.sequence_parallel = config.sequence_parallel
        self.final_norm = RMSNorm(config, model.hidden_size, eps=model.norm_eps)
        rows = padded_vocab_size(model, degree) // degree
        self.vocabulary_weight = nn.Parameter(torch.empty(rows, model.hidden_size))
        has_adapter = "head" in targets_of(model)
        self.adapter = HeadAdapter(rows, model) if has_adapter else NoHeadAdapter()
        self.table_names = {
            "final_norm.weight": FINAL_NORM,
            "vocabulary_weight": EMBEDDING if model.tie_embeddings else OUTPUT,
        }
        _attach_extensions(self, model.num_layers + 1, model, config)

    def table_name(self, own: str) -> str:
        return self.table_names.get(own, f"output_layer.{own}")

    def forward(
        self, hidden: Tensor, inputs: ModelInputs, want_logits: bool = False, ids: IdRange | None = None
    ) -> tuple[Tensor, RowStatistics | Tensor] | Tensor:
        """(total loss with its gradient, row statistics), or the selected positions' logits [N, V], position-major
        in each row (the order of inputs.selected.nonzero()). ids: the logits of these tokens only, [N, count]."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return self.logits(hidden, inputs, ids) if want_logits else self.loss(hidden, inputs)

    @contextmanager
    def with_row_gradients(self, wanted: bool) -> Iterator[None]:
        """Inside, RowStatistics.gradient_square is computed without autograd, too, if wanted."""
        self.row_gradients = wanted
        try:
            yield
        finally:
            self.row_gradients = False

    @contextmanager
    def with_token_losses(self) -> Iterator[None]:
        """Inside, loss() gives the cross-entropies of the selected positions in place of row statistics."""
        self.token_losses = True
        try:
            yield
        finally:
            self.token_losses = False

    def logits(self, hidden: Tensor, inputs: ModelInputs, ids: IdRange | None = None) -> Tensor:
        """hidden [S, R, H] or packed [T, 1, H] → [N, V]; of some ids, [N, count]."""
        num_rows, length = inputs.selected.shape
        places = inputs.selected_places()
        row = places % num_rows
        position = places // num_rows
        by_row = (row * length + position).argsort()
        rows = self._normed_rows(hidden, self._places_in_hidden(row[by_row], position[by_row], inputs))
        if ids is not None:
            return self._logits_of(rows, *ids)
        logits = gather_from_tensor_model_parallel_region(rows @ self.adapter(self.vocabulary_weight).t())
        return logits[:, : self.vocab_size]

    def _logits_of(self, rows: Tensor, first: int, count: int) -> Tensor:
        """rows [N, H] → [N, count], by these rows of the table alone: a rank fills in what it holds of them."""
        if not 0 <= first < first + count <= int(self.vocab_size):
            raise ValueError(f"ids {first} to {first + count - 1} are not all of the {self.vocab_size} of the model")
        held = len(self.vocabulary_weight)
        start = torch.distributed.get_rank(self.group) * held
        mine = slice(max(first - start, 0), min(first + count - start, held))
        logits = rows.new_zeros(len(rows), count)
        if mine.start < mine.stop:
            weight = self.adapter(self.vocabulary_weight[mine], mine)
            logits[:, mine.start + start - first : mine.stop + start - first] = rows @ weight.t()
        return cast(Tensor, reduce_from_tensor_model_parallel_region(logits))

    def loss(self, hidden: Tensor, inputs: ModelInputs) -> tuple[Tensor, RowStatistics | Tensor]:
        """hidden [S, R, H] or packed [T, 1, H] → (total loss, row statistics; or, with_token_losses, cross-entropies
        [R, S], 0 where nothing is selected). The rest is [S, R], hidden's order where it is not packed."""
        selected = inputs.selected.t()
        token_weight = inputs.token_weight.t()
        places = inputs.selected_places()
        num_rows = len(inputs.selected)
        weights = (token_weight * inputs.row_weight).reshape(-1)[places]
        total, cross_entropy, gradient_square = weighted_cross_entropy(
            self._normed_rows(hidden, self._places_in_hidden(places % num_rows, places // num_rows, inputs)),
            self.adapter(self.vocabulary_weight),
            inputs.labels.t().reshape(-1)[places],
            weights,
            int(self.vocab_size),
            self.group,
            z_loss=self.z_loss,
            row_gradients=self.row_gradients,
            kernel=self.loss_kernel,
        )
        # Dense grids and plain sums: deterministic on every device, unlike a scattered addition.
        grids = torch.zeros(2, selected.numel(), device=hidden.device)
        grids[0, places] = cross_entropy
        grids[1, places] = gradient_square
        grids = grids.view(2, *selected.shape)
        if self.token_losses:
            return total, grids[0].t()
        weighted = grids[0] * token_weight
        gradient = grids[1].sum(0) / inputs.row_weight.square().clamp_min(1e-30)  # without the rows' weights
        return total, RowStatistics(weighted.sum(0), weighted.square().sum(0), gradient)

    def _places_in_hidden(self, row: Tensor, position: Tensor, inputs: ModelInputs) -> Tensor:
        """[N] int64: where the states that predict positions of rows, [N] each, lie along hidden's memory, [S, R] or
        packed [T]: at the positions themselves, or, with shifted logits, one before, but for a row's first."""
        if self.logit_shift:
            position = (position - 1).clamp_min(0)
        if inputs.row_starts is not None:
            return inputs.row_starts[row] + position
        return position * len(inputs.selected) + row

    def _normed_rows(self, hidden: Tensor, places: Tensor) -> Tensor:
        return self.final_norm(hidden.reshape(-1, hidden.shape[-1]).index_select(0, places))


class MaskedDiffusionModel(nn.Sequential):
    """All layers in one process."""

    def forward(
        self,
        inputs: ModelInputs,
        want_logits: bool = False,
        window: Window | None = None,
        ids: IdRange | None = None,
    ) -> tuple[Tensor, RowStatistics | Tensor] | Tensor:
        visible = Visibility(inputs, window)
        *layers, head = self
        hidden = inputs.tokens
        for layer in layers:
            hidden = layer(hidden, visible)
        return head(hidden, inputs, want_logits, ids)


def layer_builders(
    model: ModelConfig, parallel: ParallelConfig, group: torch.distributed.ProcessGroup
) -> list[partial[Any]]:
    """One constructor per layer, so that a pipeline rank builds only its own."""
    use_kernels_for_any_length()
    config = transformer_config(model, parallel)
    return [
        partial(Embed, model, config),
        *(partial(Block, model, config, index, parallel) for index in range(model.num_layers)),
        partial(Head, model, config, group),
    ]


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    context: ParallelContext,
    seed: int | None,
    finish: Callable[[nn.Module], None] | None = None,
) -> MaskedDiffusionModel:
    """The whole model in this process. seed: of initial weights, which are the same on every layout; None: they are
    left unset, to be read. finish: called with each layer before the next is built, so that it can fill the layer and
    keep a part of it only; a tied head is given without the table, which came with the embedding."""
    layers = MaskedDiffusionModel()
    for build in layer_builders(model, parallel, context.tensor_group):
        layer = build()
        if model.tie_embeddings and isinstance(layer, Head):
            del layer.vocabulary_weight
        prepare_parameters(layer, model, parallel, context, seed)
        if finish:
            finish(layer)
        layers.append(layer)
    if model.tie_embeddings:
        embedding = cast(Embed, layers[0])
        head = cast(Head, layers[-1])
        head.vocabulary_weight = embedding.word_embeddings.weight
    return layers


def prepare_parameters(
    layers: nn.Module, model: ModelConfig, parallel: ParallelConfig, context: ParallelContext, seed: int | None
) -> None:
    """What the table of parameters says, for any part of the layers: initial weights (seed None: they are left unset,
    to be read), sharding attributes, what is frozen, the sum of gradients of which tensor-parallel ranks have parts."""
    rows = list(rows_of(layers, model))
    if seed is not None:
        initialize_weights(rows, model, seed, context.tensor_rank, context.layout.tensor)
    mark_shards(rows)
    in_parts = {"never": False, "sequence": parallel.sequence, "always": context.layout.tensor > 1}
    for row, tensor in rows:
        if not row.is_buffer:
            tensor.requires_grad_(row.trained)
        if row.trained and in_parts[row.gradient_in_parts]:
            tensor.register_hook(partial(_sum_over_group, group=context.tensor_group))


def _attach_extensions(layer: Layer, index: int, model: ModelConfig, config: TransformerConfig) -> None:
    for extension in extensions_of(model):
        extension.attach(layer, index, model, config)


def _sum_over_group(gradient: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The gradient summed over the group: a norm inside a sequence-parallel layer has seen this rank's positions only,
    a norm of heads its heads."""
    gradient = gradient.contiguous()
    torch.distributed.all_reduce(gradient, group=group)
    return gradient
