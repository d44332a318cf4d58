"""A small run of reinforcement learning that tests share: prompts of token ids, and a reward of the ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.config.schema import RunConfig
from tests.small import small_config, small_model, write_ids

GEN_LENGTH = 8


def low_ids(prompts: list[str], completions: list[str], tokens: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of a completion's tokens that are below 30."""
    return [float(np.mean([token < 30 for token in ids])) if len(ids) else 0.0 for ids in tokens]


def constant(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(prompts)


def fails_once(prompts: list[str], completions: list[str], tokens: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Of the ranks of a test, the last one's fault only."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        raise ZeroDivisionError("a reward's own fault")
    return [0.0] * len(prompts)


def rl_config(folder: Path, rl: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """4 prompts × 4 completions of 8 tokens, 2 minibatches, 2 iterations: 4 steps a rollout."""
    if not (folder / "train.jsonl").exists():
        write_ids(folder / "train.jsonl", 10, length=(8, 16))
    rl = dict(rl or {})
    decoding = {"gen_length": GEN_LENGTH, "block_length": 4, "steps": 4, "batch_size": 3}
    values: dict[str, Any] = {
        "rewards": [{"name": f"{__name__}:low_ids"}],
        "num_generations": 4,
        "prompts_per_rollout": 4,
        "num_iterations": 2,
        "generation": {**decoding, **rl.pop("generation", {})},
        "evaluate_every": 0,
        **rl,
    }
    defaults: dict[str, dict[str, Any]] = {
        "model": small_model(num_kv_heads=4, init_std=0.2).model_dump(),
        "data": {"format": "prompts"},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "diffusion": {"views": 2, "masking": "exact_count"},
    }
    for name, changes in sections.items():
        defaults[name] = {**defaults.get(name, {}), **changes}
    return small_config(folder, rl=values, **defaults)
