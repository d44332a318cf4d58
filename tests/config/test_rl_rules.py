"""What reinforcement learning needs of the data and of the other sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.objectives import check_run
from tests.small import small_config


def rl_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    rl = {"rewards": [{"name": "exact_match"}], "num_generations": 4, "prompts_per_rollout": 4, "evaluate_every": 0}
    generation = {"gen_length": 16, "block_length": 8, "steps": 16}
    values = {
        "data": {"format": "prompts", **sections.pop("data", {})},
        "rl": {**rl, "generation": generation, **sections.pop("rl", {})},
    }
    return small_config(folder, **values, **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rl": {"rewards": []}}, r"'data.format' prompts is for reinforcement learning: name its 'rl.rewards'"),
        ({"data": {"too_long": "truncate"}}, r"'data.too_long' truncate would ask another question"),
        ({"data": {"eos_padding": True}}, r"'data.eos_padding' is for 'data.format' sft: prompts has no answers"),
        ({"data": {"max_length": 16}}, r"gen_length' 16 leaves no room for prompts in 'data.max_length' 16"),
        ({"rl": {"evaluate_every": 5}}, r"'rl.evaluate_every' is set, but neither 'data.validation'"),
        ({"rl": {"num_generations": 3}}, r"'batch.global_size' 8 completions are not whole groups"),
        ({"rl": {"prompts_per_rollout": 3}}, r"= 12 completions are not whole optimizer steps"),
    ],
)
def test_rules_of_reinforcement_learning(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_run(rl_config(tmp_path, **sections), 4)


def test_what_fits_is_allowed_and_a_pipeline_is_warned_of(tmp_path: Path) -> None:
    assert check_run(rl_config(tmp_path, data={"max_length": 17}), 4).warnings() == []
    (warning,) = check_run(rl_config(tmp_path, parallel={"pipeline": 2}), 4).warnings()
    assert "'parallel.pipeline' 2 decodes one batch at a time" in warning
    assert check_run(small_config(tmp_path, parallel={"pipeline": 2}), 4).warnings() == []
