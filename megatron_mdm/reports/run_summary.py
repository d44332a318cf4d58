"""A run's folder → all that its page shows, as plain values: facts, curves over steps, marks, ranks.

The folder may be that of a run that still trains, was killed or is older than a field: what it lacks is None or empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_mdm.checkpoint.store import read_state, steps
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.clock import PHASES
from megatron_mdm.models.parameters import num_parameters

Record = dict[str, Any]

# curve → the keys of metrics.jsonl that it is made of
_CURVES = {
    "loss": ("loss", "grad_norm", "lr"),
    "validation": ("validation_loss",),
    "variance": ("variance_of_loss", "variance_of_term", "variance_of_estimator"),
    "throughput": ("tokens_per_second", "mfu"),
    "step_time": ("time_step", *(f"time_{part}" for part in PHASES)),
}
_RL_PHASES = ("rollout", "reward", "old", "reference", "weights")  # of a step, besides those of every run
# likewise, of runs of reinforcement learning
_RL_CURVES = {
    "reward": ("reward", "best_of_group", "frac_reward_zero_std"),
    "answers": ("exact_match", "exact_match_low", "exact_match_high", "validation_reward"),
    "lengths": ("completions/mean_length", "completions/max_length", "completions/clipped_ratio"),
    "policy": ("kl", "clip_ratio/region_mean", "entropy"),
}
# list over ranks → its key in metrics.jsonl
_BY_RANK = {
    "busy": "time_busy_by_rank",
    "communication": "time_communication_by_rank",
    "memory_gib": "memory_gib_by_rank",
}
_SMOOTHED_SHARE = 0.04  # of the log lines, in the window of a moving mean
_SPREAD = (10.0, 90.0)  # percentiles over samples


class Method(Protocol):
    """How a run was trained, as its objective tells it (objectives/base.py: Description)."""

    @property
    def label(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def has_rates(self) -> bool:
        """Whether the mask rate t means anything."""
        ...


@dataclass(frozen=True)
class RunFolder:
    """What was read of a run's folder. A field is empty where its file is absent."""

    folder: Path
    config: RunConfig
    records: list[Record]  # metrics.jsonl
    faults: list[Record]
    summary: Record
    calibration: Record
    checkpoints: list[int]  # the steps of those that are kept
    num_ranks: int | None  # that preflight found when the run was started last
    last_state: Record  # the newest checkpoint's state of training

    @property
    def last_step(self) -> int:
        """The last step that left a trace, the summary aside, which an earlier part of the run may have written."""
        return max([0, *self.checkpoints[-1:], *(record["step"] for record in self.records)])

    @property
    def has_current_summary(self) -> bool:
        return self.summary.get("steps", -1) >= self.last_step


