"""What a run reached: summary.json, and its last lines on the screen."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.training.callbacks.log import Log
from megatron_mdm.training.source import BatchSource
from megatron_mdm.training.state import TrainState

_CALIBRATION = ("efficiency", "efficiency_interval", "efficiency_of_uniform", "uniform_floor", "forwards", "seconds")


def summarize(state: TrainState, log: Log, artifact: dict[str, Any] | None, source: BatchSource) -> dict[str, Any]:
    """Content of summary.json. log: of the whole run. artifact: the calibration, where there is one."""
    drawn = np.array(log.t_histogram) / max(1, sum(log.t_histogram))
    t, _ = source.times(max(0, state.step - 1))
    variances = {
        "variance_of_loss": log.run_variance.of_loss(),
        "variance_of_loss_eq_23": log.run_variance.of_loss_eq_23(),
        "variance_of_term": log.run_variance.of_term(),
        "variance_of_estimator": log.run_variance.of_estimator(),
    }
    return {
        "steps": state.step,
        "tokens": state.num_tokens,
        "stopped_early": state.stop_reason,
        "skipped_steps": state.num_skipped,
        **({"empty_steps": state.num_empty} if state.num_empty else {}),
        "rewinds": state.num_rewinds,
        "best_validation_loss": state.best_validation if np.isfinite(state.best_validation) else None,
        "best_step": state.best_step if np.isfinite(state.best_validation) else None,
        **{key: value if np.isfinite(value) else None for key, value in variances.items()},
        "t_share_by_decile": drawn.round(4).tolist(),
        "t_last_step": {"min": float(t.min()), "mean": float(t.mean()), "max": float(t.max()), "std": float(t.std())},
        "calibration": artifact and {key: artifact[key] for key in _CALIBRATION},
    }


def outcome(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    """A run's end, in a line or two for the screen."""
    reason = f" ({summary['stopped_early']})" if summary["stopped_early"] else ""
    lines = [f"trained {summary['steps']} steps{reason}; run folder: {config.checkpoint.directory}"]
    if config.checkpoint.keep_best and summary["best_step"] is not None:
        best = f"best validation loss: {summary['best_validation_loss']:.6g} after step {summary['best_step']}"
        lines.append(f"{best}; evaluation, generation and export take its checkpoint (--checkpoint newest: the last)")
    return lines
