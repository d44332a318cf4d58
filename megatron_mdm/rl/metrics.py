"""What is logged of a rollout: rewards, lengths, times, and some completions to read. Names are TRL's where it has
them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_mdm.data.prompt_set import PromptDataset
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.rl.rollouts import ROLLOUTS, Rollout, record
from megatron_mdm.rl.source import RolloutSource
from megatron_mdm.training.callbacks.base import Callback, Order
from megatron_mdm.training.loop import StepResult
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState

SAMPLES = "samples.jsonl"  # in the folder of the rollouts: evaluations leave one in the run's own
_PHASES = {
    "rollout": "generation_seconds",
    "reward": "reward_seconds",
    "old": "old_seconds",
    "reference": "ref_seconds",
}


class LogRollouts(Callback):
    """A record of every rollout after the first step on it, a few of its completions and, if wanted, all of it."""

    order = Order.LOG

    def __init__(
        self, source: RolloutSource, data: PromptDataset, tokenizer: Tokenizer, metrics: MetricsLog, folder: Path
    ) -> None:
        """folder: the run's."""
        self.source = source
        self.data = data
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.folder = folder / ROLLOUTS
        self.names = source.completions.judge.rewards.names
        self.is_main = source.context.is_main

    def after_step(self, state: TrainState, result: StepResult) -> None:
        rollout = self.source.rollout
        if rollout is None or result.step != int(rollout.number) * self.source.counts.steps or not self.is_main:
            return
        seconds = {name: result.phases[phase] for phase, name in _PHASES.items() if phase in result.phases}
        drawn = {}
        if seconds.get("generation_seconds"):
            drawn["tokens_per_second/rollout"] = float(rollout.lengths.sum()) / seconds["generation_seconds"]
        self.metrics.write(state.step, {**summary(rollout, self.names), **seconds, **drawn})
        self._write_samples(state.step, rollout)
        if self.source.rl.record:
            record(rollout, self.folder)

    def _write_samples(self, step: int, rollout: Rollout) -> None:
        chosen = spread(rollout, self.source.rl.log_completions)
        lines = [
            json.dumps(self._sample(step, rollout, completion), ensure_ascii=False) + "\n" for completion in chosen
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            tqdm.write(f"error: {self.folder / SAMPLES} cannot be written ({error.strerror})", file=sys.stderr)

    def _sample(self, step: int, rollout: Rollout, completion: int) -> dict[str, Any]:
        prompt = self.data.prompts[int(rollout.rows[completion // rollout.group_size])]
        scores = [None if np.isnan(score) else float(score) for score in rollout.scores[completion]]
        return {
            "step": step,
            "rollout": int(rollout.number),
            "completion": completion,
            **prompt.as_record(),
            "response": self.tokenizer.decode(rollout.tokens[completion].tolist()),
            "truncated": bool(rollout.truncated[completion]),
            "rewards": dict(zip(self.names, scores)),
            "reward": float(rollout.rewards[completion]),
            "advantage": float(rollout.advantages[completion]),
        }


def spread(rollout: Rollout, count: int) -> list[int]:
    """The first `count` completions, taken from one group after another."""
    by_turns = np.arange(len(rollout.tokens)).reshape(rollout.num_groups, rollout.group_size).T.reshape(-1)
    return by_turns[:count].tolist()


def summary(rollout: Rollout, names: Sequence[str]) -> dict[str, float]:
    """A record of a rollout. names: of the reward functions."""
    by_group = rollout.rewards.reshape(rollout.num_groups, rollout.group_size)
    std = by_group.std(axis=1, ddof=1)
    ended = rollout.lengths[~rollout.truncated]
    return {
        "reward": float(rollout.rewards.mean()),
        "reward_std": float(std.mean()),
        "frac_reward_zero_std": float((by_group.max(1) == by_group.min(1)).mean()),
        "best_of_group": float(by_group.max(1).mean()),  # pass@G, where rewards are 0 and 1
        **_by_function(rollout.scores, names),
        **_lengths("completions", "length", rollout.lengths),
        **_lengths("completions", "terminated_length", ended if len(ended) else np.zeros(1)),
        "completions/clipped_ratio": float(rollout.truncated.mean()),
        "advantages/abs_mean": float(np.abs(rollout.advantages).mean()),
        "denoising_steps": float(rollout.denoising_steps.mean()),
        "unique_responses": _unique(rollout),
        "num_tokens": float(rollout.lengths.sum() + (rollout.prompt_lengths * rollout.group_size).sum()),
    }


def _by_function(scores: Floats, names: Sequence[str]) -> dict[str, float]:
    """Of the completions that a function applies to; not a number where there are none, or one."""
    values = {}
    for name, of_all in zip(names, scores.T):
        found = of_all[np.isfinite(of_all)]
        values[f"rewards/{name}/mean"] = float(found.mean()) if len(found) else float("nan")
        values[f"rewards/{name}/std"] = float(found.std(ddof=1)) if len(found) > 1 else float("nan")
    return values


def _lengths(prefix: str, name: str, lengths: Any) -> dict[str, float]:
    return {f"{prefix}/{kind}_{name}": float(getattr(lengths, kind)()) for kind in ("mean", "min", "max")}


def _unique(rollout: Rollout) -> float:
    """The share of different responses in a group, on average."""
    responses = [tuple(tokens[:length]) for tokens, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist())]
    size = rollout.group_size
    groups = [responses[start : start + size] for start in range(0, len(responses), size)]
    return float(np.mean([len(set(group)) / size for group in groups]))
