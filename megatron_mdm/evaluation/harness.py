"""A run as a model of EleutherAI's lm-evaluation-harness (extra `[eval]`): its tasks, scored by this stack's ranks.

Every rank runs the harness on all requests, so it sees a world of one; but it gives its results to the first process of
each node only, and the main rank's are everybody's.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.harness_requests import HarnessConfig, Requests, generation_for, wish
from megatron_mdm.evaluation.measure import Measure, Result, Source
from megatron_mdm.evaluation.trained import TrainedFor
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
except ImportError as error:
    raise UserError(f"--harness needs lm-eval ({error}); install it with: pip install 'megatron-mdm[eval]'") from None


class HarnessModel(LM):
    """lm_eval.api.model.LM over harness_requests.Requests."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests

    @property
    def tokenizer_name(self) -> str:
        return "megatron-mdm"

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self.requests.log_likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self.requests.document_log_likelihoods([request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self.requests.responses([request.args for request in requests])


class LoadedTasks(TaskManager):
    """Tasks whose data are here, for lm-eval to take."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: of tasks, groups or tags, or YAML files. Raises UserError where one is unknown or cannot be loaded."""
        for library in ("lm_eval", "datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)
        super().__init__()
        for name in names:
            if name not in self.task_index and not name.endswith((".yaml", ".yml")):
                close = difflib.get_close_matches(name, self.all_tasks, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"--harness: lm-eval has no task, group or tag {name!r}{hint}")
        try:
            self.loaded = super().load(list(names))
        except Exception as error:  # whatever a task's code and the libraries it loads data with may raise
            lines = " ".join(str(error).split())
            raise UserError(
                f"--harness: {', '.join(names)} cannot be loaded ({type(error).__name__}: {lines})"
            ) from None
        for name, task in self.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(f"--harness: {name} runs a model's code or needs images, which is not supported")

    def load(self, task_list: Any) -> Any:
        return self.loaded


def _prepare(
    source: Source, settings: HarnessConfig, config: RunConfig, tokenizer: Tokenizer, objective: TrainedFor
) -> Callable[[Any, ParallelContext], Result]:
    names = source.path.split(",")
    tasks = LoadedTasks(names)
    for task in tasks.loaded["tasks"].values():  # what cannot be answered shows before a model is loaded
        if task.OUTPUT_TYPE == "generate_until":
            asked = wish(task.config.generation_kwargs or {}, settings)
            generation_for(asked, settings, Room.of(config.model, settings.extrapolate).longest)

    def run(engine: Any, context: ParallelContext) -> Result:
        found = lm_eval.simple_evaluate(
            model=HarnessModel(Requests(engine, tokenizer, settings, config, objective, context)),
            tasks=names,
            task_manager=tasks,
            num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
            limit=source.limit or None,
        )
        own = json.dumps(_result(found) if context.is_main else None, default=handle_non_serializable)
        result = json.loads(str(gather_objects(own, context)[0]))
        return {**result, "settings": settings.model_dump(mode="json")}

    return run


def _result(found: Any) -> Result:
    samples = [
        {
            "task": task,
            **{name: sample[name] for name in ("doc_id", "filter", "target")},
            "responses": sample["filtered_resps"],
            **{name: sample[name] for name in sample["metrics"]},
        }
        for task, logged in found["samples"].items()
        for sample in logged
    ]
    kept = ("results", "groups", "versions", "n-shot", "n-samples")
    return {**{name: found[name] for name in kept if name in found}, "samples": samples}


def _summary(result: Result) -> list[str]:
    return [
        f"{task}: {metric} {value:.4f}"
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]


HARNESS = Measure(HarnessConfig, _prepare, _summary, "harness.json", "harness_samples.jsonl")
