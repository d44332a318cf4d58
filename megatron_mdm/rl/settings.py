"""What a run of reinforcement learning is set to: counts of completions and steps, decoding, what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.evaluation.tasks import TASKS
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.objectives import objective_of


class Place(NamedTuple):
    """Where an optimizer step stands."""

    rollout: int
    iteration: int  # of the updates with every completion, from 0
    minibatch: int


class Counts(NamedTuple):
    """How completions make rollouts and steps."""

    per_rollout: int  # B · G completions
    per_step: int  # N of them in an optimizer step, whole groups
    iterations: int  # μ

    @classmethod
    def of(cls, config: RunConfig) -> Counts:
        return cls(config.rl.num_completions, config.batch.global_size, config.rl.num_iterations)

    @property
    def minibatches(self) -> int:
        """Of a rollout."""
        return self.per_rollout // self.per_step

    @property
    def steps(self) -> int:
        """Of a rollout."""
        return self.iterations * self.minibatches

    def place(self, step: int) -> Place:
        rollout, rest = divmod(step, self.steps)
        return Place(rollout, *divmod(rest, self.minibatches))


def decoding(config: RunConfig, **changes: Any) -> GenerationConfig:
    """How completions are drawn. Raises UserError."""
    return GenerationConfig.of_rollouts(config, **changes)


def greedy(config: RunConfig) -> GenerationConfig:
    """How validations decode."""
    return decoding(config, temperature=0.0)


def checked(config: RunConfig) -> RunConfig:
    """The configuration with what reinforcement learning decides by itself. Raises UserError, with the remedy, for what
    does not go with it."""
    generation = decoding(config)
    for wrong, message in _rules(config, generation):
        if wrong:
            raise UserError(message)
    if "spike_score" in config.faults.model_fields_set:
        return config
    # The objective is near 0 and changes its sign: what is far off the others says nothing.
    return config.model_copy(update={"faults": config.faults.model_copy(update={"spike_score": 0.0})})


def _rules(config: RunConfig, generation: GenerationConfig) -> list[tuple[bool, str]]:
    """(whether it is so, what is wrong then)."""
    rl, model, diffusion, data = config.rl, config.model, config.diffusion, config.data
    rows = diffusion.rows_per_sample + rl.full_pass
    longest = rows * data.max_length
    return [
        (
            objective_of(config).decoder is not denoise,
            f"'rl' draws completions by denoising, which 'objective.name' {config.objective.name} does not: use masked",
        ),
        (data.format != "prompts", f"'rl' answers prompts: set 'data.format' to prompts, not {data.format}"),
        ("seed" in rl.generation, "'rl.generation.seed' is the run's 'seed'; remove it"),
        (
            generation.temperature == 0.0,
            "'rl.generation.temperature' 0 gives a prompt's completions all alike: set it above 0",
        ),
        (
            generation.cache != "none",
            f"'rl.generation.cache' {generation.cache} cannot be used while training: the engine that trains keeps no "
            "keys and values; set none",
        ),
        (rl.task not in TASKS, f"'rl.task' must be one of {', '.join(TASKS)}, got '{rl.task}'"),
        (model.z_loss != 0.0, "'model.z_loss' would be weighted by advantages of either sign: set it to 0"),
        (
            model.lora.rank > 0 and model.lora.dropout > 0.0,
            "'model.lora.dropout' would make an update's passes differ: set it to 0 for 'rl'",
        ),
        (
            bool(model.fp8),
            "'model.fp8' has other scales in every pass, so that ratios would not begin at 1: set it to false",
        ),
        (diffusion.ema.enabled, "'diffusion.ema' adjusts supervised losses: remove it for 'rl'"),
        (
            diffusion.calibration.refit_every > 0,
            "'diffusion.calibration.refit_every': p(t) is fitted again from losses of given answers only; set 0 for "
            "'rl'",
        ),
        (
            rl.beta > 0 and not model.init_from,
            "'rl.beta' holds the policy to its initial weights: name them by 'model.init_from', or set 0",
        ),
        (
            rl.sync_ref_model,
            "'rl.sync_ref_model': the reference stays as 'model.init_from' is; set false, or begin another run from "
            "this one's checkpoint",
        ),
        (config.faults.on_spike == "rewind", "'faults.on_spike' rewind leaves out samples of a file; set log for 'rl'"),
        (config.evaluation.every > 0, "'evaluation.every' measures given answers: 'rl.evaluate_every' is rl's; set 0"),
        (
            0 < config.batch.micro_tokens < longest,
            f"'batch.micro_tokens' {config.batch.micro_tokens} cannot hold one completion: {rows} rows × "
            f"{data.max_length} 'data.max_length' = {longest} tokens; raise it",
        ),
    ]
