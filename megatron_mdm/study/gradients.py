"""What the base checkpoint foretells: every method's gradient variance there, p(t) calibrated as in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.load import restored_engine
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import DiffusionConfig, RunConfig
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.prepass import spread_groups
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS, FULL_RANGE
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.inference import InferenceEngine
from megatron_mdm.models.layers import MaskedDiffusionModel, build_model
from megatron_mdm.objectives import check_run, objective_of
from megatron_mdm.parallel.groups import ParallelContext, initialize
from megatron_mdm.reports.variance import FULL, Draws, Method, compare, draw_gradients
from megatron_mdm.study.results import FORMAT
from megatron_mdm.study.runs import RESULT, Point, Recipe, Study
from megatron_mdm.training.calibrate import as_trained, calibrate
from megatron_mdm.training.inputs import RunData, resolve

GRADIENTS = "gradients"


@dataclass(frozen=True)
class GradientRecipe(Recipe):
    """A task's variances. Its own configuration is the standard method's."""

    methods: tuple[Recipe, ...]  # the standard one first
    draws: int
    kind: ClassVar[str] = GRADIENTS

    @property
    def name(self) -> str:
        return f"{GRADIENTS}-{self.point.task}"

    @cached_property
    def digest(self) -> str:
        return "-".join([str(self.draws), *(recipe.training_digest[:16] for recipe in self.methods)])


def gradient_recipes(study: Study) -> list[GradientRecipe]:
    """One of each task whose variances the study asks for."""
    settings = study.settings
    if not settings.variance.draws:
        return []
    standard = settings.claims.standard
    found = []
    for task in settings.variance.tasks or tuple(settings.tasks):
        names = [name for name, method in settings.methods.items() if method.comparable]
        names = [name for name in names if name not in settings.tasks[task].without]
        if standard not in names:
            raise UserError(f"'variance': its ratios are to the method '{standard}' ('claims.standard'), not in {task}")
        ordered = [standard, *(name for name in names if name != standard)]
        recipes = [study.recipe(Point(task, name, settings.seeds[0])) for name in ordered]
        field_names = [field.name for field in fields(Recipe)]
        values = {field: getattr(recipes[0], field) for field in field_names}
        values["folder"] = study.folder / GRADIENTS / task
        found.append(GradientRecipe(**values, methods=tuple(recipes), draws=settings.variance.draws))
    return found


def measure(recipe: Recipe, _: float) -> None:
    """Leave result.json in the recipe's folder: variances of loss and gradient per sample, relative to the standard
    method's, with 90 % intervals. Of one process. Raises UserError."""
    assert isinstance(recipe, GradientRecipe)
    runs = [(method.point.method, *_resolved(method.load())) for method in recipe.methods]
    first = runs[0][1]
    context = initialize(first.parallel)
    engine = restored_engine(None, first, context, 0)
    model = _model(first, context)
    samples, t = spread_groups(len(runs[0][2].train), range(recipe.draws), first.seed + 1)
    draws = dict[str, Draws]()
    methods = list[Method]()
    for name, config, data in runs:
        noiser = _noiser(engine, config, data, context)
        key = _masks(config.diffusion)
        if key not in draws:
            draws[key] = draw_gradients(
                model,
                cast(SftDataset, data.train),
                samples,
                t,
                lambda place, seed=config.seed: stream(seed, Purpose.VARIANCE, 2, place),  # type: ignore[misc]
                noiser.design,
                objective_of(config).normalization,
                data.special_ids.mask,
                name,
            )
        methods.append(Method(name, key, noiser.sampler, noiser.num_strata, _bounds(config.diffusion)))
    rows = [row._asdict() for row in compare(methods, draws)]
    result = {"format": FORMAT, "task": recipe.point.task, "digest": recipe.digest, "draws": recipe.draws, "rows": rows}
    write_json(recipe.folder / RESULT, {**result, "told": f"{len(rows)} methods' gradient variances"})


def measured(recipes: Sequence[GradientRecipe]) -> list[dict[str, Any]]:
    """The results that are there."""
    paths = [recipe.folder / RESULT for recipe in recipes]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if Path(path).exists()]


def _resolved(config: RunConfig) -> tuple[RunConfig, RunData]:
    check_run(config, 1)
    config, data = resolve(config)
    return config, replace(data, train=as_trained(config, data))


def _model(config: RunConfig, context: ParallelContext) -> MaskedDiffusionModel:
    """The base's weights, for passes of single samples."""
    model = build_model(config.model, config.parallel, context, None if config.model.init_from else config.seed)
    if config.model.init_from:
        InitialWeights(config.model).load(model, context, config.seed)
    return InferenceEngine(model, config.precision.dtype).model


def _noiser(engine: Engine, config: RunConfig, data: RunData, context: ParallelContext) -> Noiser:
    density = np.empty(0)
    if config.diffusion.t_sampler in CALIBRATED_SAMPLERS:
        density = np.array(calibrate(engine, config, data, context)["cell_density"])
    return cast(Noiser, objective_of(config).noise(density, data.special_ids.mask))


def _masks(diffusion: DiffusionConfig) -> str:
    """What tells ways of masking, and of weighing, apart: each has draws of its own."""
    kept = diffusion.model_dump(mode="json", exclude={"t_sampler", "strata", "ema", "clipping", "calibration"})
    return json.dumps(kept, sort_keys=True)


def _bounds(diffusion: DiffusionConfig) -> tuple[float, float]:
    if diffusion.t_sampler != "clipped":
        return FULL
    bounds = diffusion.clipping.bounds
    return FULL_RANGE if bounds == "adaptive" else bounds