def read_run_folder(folder: Path) -> RunFolder:
    """Raises UserError where the folder is not a run's, or the run has logged nothing yet."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run's folder (no config.yaml)")
    records = _read_lines(folder / "metrics.jsonl")
    summary = _read_json(folder / "summary.json")
    if not records and not summary:
        raise UserError(f"{folder}: nothing is logged yet (no record in metrics.jsonl)")
    found = {path: path.name.removeprefix("step-") for path in steps(folder / "checkpoints")}
    found = {path: step for path, step in found.items() if step.isdigit()}
    try:
        last_state = read_state(list(found)[-1]).get("train", {}) if found else {}
    except (OSError, ValueError):  # a damaged checkpoint; the page does without
        last_state = {}
    return RunFolder(
        folder=folder,
        config=load_config(folder / "config.yaml"),
        records=records,
        faults=_read_lines(folder / "faults.jsonl"),
        summary=summary,
        calibration=_read_json(folder / "calibration.json"),
        checkpoints=[int(step) for step in found.values()],
        num_ranks=len(_read_json(folder / "preflight.json").get("ranks", ())) or None,
        last_state=last_state,
    )


def run_page(run: RunFolder, method: Method) -> Record:
    """What run.json holds and run.png shows. Times are in seconds, memory is in GiB, losses in nats per token."""
    curves: dict[str, Any] = {name: _curve(run.records, keys) for name, keys in _CURVES.items()}
    for name, keys in (("loss", ("loss", "grad_norm")), ("variance", _CURVES["variance"])):
        window = max(3, round(_SMOOTHED_SHARE * len(curves[name]["step"])) | 1)  # odd: it has a centre
        smoothed = {f"{key}_smoothed": _smoothed(curves[name][key], window) for key in keys}
        curves[name] |= {**smoothed, "smoothing_window": window}
    curves["loss_by_t"] = _loss_by_t(run.records)
    if run.config.rl.is_used:
        curves |= {name: _curve(run.records, keys) for name, keys in _RL_CURVES.items()}
        curves["step_time"] = _curve(run.records, (*_CURVES["step_time"], *(f"time_{part}" for part in _RL_PHASES)))
    ranks = _ranks(run.records)
    marks = {
        "checkpoints": run.checkpoints,
        "skipped": [fault["step"] for fault in run.faults if fault.get("kind") == "skipped"],
        "spikes": [fault["step"] for fault in run.faults if fault.get("kind") == "spike"],
        "rewinds": _faults(run, "rewind", {"step", "to_step", "batches"}),
        "stragglers": _faults(run, "straggler", {"step", "rank", "host", "busy", "median"}),
    }
    return {"facts": _facts(run, method, curves, marks, ranks), "curves": curves, "marks": marks, "ranks": ranks}


def _facts(run: RunFolder, method: Method, curves: Record, marks: Record, ranks: Record) -> Record:
    config = run.config
    state = run.last_state
    num_steps = run.summary["steps"] if run.has_current_summary else run.last_step
    status, reason = _status(run)
    planned = config.schedule.steps or (num_steps if status == "finished" else None)
    calibration = {key: _number(run.calibration.get(key)) for key in ("efficiency", "efficiency_of_uniform")}
    counted = run.summary if run.has_current_summary else {}
    skipped = (counted.get("skipped_steps"), state.get("num_skipped"), len(marks["skipped"]))
    rewinds = (counted.get("rewinds"), state.get("num_rewinds"), len(marks["rewinds"]))
    return {
        "folder": str(run.folder),
        "status": status,
        "reason": reason,
        "steps": num_steps,
        "planned_steps": planned,
        "planned_epochs": config.schedule.epochs or None,
        "tokens": next((record["tokens"] for record in reversed(run.records) if "tokens" in record), None),
        "model": {
            "num_parameters": _num_parameters(config),
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
        },
        "layout": _layout(config, ranks["num_ranks"] or run.num_ranks),
        "batch": {"global_size": config.batch.global_size, "micro_size": config.batch.micro_size},
        "precision": config.precision.dtype,
        "method": {
            "name": method.label,
            "text": method.text,
            "has_rates": method.has_rates,
            "objective": config.objective.name,
            **{
                key: getattr(config.diffusion, key)
                for key in ("t_sampler", "views", "multisample", "strata", "masking", "normalization")
            },
        },
        **({"rollouts": _rollouts(config)} if config.rl.is_used else {}),
        "last_loss": next((loss for loss in reversed(curves["loss"]["loss_smoothed"]) if loss is not None), None),
        "best_validation": _best_validation(run, curves["validation"]),
        "calibration": calibration if run.calibration else None,
        "skipped_steps": max(value or 0 for value in skipped),
        "spikes": len(marks["spikes"]),
        "rewinds": max(value or 0 for value in rewinds),
        "straggler_reports": len(marks["stragglers"]),
        "newest_checkpoint": f"step-{run.checkpoints[-1]:08d}" if run.checkpoints else None,
    }


def _rollouts(config: RunConfig) -> str:
    rl = config.rl
    return (
        f"{rl.prompts_per_rollout} prompts × {rl.num_generations} completions, {rl.num_iterations} updates of each; "
        f"estimator {rl.estimator}, ratios of a {rl.importance_sampling_level}, beta {rl.beta:g}"
    )


def _status(run: RunFolder) -> tuple[str, str]:
    """(finished, stopped early or unfinished; why)"""
    if run.has_current_summary:
        reason = run.summary.get("stopped_early", "")
        return ("stopped early", reason) if reason else ("finished", "")
    state = run.last_state
    if state.get("step", -1) >= run.last_step:  # a fault ends a run with a checkpoint and without a summary
        reason = state.get("failure") or state.get("stop_reason") or ""
        if reason:
            return "stopped early", reason
    return "unfinished", ""


def _layout(config: RunConfig, num_ranks: int | None) -> Record:
    parallel = config.parallel
    degree = parallel.tensor * parallel.pipeline
    return {
        "ranks": num_ranks,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": num_ranks // degree if num_ranks and num_ranks % degree == 0 else None,
        "zero": parallel.zero,
    }


def _num_parameters(config: RunConfig) -> int | None:
    """The model's parameters, without the padding of the vocabulary."""
    if not isinstance(config.model.vocab_size, int):
        return None
    return num_parameters(config.model)


