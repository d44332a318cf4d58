"""The autoregressive baseline: the same model trained causally on next tokens, without noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.batch import CleanBatch, LossWeights, ModelInputs, padded_rows
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DiffusionConfig, EvaluationConfig, RunConfig
from megatron_mdm.config.sections.objective import ObjectiveOptions
from megatron_mdm.data.caption_dropout import CaptionDropout
from megatron_mdm.data.collate import collate
from megatron_mdm.data.sample import Sample
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch, Normalization
from megatron_mdm.engine.base import Forward
from megatron_mdm.engine.inputs import loss_inputs
from megatron_mdm.evaluation.likelihood import LikelihoodConfig, Row, Rows, Scoring
from megatron_mdm.evaluation.losses import Inputs, Places, Scored, measure, parts_of_like_length
from megatron_mdm.generation.autoregressive import decode_greedily
from megatron_mdm.generation.generate import Decoder
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.objectives.base import Description
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:  # megatron-core, which reports do without
    from megatron_mdm.data.splits import Dataset

_APPLIES = ("normalization", "calibration")  # of the section `diffusion`; the latter is not asked for


class Autoregressive:
    """An Objective (base.py)."""

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    attention = "causal"
    scored_share = 1.0

    def __init__(self, config: RunConfig, options: ObjectiveOptions) -> None:
        self.config = config
        self.options = options

    def check(self) -> None:
        """There is no noise, so none of the settings of noise may be set."""
        for name, field in DiffusionConfig.model_fields.items():
            value = getattr(self.config.diffusion, name)
            if name not in _APPLIES and value != field.default:
                raise UserError(
                    f"'diffusion.{name}' {value} has no meaning for 'objective.name' {self.options.name}, which draws "
                    f"no masks; use {field.default} (configs/methods/autoregressive.yaml)"
                )

    def warnings(self) -> list[str]:
        return []

    def check_data(self, train: Dataset) -> None:
        """A first token follows none and so is no target; a sample must have another."""
        if self.config.data.format == "corpus":  # its sequences are targets as a whole
            return
        for row, sample in enumerate(train.samples):
            if not sample.eligible[1:].any():
                raise UserError(
                    f"{self.config.data.train}: sample {row + 1} has no target token that follows another; "
                    f"'objective.name' {self.options.name} needs one"
                )

    def noise(self, cell_density: Floats, mask_id: int) -> NextTokens:
        return NextTokens(self.config.batch.global_size)

    @property
    def normalization(self) -> Normalization:
        return NORMALIZATIONS[self.config.diffusion.normalization]

    @property
    def design(self) -> MaskDesign:
        raise UserError(f"'objective.name' {self.options.name} draws no masks: there is no p(t) to calibrate")

    @property
    def caption_dropout(self) -> CaptionDropout | None:
        return None

    def inputs(self, noised: NoisedBatch, weights: LossWeights) -> ModelInputs:
        return loss_inputs(noised, weights)

    def validation(self, data: Dataset, special: SpecialIds, context: ParallelContext) -> NextTokenValidation:
        config = self.config
        return NextTokenValidation(data, config.evaluation, special, config.batch.micro_size, context, self.inputs)

    @property
    def decoder(self) -> Decoder:
        return decode_greedily

    @property
    def scoring(self) -> Scoring:
        return NEXT_TOKENS

    @property
    def description(self) -> Description:
        return Description(self.options.name, self.options.name, has_rates=False)


class NextTokens:
    """A Noise (base.py) that draws nothing: t has no meaning and is 1, as are all weights; so the variance that
    training logs is the data's (C of the decomposition)."""

    views = 1

    def __init__(self, global_size: int) -> None:
        self.global_size = global_size

    def times(self, step: int) -> tuple[Floats, Floats]:
        """t and importance weight, all ones [n]."""
        return np.ones(self.global_size), np.ones(self.global_size)

    def mask_probability(self, t: Floats) -> Floats:
        """Every target is scored."""
        return np.ones_like(t)

    def __call__(self, batch: CleanBatch, step: int) -> NoisedBatch:
        return next_tokens(batch)


def next_tokens(batch: CleanBatch) -> NoisedBatch:
    """Every position whose next token is eligible is scored against that token: l = (1/P) Σ_i CE_{i→i+1}.

    In the result, clean holds what stands behind each position: P counts the target tokens. The first token of a
    sample, and of each of its segments, follows none and is left out.
    """
    eligible = _shifted(batch.eligible)
    if batch.segments is not None:  # the last token of a segment does not predict the next one's first
        eligible = eligible.scatter(1, batch.segments.cumsum(1) - 1, False)
    targets = replace(
        batch,
        tokens=_shifted(batch.tokens),
        eligible=eligible,
        delimiters=_shifted(batch.delimiters),
    )
    ones = torch.ones(len(batch.tokens), dtype=torch.float64)
    return NoisedBatch(
        clean=targets,
        noisy=batch.tokens,
        masked=targets.eligible,
        token_weight=targets.eligible.float(),
        sample_weight=ones,
        t=ones,
        views=1,
        pattern=batch.pattern(causal=True),
    )


def _shifted(tensor: Tensor) -> Tensor:
    """[B, S] with each position holding its successor's entry; the last one, zero."""
    return torch.nn.functional.pad(tensor[:, 1:], (0, 1))


class NextTokenValidation:
    """−log p(x0)/P per sample, averaged over the samples, each once."""

    def __init__(
        self,
        data: Dataset,
        config: EvaluationConfig,
        special: SpecialIds,
        micro_size: int,
        context: ParallelContext,
        inputs: Inputs,
    ) -> None:
        """micro_size: rows of a forward pass. inputs: what the model takes of a micro-batch and its weights."""
        self.data = data
        self.special = special
        self.context = context
        self.inputs = inputs
        self.num_samples = min(config.num_samples, len(data))
        self.parts = parts_of_like_length(data.lengths()[: self.num_samples], micro_size)

    def __call__(self, engine: Forward) -> float:
        """Mean over the samples, nats per target token. Collective; the same on every rank."""
        losses = np.zeros(self.num_samples)
        for part, _, rows in measure(engine, self.parts, self._scored, self.context, self.inputs):
            losses[part] = rows.loss.double().cpu().numpy()
        return float(fill_from_data_ranks(losses, self.context).mean())

    def _scored(self, part: Places) -> Scored:
        batch = next_tokens(collate([self.data.samples[row] for row in part], part, part, self.special.pad))
        return batch, NORMALIZATIONS["sample"](batch, GlobalBatch(1, 1))


def _rows(samples: Sequence[Sample], config: LikelihoodConfig, _: SpecialIds) -> Rows:
    if config.cfg_scale:
        raise UserError(
            f"cfg_scale {config.cfg_scale} masks the prompt, which an autoregressive model cannot read; leave it out"
        )

    def make(index: int) -> Row:
        sample = samples[index]
        scored = np.append(_targets(sample)[1:], False)
        return Row(sample.tokens, np.append(sample.tokens[1:], 0), scored, ~sample.eligible)

    return Rows(np.array([len(sample.tokens) for sample in samples]), 1, make, partial(padded_rows, causal=True))


def _targets(sample: Sample) -> NDArray[np.bool_]:
    """The eligible positions, without a first token, which follows none, [S]."""
    return np.append(False, sample.eligible[1:])


NEXT_TOKENS = Scoring(_rows, _targets, is_bound=False)
