"""What a study takes: runs, hours and disk, told before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

from megatron_mdm.config.load import load_section
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.data.records import read_records
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
from megatron_mdm.evaluation.measures import MEASURES
from megatron_mdm.models.costs import layer_costs
from megatron_mdm.models.parameters import checkpoint_bytes
from megatron_mdm.parallel import platform
from megatron_mdm.study.gradients import GradientRecipe, gradient_recipes
from megatron_mdm.study.pool import Machine
from megatron_mdm.study.results import result
from megatron_mdm.study.runs import Recipe, Study
from megatron_mdm.study.settings import TaskSettings
from megatron_mdm.training.inputs import resolve, total_steps

ASSUMED_SHARE = 0.4  # of a matrix product's rate that small models' passes reach, where no run has told
START_SECONDS = 3.0  # of a run: its process, data, engine, checkpoints
_PASSES = 3.0  # a forward and a backward pass, in forward passes
_SINGLE = 8.0  # a sample alone takes so much longer than one of a batch
_RESULT_BYTES = 200_000  # of a run that is done


def estimate_lines(study: Study, machine: Machine) -> list[str]:
    """Lines for --dry-run. Reads data and tokenizers, and times a matrix product where no run is done yet."""
    runs: list[Recipe] = [*gradient_recipes(study), *study.recipes()]
    done = {recipe.name: found for recipe in runs if (found := result(recipe)) is not None}
    work = _Work(study)
    rate, told = _rate(done, [recipe for recipe in runs if recipe.name in done], work, machine)
    left = [recipe for recipe in runs if recipe.name not in done]
    seconds = {recipe.name: START_SECONDS + work.of(recipe) / rate for recipe in left}
    hours = sum(seconds.values()) / machine.workers / 3600
    lines = [_part_line(study, name, seconds) for name in [part.name for part in study.settings.parts]]
    largest = max((checkpoint_bytes(work.task(recipe).model) for recipe in runs), default=0)
    kept = len(runs) if study.settings.keep_checkpoints else 0
    disk = (kept + 3 * machine.workers) * largest + len(runs) * _RESULT_BYTES
    return [
        f"{len(runs)} runs, {len(done)} of them done; {machine.workers} at a time",
        *lines,
        f"about {hours:.1f} hours for what is left ({told}); the longest run {max(seconds.values(), default=0):.0f} s",
        f"disk: {disk / 1e9:.2f} GB at most",
    ]


def _part_line(study: Study, name: str, seconds: dict[str, float]) -> str:
    """Of a part: all its runs, and what those of them take that are not done."""
    mine = [run.point.name for run in study.runs() if name in run.parts]
    hours = sum(seconds.get(run, 0.0) for run in mine) / 3600
    return f"  {name}: {len(mine)} runs, {hours:.2f} hours of one worker left"


def _rate(
    done: dict[str, dict[str, object]], recipes: Sequence[Recipe], work: _Work, machine: Machine
) -> tuple[float, str]:
    """FLOPs a second of one run, and where the figure comes from."""
    timed = [recipe for recipe in recipes if not isinstance(recipe, GradientRecipe)]
    if timed:
        rates = [work.of(recipe) / sum(done[recipe.name]["seconds"].values()) for recipe in timed]  # type: ignore[attr-defined]
        return median(rates), f"at the median rate of {len(timed)} runs that are done"
    peak = platform.peak_flops(torch.float32) * machine.threads
    told = (
        f"an estimate: {ASSUMED_SHARE:.0%} of a matrix product's {peak / 1e9:.0f} GFLOP/s, {START_SECONDS:g} s a start"
    )
    return ASSUMED_SHARE * peak, told


class _Task(NamedTuple):
    """What runs of a task have alike."""

    model: ModelConfig
    num_samples: int
    row_flops: float  # of a sample's forward pass
    num_questions: int


class _Work:
    """Forward FLOPs, or what amounts to them, of whole runs."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.tasks: dict[str, _Task] = {}

    def task(self, recipe: Recipe) -> _Task:
        """Of the recipe's task. Reads its data the first time."""
        name = recipe.point.task
        if name not in self.tasks:
            config, data = resolve(recipe.load())
            length = float(data.train.lengths().mean())
            questions = sum(1 for _ in read_records(recipe.task.test))
            limit = recipe.task.limit or questions
            flops = length * sum(layer_costs(config.model, length))
            self.tasks[name] = _Task(config.model, len(data.train), flops, min(limit, questions))
        return self.tasks[name]

    def of(self, recipe: Recipe) -> float:
        task = self.task(recipe)
        if isinstance(recipe, GradientRecipe):
            rows = sum(method.load().diffusion.rows_per_sample for method in recipe.methods)
            return _SINGLE * _PASSES * recipe.draws * rows * task.row_flops
        if recipe.point.pace:
            return self.of(self.study.recipe(recipe.point._replace(method=recipe.point.pace, pace="")))
        config = recipe.load()
        steps = total_steps(config, task.num_samples)
        forwards = _PASSES * steps * config.batch.global_size * config.diffusion.rows_per_sample
        if config.diffusion.t_sampler in CALIBRATED_SAMPLERS:
            settings = config.diffusion.calibration
            forwards += settings.num_samples * settings.num_times * settings.num_masks
        if config.evaluation.every:
            checks = -(-steps // config.evaluation.every)
            forwards += checks * config.evaluation.num_samples * config.evaluation.num_times
        return (forwards + _evaluation_rows(recipe.task, task.num_questions)) * task.row_flops


def _evaluation_rows(task: TaskSettings, num_questions: int) -> float:
    """Rows that scoring takes: every question's steps."""
    settings = load_section(MEASURES[task.measure].settings, task.settings)
    steps = getattr(settings, "steps", getattr(settings, "num_times", 1))
    return float(num_questions * getattr(settings, "images_per_caption", 1) * steps)
