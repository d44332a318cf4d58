"""study.json as questions are put to it: which runs are compared, and what they reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron_mdm.study.settings import StudySettings

Record = dict[str, Any]
BUDGETS = {"samples": "equal samples", "compute": "equal compute", "time": "equal time"}


class Scores:
    """The runs of a study. Scores are in the tasks' units of tables."""

    def __init__(self, record: Record) -> None:
        self.settings = StudySettings.model_validate(record["settings"])
        self.runs: list[Record] = record["runs"]
        self.failed: list[Record] = record["failed"]
        self.num_asked: int = record["num_asked"]
        self.variance: list[Record] = record["variance"]
        self._budget_of = {part.name: part.budget for part in self.settings.parts}

    @property
    def tasks(self) -> list[str]:
        """Those that have runs, in the settings' order."""
        found = {run["task"] for run in self.runs}
        return [task for task in self.settings.tasks if task in found]

    def methods(self, budget: str) -> list[str]:
        """Those that have runs of a budget, in the settings' order."""
        found = {run["method"] for run in self.chosen(budget)}
        return [method for method in self.settings.methods if method in found]

    def title(self, method: str) -> str:
        named = self.settings.methods.get(method)
        return (named and named.title) or method

    def task_title(self, task: str) -> str:
        return self.settings.tasks[task].title or task

    def chosen(self, budget: str = "samples", lr_factor: float = 1.0, **values: Any) -> list[Record]:
        """Runs of a budget and a learning rate, with these values, by seed."""
        found = [
            run
            for run in self.runs
            if run["lr_factor"] == lr_factor
            and any(self._budget_of[part] == budget for part in run["parts"])
            and all(run[key] == value for key, value in values.items())
        ]
        return sorted(found, key=lambda run: int(run["seed"]))

    def scores(self, task: str, method: str, budget: str = "samples", lr_factor: float = 1.0) -> list[float]:
        scale = self.settings.tasks[task].scale
        return [scale * run["score"] for run in self.chosen(budget, lr_factor, task=task, method=method)]

    def losses(self, task: str, method: str, budget: str = "samples") -> list[float]:
        """Best validation losses, in nats."""
        return [run["best_validation_loss"] for run in self.chosen(budget, task=task, method=method)]

    def errors(self, task: str, method: str, budget: str = "samples") -> list[float]:
        """Standard errors of the scores, over questions; 0 where they are not known."""
        scale = self.settings.tasks[task].scale
        return [scale * (run["standard_error"] or 0.0) for run in self.chosen(budget, task=task, method=method)]

    def means(self, task: str, method: str, value: Callable[[Record], float | None]) -> list[float]:
        """Some figure of a method's runs of equal samples, of those that have it."""
        values = (value(run) for run in self.chosen(task=task, method=method))
        return [found for found in values if found is not None]

    def all_there(self, task: str, methods: Iterable[str], budget: str = "samples") -> bool:
        return all(self.scores(task, method, budget) for method in methods)
