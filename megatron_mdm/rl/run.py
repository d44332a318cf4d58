"""The parts of a run of reinforcement learning, for training.run.train_run."""

from __future__ import annotations

from typing import cast

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.prompt_set import PromptDataset
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS, T_SAMPLERS, SamplerInputs
from megatron_mdm.rl.batches import Batches
from megatron_mdm.rl.completions import Completions
from megatron_mdm.rl.evaluate import GreedyAnswers
from megatron_mdm.rl.metrics import SAMPLES, LogRollouts
from megatron_mdm.rl.noise import RlNoise
from megatron_mdm.rl.reference import reference_of
from megatron_mdm.rl.rewards import Rewards, check_records
from megatron_mdm.rl.rollouts import ROLLOUTS
from megatron_mdm.rl.settings import Counts, checked
from megatron_mdm.rl.source import RolloutSource
from megatron_mdm.training.build import SUPERVISED
from megatron_mdm.training.callbacks.base import Callback
from megatron_mdm.training.callbacks.validate import Validate
from megatron_mdm.training.inputs import RunData
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import truncate_records
from megatron_mdm.training.parts import Run, RunParts


class Reinforced:
    """RunParts of runs with a section `rl`."""

    def checked(self, config: RunConfig, world_size: int) -> RunConfig:
        Rewards.of(config.rl)
        return checked(config)

    def check_data(self, config: RunConfig, data: RunData) -> None:
        train = cast(PromptDataset, data.train)
        held_out = cast(PromptDataset, data.validation).columns if data.validation is not None else ()
        check_records(config.rl, [*train.columns, *held_out])
        needs = config.diffusion.t_sampler in CALIBRATED_SAMPLERS and not config.diffusion.calibration.artifact
        if needs and not train.num_eligible().any():
            raise UserError(
                f"{config.data.train}: p(t) is calibrated on given responses, and no record has one; name an earlier "
                "calibration by 'diffusion.calibration.artifact'"
            )

    def source(self, run: Run) -> RolloutSource:
        config, data, context = run.config, run.data, run.context
        density = np.array(run.artifact["cell_density"]) if run.artifact else np.empty(0)
        sampler = T_SAMPLERS[config.diffusion.t_sampler](SamplerInputs(density))
        noise = RlNoise(config.rl, config.diffusion, sampler, config.seed, config.batch.global_size)
        completions = Completions(
            config,
            cast(PromptDataset, data.train),
            data.tokenizer,
            run.engine,
            noise,
            Rewards.of(config.rl),
            context,
        )
        batches = Batches(config, noise, completions.special, context)
        reference = reference_of(config, run.engine, context)
        return RolloutSource(config, run.engine, completions, noise, batches, reference, context)

    def callbacks(self, run: Run, trainer: Trainer) -> list[Callback]:
        config, data, metrics = run.config, run.data, run.metrics
        source = cast(RolloutSource, trainer.source)
        if run.context.is_main:
            truncate_records(run.folder / ROLLOUTS / SAMPLES, run.first_step)
        found: list[Callback] = [
            LogRollouts(source, cast(PromptDataset, data.train), data.tokenizer, metrics, run.folder)
        ]
        if config.rl.evaluate_every and data.validation is not None:
            answers = GreedyAnswers(
                config,
                cast(PromptDataset, data.validation),
                data.tokenizer,
                source.completions.judge.rewards,
                run.context,
            )
            every = config.rl.evaluate_every * Counts.of(config).steps
            patience = config.evaluation.patience
            found.append(Validate(every, patience, answers, trainer, metrics, lambda: answers.record))
        return found


REINFORCED = Reinforced()


def parts_of(config: RunConfig) -> RunParts:
    """The kind of run that a configuration is of."""
    return REINFORCED if config.rl.is_used else SUPERVISED
