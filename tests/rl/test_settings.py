"""What a run of reinforcement learning refuses, in a line each, and how it counts its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.objectives import check_run
from megatron_mdm.rl.rollouts import path_of, recorded
from megatron_mdm.rl.run import REINFORCED, parts_of
from megatron_mdm.rl.settings import Counts, Place, decoding, greedy
from megatron_mdm.training.build import SUPERVISED
from megatron_mdm.training.inputs import resolve, total_steps
from tests.rl.small import rl_config
from tests.small import small_config, write_ids

BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # changes of rl, of other sections, what the message says
    ({}, {"data": {"format": "sft"}}, "'data.format' to prompts"),
    (
        {},
        {"objective": {"name": "autoregressive"}, "diffusion": {"views": 1, "masking": "bernoulli"}},
        "'objective.name' autoregressive does not",
    ),
    ({}, {"model": {"z_loss": 1e-3}}, "'model.z_loss'"),
    ({}, {"diffusion": {"t_sampler": "clipped"}}, "'rl.rate_range'"),
    ({}, {"diffusion": {"strata": "full"}}, "'diffusion.strata'"),
    ({}, {"diffusion": {"ema": {"enabled": True}}}, "'diffusion.ema'"),
    ({}, {"diffusion": {"t_sampler": "ppots", "calibration": {"refit_every": 5}}}, "refit_every"),
    ({}, {"faults": {"on_spike": "rewind"}}, "'faults.on_spike'"),
    ({}, {"evaluation": {"every": 5}, "data": {"validation_fraction": 0.2}}, "'rl.evaluate_every'"),
    ({}, {"batch": {"micro_tokens": 100, "mode": "packed"}}, "'batch.micro_tokens'"),
    ({"num_generations": 3}, {}, "'rl.num_generations' 3"),
    ({"prompts_per_rollout": 3}, {}, "'batch.global_size' 8"),
    ({"generation": {"temperature": 0.0}}, {}, "'rl.generation.temperature' 0"),
    ({"generation": {"cache": "prefix"}}, {}, "'rl.generation.cache' prefix"),
    ({"generation": {"seed": 3}}, {}, "'rl.generation.seed'"),
    ({"generation": {"gen_lenght": 8}}, {}, "unknown key 'gen_lenght' (did you mean 'gen_length'?)"),
    ({"generation": {"gen_length": 10}}, {}, "multiple of block_length"),
    ({"task": "chess"}, {}, "'rl.task' must be one of gsm8k"),
    ({"beta": 0.1}, {}, "'model.init_from'"),
    ({"sync_ref_model": True}, {}, "'rl.sync_ref_model'"),
    ({"rewards": [{"name": "exakt_match"}]}, {}, "exakt_match"),
]


@pytest.mark.parametrize(("rl", "sections", "told"), BAD, ids=[message for *_, message in BAD])
def test_what_does_not_go_together_is_refused_in_a_line(
    rl: dict[str, Any], sections: dict[str, Any], told: str, tmp_path: Path
) -> None:
    config = rl_config(tmp_path, rl, **sections)
    problem = problem_of(config)
    assert told in problem
    assert "\n" not in problem


def problem_of(config: RunConfig) -> str:
    try:
        check_run(config, 1)
        REINFORCED.checked(config, 1)
    except UserError as error:
        return str(error)
    return ""


def test_a_good_configuration_passes_and_spikes_are_off_unless_asked_for(tmp_path: Path) -> None:
    config = rl_config(tmp_path)
    check_run(config, 1)
    assert REINFORCED.checked(config, 1).faults.spike_score == 0.0
    asked = rl_config(tmp_path, faults={"spike_score": 5.0})
    assert REINFORCED.checked(asked, 1).faults.spike_score == 5.0


def test_the_section_decides_the_kind_of_run(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 10)
    assert parts_of(rl_config(tmp_path)) is REINFORCED
    assert parts_of(small_config(tmp_path)) is SUPERVISED


def test_ppots_without_responses_needs_an_artifact(tmp_path: Path) -> None:
    lines = [f'{{"input_ids": [{first}, 3, 4], "prompt_length": 3}}' for first in range(5, 15)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config, data = resolve(rl_config(tmp_path, diffusion={"t_sampler": "ppots"}))
    with pytest.raises(UserError, match=r"'diffusion\.calibration\.artifact'"):
        REINFORCED.check_data(config, data)


def test_steps_of_a_rollout(tmp_path: Path) -> None:
    """4 × 4 completions in steps of 8, twice: iterations one after another, each over all minibatches."""
    config = rl_config(tmp_path)
    counts = Counts.of(config)
    assert [counts.place(step) for step in range(6)] == [
        Place(0, 0, 0),
        Place(0, 0, 1),
        Place(0, 1, 0),
        Place(0, 1, 1),
        Place(1, 0, 0),
        Place(1, 0, 1),
    ]
    epochs = rl_config(tmp_path, schedule={"steps": 0, "epochs": 2})
    assert total_steps(epochs, 10) == 5 * 4  # 20 prompts, 4 a rollout of 4 steps


def test_decoding_draws_and_validations_are_greedy(tmp_path: Path) -> None:
    config = rl_config(tmp_path).model_copy(update={"seed": 7})
    drawn = decoding(config)
    assert (drawn.temperature, drawn.stop_at_eos, drawn.noise, drawn.seed) == (1.0, True, "device", 7)
    assert greedy(config) == drawn.model_copy(update={"temperature": 0.0})


def test_a_recorded_rollout_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000003\.npz: no such recorded rollout"):
        recorded(tmp_path, 3)
    path_of(tmp_path, 3).write_bytes(b"PK\x03\x04 not a file of arrays")
    with pytest.raises(UserError, match=r"000003\.npz: not a recorded rollout"):
        recorded(tmp_path, 3)
    np.savez(path_of(tmp_path, 3), tokens=np.zeros(3))
    with pytest.raises(UserError, match=r"000003\.npz: not a recorded rollout"):
        recorded(tmp_path, 3)
