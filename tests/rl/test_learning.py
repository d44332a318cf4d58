"""Every method learns: the last rollouts have higher rewards than the first; shuffled rewards teach nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_mdm.config.load import load_config
from tests.ranks import run_ranks
from tests.rl.small import low_ids, rl_config
from tests.small import write_ids

METHODS = ("diffu_grpo", "unigrpo", "unigrpo_ppots_mirror", "coupled_grpo", "espo", "gdpo")
METHOD_FILES = Path(__file__).parents[2] / "configs/rl"
ROLLOUTS = 22
COMPARED = 10  # the first and the last


def shuffled(prompts: list[str], completions: list[str], tokens: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The values of low_ids, each at another completion's place."""
    values = low_ids(prompts, completions, tokens)
    random.Random(str(tokens)).shuffle(values)
    return values


def config_of(folder: Path, method: str, reward: str) -> Any:
    """4 prompts × 8 completions, two updates of each, by a shipped method."""
    counts = {"num_generations": 8, "generation": {"batch_size": 32}, "rewards": [{"name": reward}]}
    sections = {"batch": {"global_size": 32, "micro_size": 32}, "optimizer": {"lr": 1e-3}, "logging": {"every": 2}}
    name = {"checkpoint": {"directory": str(folder / f"{method}_{reward.rpartition(':')[2]}")}}
    config = rl_config(folder, counts, **sections, **name, schedule={"steps": 2 * ROLLOUTS, "name": "constant"})
    (folder / "task.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    layers = {"defaults": ["task.yaml", str(METHOD_FILES / f"{method}.yaml")]}
    (folder / "run.yaml").write_text(yaml.safe_dump(layers), encoding="utf-8")
    return load_config(folder / "run.yaml", ["rl.num_iterations=2", "rl.beta=0"])


def rewards_of(folder: Path, runs: Sequence[tuple[str, str]]) -> list[list[float]]:
    """On one rank: the mean reward of every rollout of runs, by method and reward."""
    from megatron_mdm.rl.run import REINFORCED
    from tests.rl.runs import run_of

    found = []
    for method, reward in runs:
        config = config_of(folder, method, reward)
        run_of(config, REINFORCED)
        lines = (Path(config.checkpoint.directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([record["reward"] for record in map(json.loads, lines) if "reward" in record])
    return found


@pytest.mark.parametrize("methods", [METHODS[:3], METHODS[3:]])
def test_every_method_raises_the_reward(methods: Sequence[str], tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 100, length=(8, 16))
    runs = [(method, "tests.rl.small:low_ids") for method in methods]
    control = [("unigrpo_ppots_mirror", "tests.rl.test_learning:shuffled")] * (METHODS[0] in methods)
    (found,) = run_ranks(rewards_of, 1, tmp_path, [*runs, *control])
    for (method, _), rewards in zip(runs, found):
        assert len(rewards) == ROLLOUTS
        first, last = np.array(rewards[:COMPARED]), np.array(rewards[-COMPARED:])
        error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / COMPARED)
        assert last.mean() > first.mean() + 3 * error, (method, rewards)
        assert last.mean() > 0.8, (method, rewards)
    for rewards in found[len(runs) :]:
        assert abs(np.mean(rewards[-COMPARED:]) - np.mean(rewards[:COMPARED])) < 0.1, rewards