def _best_validation(run: RunFolder, curve: Record) -> Record | None:
    pairs = [(loss, step) for step, loss in zip(curve["step"], curve["validation_loss"]) if loss is not None]
    if pairs:
        loss, step = min(pairs)
        return {"loss": loss, "step": step}
    best = _number(run.summary.get("best_validation_loss"))
    return None if best is None else {"loss": best, "step": None}


def _curve(records: Sequence[Record], keys: Sequence[str]) -> Record:
    """Columns of the records that have at least one of the keys; None where a value is absent or not a number."""
    found = [record for record in records if any(_number(record.get(key)) is not None for key in keys)]
    return {
        "step": [record["step"] for record in found],
        **{key: [_number(record.get(key)) for record in found] for key in keys},
    }


def _loss_by_t(records: Sequence[Record]) -> Record:
    """Rows of equal length, that of the last: mean loss by equal parts of t, None where no sample fell."""
    found = [record for record in records if any(_number(loss) is not None for loss in record.get("loss_by_t") or ())]
    found = [record for record in found if len(record["loss_by_t"]) == len(found[-1]["loss_by_t"])]
    rows = [[_number(loss) for loss in record["loss_by_t"]] for record in found]
    return {"step": [record["step"] for record in found], "loss_by_t": rows}


def _ranks(records: Sequence[Record]) -> Record:
    """The last sample's lists over ranks, and the spread of busy times over all samples of as many ranks."""
    samples = [found for record in records if (found := _sample(record))]
    last = samples[-1] if samples else {}
    num_ranks = max((len(values) for key, values in last.items() if key in _BY_RANK), default=None)
    result: Record = {"num_ranks": num_ranks, "step": last.get("step"), "slowest_rank": last.get("slowest_rank")}
    for name in _BY_RANK:
        values = last.get(name)
        result[name] = values if values and len(values) == num_ranks else None
    busy = [sample["busy"] for sample in samples if len(sample.get("busy", ())) == num_ranks]
    array = np.array(busy, dtype=float)
    result["num_samples"] = len(busy)
    is_whole = len(busy) > 0 and np.isfinite(array).all()
    result["busy_spread"] = np.percentile(array, _SPREAD, axis=0).T.tolist() if is_whole else None
    return result


def _sample(record: Record) -> Record:
    """A record's lists over ranks by name, with its step and slowest rank; empty where it has none."""
    lists = {name: [_number(value) for value in record.get(key) or ()] for name, key in _BY_RANK.items()}
    lists = {name: values for name, values in lists.items() if any(value is not None for value in values)}
    return {**lists, "step": record["step"], "slowest_rank": record.get("slowest_rank")} if lists else {}


def _faults(run: RunFolder, kind: str, keys: set[str]) -> list[Record]:
    """These keys of the fault records of a kind that have them all."""
    found = [fault for fault in run.faults if fault.get("kind") == kind and keys <= fault.keys()]
    return [{key: fault[key] for key in sorted(keys)} for fault in found]


def _smoothed(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred moving mean, over as much of the window as there is; absent values are left out."""
    array = np.array(values, dtype=float)
    present = np.isfinite(array)
    kernel = np.ones(window)
    if len(array) == 0:
        return []
    sums, counts = (
        np.convolve(np.pad(part, window // 2), kernel, "valid") for part in (np.where(present, array, 0.0), present)
    )
    return [float(total / count) if count else None for total, count in zip(sums, counts)]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _read_lines(path: Path) -> list[Record]:
    """The records of a JSON-lines file; a line that a killed run has cut is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _read_json(path: Path) -> Record:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
