"""What the ranks of one run do: train it, or resume it, then score its best checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint import load
from megatron_mdm.config.files import write_json
from megatron_mdm.config.load import load_section
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.evaluation.measure import Source
from megatron_mdm.evaluation.measures import MEASURES, write_result
from megatron_mdm.objectives import check_run, objective_of
from megatron_mdm.parallel.groups import ParallelContext, initialize, world_size_from_environment
from megatron_mdm.parallel.watchdog import watch
from megatron_mdm.study import gradients
from megatron_mdm.study.gradients import GRADIENTS
from megatron_mdm.study.results import write_done
from megatron_mdm.study.runs import Recipe
from megatron_mdm.study.settings import TaskSettings
from megatron_mdm.study.worker import TRAINED
from megatron_mdm.training.folder import CHECKPOINTS, CONFIG, StartMode
from megatron_mdm.training.inputs import agreement, resolve
from megatron_mdm.training.resume import as_the_run_began
from megatron_mdm.training.run import train_run

_LEFT_OUT = (CHECKPOINTS, "huggingface", "images", "launch.json", "curves.png")  # of a run that is done


def perform(recipe: Recipe, step_factor: float) -> None:
    """Leave result.json in the run's folder; nothing, where a signal has stopped the training. Collective. Raises
    UserError."""
    config = recipe.load(step_factor)
    objective = check_run(config, world_size_from_environment())
    folder = recipe.folder
    begun = (folder / CONFIG).exists()
    config, data = resolve(as_the_run_began(config) if begun else config)
    context = initialize(config.parallel, agreement(config, data), config.faults.hang_minutes)
    watch(folder, config.faults.hang_minutes, context)
    for line in objective.warnings() if context.is_main else ():
        print(f"warning: {line}", file=sys.stderr)
    summary = _trained(folder)
    if summary is None:
        summary = train_run(config, data, context, StartMode.agreed(begun, False))
        if "resume with --resume" in summary["stopped_early"]:
            return
        if context.is_main:
            write_json(folder / TRAINED, summary)
    began = time.monotonic()
    score = evaluate(folder, recipe.task, context)
    if context.is_main:
        write_done(recipe, summary, score, time.monotonic() - began)
        if not recipe.keeps_checkpoints:
            _remove(folder)


PERFORM: dict[str, Callable[[Recipe, float], None]] = {Recipe.kind: perform, GRADIENTS: gradients.measure}


def evaluate(folder: Path, task: TaskSettings, context: ParallelContext) -> dict[str, Any]:
    """What is measured of a run's best checkpoint, without its single answers, which go to the run's folder. Of the
    main rank. Collective."""
    measure = MEASURES[task.measure]
    config: RunConfig = load.run_config(folder)
    tokenizer = load.run_tokenizer(folder, config)
    source = Source(task.test, task.limit, config.data.on_error, task.clip)
    settings = load_section(measure.settings, task.settings)
    measured = measure.prepare(source, settings, config, tokenizer, objective_of(config))
    result = measured(load.load_for_inference(folder, config, context), context)
    if not context.is_main:
        return {}
    result.pop("pictures", None)  # but for their scores
    write_result(folder, measure, result)
    return result


def _trained(folder: Path) -> dict[str, Any] | None:
    path = folder / TRAINED
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _remove(folder: Path) -> None:
    for name in _LEFT_OUT:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
