"""The list of a study's runs, and the configuration of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.study.settings import Find, Overrides, PartSettings, StudySettings, TaskSettings

RUNS = "runs"
RESULT = "result.json"


class Point(NamedTuple):
    """What tells one run of a study from another. Budgets that come to the same are the same run."""

    task: str
    method: str
    seed: int
    lr_factor: float = 1.0
    batch_factor: float = 1.0  # samples of a step, to those of the configuration
    pace: str = ""  # the method whose seconds it takes; empty: as many steps as the configuration says

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.task, self.method]
        parts += [f"lr{self.lr_factor:g}"] if self.lr_factor != 1.0 else []
        parts += [f"batch{self.batch_factor:g}"] if self.batch_factor != 1.0 else []
        parts += [f"time_of_{self.pace}"] if self.pace else []
        return "-".join([*parts, str(self.seed)])


@dataclass(frozen=True)
class Recipe:
    """Everything that one run is made of; travels to the process that does it."""

    point: Point
    folder: Path
    config: Path
    further: tuple[Path, ...]  # files whose keys win
    overrides: Overrides
    task: TaskSettings
    keeps_checkpoints: bool
    kind: ClassVar[str] = "run"  # of perform.PERFORM

    @property
    def name(self) -> str:
        return self.point.name

    def load(self, step_factor: float = 1.0) -> RunConfig:
        """step_factor: steps, to those of the configuration. Raises UserError."""
        config = load_config(self.config, self.overrides, self.further)
        schedule = config.schedule
        batch = config.batch
        point = self.point
        steps = round(schedule.steps * step_factor)
        # As many steps as without the factor, though each takes other samples.
        epochs = round(schedule.epochs * point.batch_factor * step_factor, 4)
        changes = {
            "optimizer": config.optimizer.model_copy(update={"lr": config.optimizer.lr * point.lr_factor}),
            "batch": batch.model_copy(update={"global_size": round(batch.global_size * point.batch_factor)}),
            "schedule": schedule.model_copy(update={"steps": steps, "epochs": epochs}),
        }
        return config.model_copy(update=changes)

    @cached_property
    def digest(self) -> str:
        """Of what the run's result depends on, but for the contents of its data, which resuming compares by itself."""
        task = self.task.model_dump(mode="json", include={"measure", "test", "settings", "clip", "limit", "score"})
        return _digest({"config": self._trained_by(), "task": task, "pace": self.point.pace})

    @cached_property
    def training_digest(self) -> str:
        """Of what training depends on; how its answers are scored is left out."""
        return _digest(self._trained_by())

    def _trained_by(self) -> dict[str, Any]:
        return self.load().model_dump(mode="json", exclude={"checkpoint", "logging", "parallel", "faults"})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Listed(NamedTuple):
    point: Point
    parts: tuple[str, ...]  # names of the parts that ask for it


class Study:
    """A study's settings with its files found."""

    def __init__(self, settings: StudySettings, find: Find) -> None:
        self.settings = settings
        self.find = find
        self.folder = Path(settings.folder)

    def recipe(self, point: Point) -> Recipe:
        task = self.settings.tasks[point.task]
        method = self.settings.methods[point.method]
        folder = self.folder / RUNS / point.name
        base = task.bases.get(method.base, next(iter(task.bases.values())))
        overrides = (
            f"model.init_from={base}",
            *task.overrides,
            *method.overrides,
            *task.methods.get(point.method, ()),
            f"seed={point.seed}",
            f"checkpoint.directory={folder}",
        )
        return Recipe(
            point=point,
            folder=folder,
            config=self.find(task.config or self.settings.config),
            further=(self.find(method.file or f"methods/{point.method}"),),
            overrides=overrides if base else overrides[1:],
            task=task,
            keeps_checkpoints=self.settings.keep_checkpoints,
        )

    def runs(self) -> list[Listed]:
        """Every run once: those whose steps depend on others' seconds last, else in the parts' order, seed by seed, so
        that a study that is cut off has whole tables of its first seeds."""
        asked: dict[Point, list[str]] = {}
        for part in self.settings.parts:
            for point in self._of_part(part):
                asked.setdefault(point, []).append(part.name)
        listed = [Listed(point, tuple(parts)) for point, parts in asked.items()]
        return sorted(listed, key=lambda run: bool(run.point.pace))

    def recipes(self) -> list[Recipe]:
        """Of all runs, in their order."""
        return [self.recipe(point) for point, _ in self.runs()]

    def points(self, part: PartSettings, task: str, method: str) -> list[Point]:
        """A part's runs of one task and method: its seeds, at every learning rate."""
        return [point for point in self._of_part(part) if (point.task, point.method) == (task, method)]

    def rows(self, task: str, method: str) -> int:
        """Rows of the model that a sample of this method takes."""
        return self.recipe(Point(task, method, 0)).load().diffusion.rows_per_sample

    def _of_part(self, part: PartSettings) -> Iterator[Point]:
        settings = self.settings
        tasks: Sequence[str] = part.tasks or tuple(settings.tasks)
        for seed in part.seeds or settings.seeds:
            for task in tasks:
                for method in part.methods:
                    if method not in settings.tasks[task].without:
                        for factor in part.lr_factors:
                            yield self._budgeted(Point(task, method, seed, factor), part.budget)

    def _budgeted(self, point: Point, budget: str) -> Point:
        reference = self.settings.reference
        return {
            "samples": lambda: point,
            "compute": lambda: point._replace(batch_factor=self._batch_factor(point.task, point.method)),
            "time": lambda: point._replace(pace="" if point.method == reference else reference),
        }[budget]()

    def _batch_factor(self, task: str, method: str) -> float:
        key = (task, method)
        if key not in self._factors:
            self._factors[key] = self.rows(task, self.settings.reference) / self.rows(task, method)
        return self._factors[key]

    @cached_property
    def _factors(self) -> dict[tuple[str, str], float]:
        return {}


def check_recipes(study: Study) -> None:
    """Raise UserError where a run's configuration is none, before the first run begins."""
    seen = set[tuple[str, str]]()
    for point, _ in study.runs():
        if (point.task, point.method) in seen:
            continue
        seen.add((point.task, point.method))
        try:
            study.recipe(point).load()
        except UserError as error:
            raise UserError(f"{point.task} by {point.method}: {error}") from None
