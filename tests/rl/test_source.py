"""Rollouts trained on: ratios that begin at 1, steps with nothing to learn, what is logged; any ranks draw alike."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.checkpoint.store import read_state
from megatron_mdm.config.errors import UserError
from megatron_mdm.rl.rollouts import Rollout, recorded
from tests.ranks import run_ranks
from tests.rl.small import rl_config

STEPS = 5  # of which 4 are on the first rollout


def config_of(folder: Path, name: str, rl: dict[str, Any] | None = None, **sections: Any) -> Any:
    checkpoint = {"directory": str(folder / name)}
    return rl_config(folder, rl, checkpoint=checkpoint, **{"schedule": {"steps": STEPS}, **sections})


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def many_runs(folder: Path) -> dict[str, Any]:
    """On one rank: runs one after another, and what is asked of the first run's source."""
    from megatron_mdm.rl.run import REINFORCED
    from tests.rl.runs import run_of

    base = {"init_from": str(folder / "whole")}
    still = {"rewards": [{"name": "tests.rl.small:constant"}]}
    run_of(
        config_of(folder, "whole", {"record": True, "evaluate_every": 1}, data={"validation_fraction": 0.3}), REINFORCED
    )
    replay = {"replay": str(folder / "whole/rollouts")}
    packed = {"mode": "packed", "micro_tokens": 128}
    run_of(config_of(folder, "packed", replay, data={"validation_fraction": 0.3}, batch=packed), REINFORCED)
    run_of(config_of(folder, "constant", still, model=base, schedule={"steps": 2}), REINFORCED)
    run_of(config_of(folder, "held", {**still, "beta": 0.5}, model=base, schedule={"steps": 2}), REINFORCED)
    once = {"num_iterations": 1, "prompts_per_rollout": 2}
    run_of(config_of(folder, "once", once, schedule={"steps": 1}), REINFORCED)
    lora = {**base, "lora": {"rank": 4, "alpha": 8.0}}
    run_of(config_of(folder, "lora", {**once, "beta": 0.5}, model=lora, schedule={"steps": 2}), REINFORCED)
    return {
        "ratios": ratios_at_equal_weights(config_of(folder, "other", {"num_iterations": 2})),
        "report": reports_of(folder / "whole"),
    }


def reports_of(run: Path) -> list[str]:
    """What mdm report rl-variance says of a run, twice: the second time with a design more; and of what it refuses."""
    from megatron_mdm.cli.report import main

    def said(*arguments: str) -> str:
        output = io.StringIO()
        with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["mdm report", "rl-variance", str(run), *arguments])
            try:
                main()
            except UserError as error:
                return str(error)
        return output.getvalue()

    small = ["--groups", "2", "--draws", "3", "--target-rows", "4", "--target-draws", "2"]
    designs = ["P-POTS, shared, strata", "P-POTS, shared, strata; espo"]
    done = [said(*small, "--designs", each) for each in designs]
    return [
        *done,
        said("--designs", "no such"),
        said("--groups", "99"),
        said("--rollout", str(run / "none/000000.npz")),
    ]


def ratios_at_equal_weights(config: Any) -> dict[str, tuple[float, float]]:
    """(least, greatest) ratio of the second minibatch before any step: with the noise that measured θ_old's values, and
    with another seed's."""
    from tests.rl.runs import begun

    config, _, _, source = begun(config)
    source.prepare(0)
    found = {}
    for name, seed in (("same", config.seed), ("another", config.seed + 1)):
        source.noise.seed = seed
        gradients = [each for of_micro in source.prepare(1).content.gradients for each in of_micro]
        measures = [each.measures for each in gradients]
        found[name] = (min(each.ratio_min for each in measures), max(each.ratio_max for each in measures))
    return found


def one_rollout(config: Any) -> None:
    from megatron_mdm.rl.run import REINFORCED
    from tests.rl.runs import run_of

    run_of(config, REINFORCED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_ranks(many_runs, 1, folder)[0]


def test_ratios_are_one_to_the_last_bit_at_equal_weights_and_equal_noise(found: dict[str, Any], folder: Path) -> None:
    assert found["ratios"]["same"] == (1.0, 1.0)
    low, high = found["ratios"]["another"]
    assert low < 0.99
    assert high > 1.01
    first, *later = [record for record in records_of(folder / "whole") if "ratio/min" in record]
    assert first["ratio/min"] == first["ratio/max"] == 1.0
    assert later[0]["ratio/min"] < 1.0 < later[0]["ratio/max"]
    assert later[3]["ratio/min"] == later[3]["ratio/max"] == 1.0  # the next rollout's first step
    assert all(record["recompute_gap"] < 1e-6 for record in (first, *later))


def test_where_nothing_is_to_be_learnt_weights_stay_bit_for_bit(found: dict[str, Any], folder: Path) -> None:
    from safetensors.numpy import load_file

    before = load_file(next((folder / f"whole/checkpoints/step-{STEPS:08d}/tensors").glob("*")))
    for name, num_empty in (("constant", 2), ("held", 0)):
        checkpoint = folder / name / "checkpoints/step-00000002"
        after = load_file(next((checkpoint / "tensors").glob("*")))
        for key in before:
            if key.endswith("/weight"):
                assert np.array_equal(before[key], after[key]), (name, key)
        assert read_state(checkpoint)["train"]["num_empty"] == num_empty
        losses = [record for record in records_of(folder / name) if "loss" in record]
        assert [record["loss"] for record in losses] == [0.0, 0.0]
        assert losses[0].get("kl", 0.0) == 0.0
    assert records_of(folder / "constant")[1]["frac_reward_zero_std"] == 1.0
    assert json.loads((folder / "constant/summary.json").read_text())["empty_steps"] == 2


def test_replayed_and_packed_as_drawn_and_padded(found: dict[str, Any], folder: Path) -> None:
    first, again = ([r for r in records_of(folder / name) if "loss" in r] for name in ("whole", "packed"))
    for mine, other in zip(first, again, strict=True):
        for key in ("loss", "weighted_loss", "grad_norm", "ratio/mean", "entropy"):
            assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), key
    drawn, replayed = (next(r for r in records_of(folder / name) if "reward" in r) for name in ("whole", "packed"))
    assert {key: drawn[key] for key in replayed if not key.endswith("_seconds")} == {
        key: value for key, value in replayed.items() if not key.endswith("_seconds")
    }


def test_what_is_logged(found: dict[str, Any], folder: Path) -> None:
    records = records_of(folder / "whole")
    of_rollouts = [record for record in records if "reward" in record]
    assert [record["step"] for record in of_rollouts] == [1, 5]
    rollout = recorded(folder / "whole/rollouts", 0)
    first = of_rollouts[0]
    assert first["reward"] == pytest.approx(rollout.rewards.mean())
    assert first["rewards/low_ids/mean"] == pytest.approx(rollout.scores.mean())
    assert first["completions/mean_length"] == rollout.lengths.mean()
    assert first["generation_seconds"] > 0
    assert first["old_seconds"] > 0
    samples = [json.loads(line) for line in (folder / "whole/rollouts/samples.jsonl").read_text().splitlines()]
    assert [sample["completion"] for sample in samples[:5]] == [0, 4, 8, 12, 1]
    assert samples[1]["advantage"] == rollout.advantages[4]
    assert samples[1]["rewards"] == {"low_ids": rollout.scores[4, 0]}
    validations = [record for record in records if "validation_reward" in record]
    assert [record["step"] for record in validations] == [4, STEPS]  # after a rollout, and at the end
    # No reference has a final answer, so the rewards decide.
    assert all(record["validation_loss"] == -record["validation_reward"] for record in validations)


def test_the_page_of_a_run_shows_rewards_lengths_and_the_policy(found: dict[str, Any], folder: Path) -> None:
    from megatron_mdm.config.load import load_config
    from megatron_mdm.objectives import objective_of
    from megatron_mdm.reports.run_facts import fact_lines
    from megatron_mdm.reports.run_page import page_figure
    from megatron_mdm.reports.run_summary import read_run_folder, run_page

    method = objective_of(load_config(folder / "whole/config.yaml")).description
    page = run_page(read_run_folder(folder / "whole"), method)
    assert page["curves"]["reward"]["step"] == [1, 5]
    assert page["curves"]["policy"]["step"] == [1, 2, 3, 4, 5]
    assert page["curves"]["answers"]["step"] == [4, 5]
    assert page["curves"]["step_time"]["time_rollout"][0] > 0.0
    assert dict(fact_lines(page["facts"]))["rollouts"].startswith("4 prompts × 4 completions, 2 updates of each")
    titles = [axes.get_title("left") for axes in page_figure(page).axes]
    assert {"reward of completions", "length of completions", "divergence, clipped ratios"} <= set(titles)


def test_one_update_a_rollout_needs_no_pass_before_it(found: dict[str, Any], folder: Path) -> None:
    (record,) = [record for record in records_of(folder / "once") if "loss" in record]
    assert record["time_weights"] < record["time_rollout"]
    assert "entropy" not in record
    assert "recompute_gap" not in record
    assert record["grad_norm"] > 0.0
    assert (record["ratio/min"], record["ratio/max"]) == (1.0, 1.0)


def test_the_reference_is_pinned(found: dict[str, Any], folder: Path) -> None:
    from megatron_mdm.config.load import load_config

    assert load_config(folder / "held/config.yaml").model.init_from.endswith(f"whole/checkpoints/step-{STEPS:08d}")
    assert load_config(folder / "constant/config.yaml").model.init_from.endswith("whole")  # needed once only


def test_adapters_are_held_to_the_weights_beside_them(found: dict[str, Any], folder: Path) -> None:
    first, second = [record for record in records_of(folder / "lora") if "loss" in record]
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0


def fault_of(config: Any) -> str:
    from megatron_mdm.config.errors import UserError

    try:
        one_rollout(config)
    except UserError as error:
        return str(error)
    return ""


def test_a_reward_that_fails_on_one_rank_is_an_error_on_all(found: dict[str, Any], folder: Path) -> None:
    failing = {"rewards": [{"name": "tests.rl.small:fails_once"}]}
    faults = run_ranks(fault_of, 2, config_of(folder, "failing", failing, parallel={"tensor": 1, "zero": 1}))
    assert faults[0] == faults[1]
    assert "fails_once" in faults[0]
    assert "a reward's own fault" in faults[0]
    assert "\n" not in faults[0]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_data_ranks_draw_the_same_tokens(num_ranks: int, found: dict[str, Any], folder: Path) -> None:
    name = f"dp{num_ranks}"
    config = config_of(
        folder,
        name,
        {"record": True},
        data={"validation_fraction": 0.3},
        schedule={"steps": 1},
        parallel={"zero": 1},
        batch={"micro_size": 8 // num_ranks},
    )
    run_ranks(one_rollout, num_ranks, config)
    ours, expected = (recorded(folder / run / "rollouts", 0) for run in (name, "whole"))
    for key in ("rows", "prompts", "tokens", "lengths", "scores", "rewards", "advantages", "t"):
        assert np.array_equal(getattr(ours, key), getattr(expected, key)), key
    np.testing.assert_allclose(ours.old[:, 8:], expected.old[:, 8:], rtol=1e-5, atol=1e-5)


def test_a_rollout_of_other_prompts_is_not_replayed(found: dict[str, Any], folder: Path) -> None:
    shorter = {"replay": str(folder / "whole/rollouts"), "prompts_per_rollout": 2}
    with pytest.raises(AssertionError, match=r"has 4 prompts × 4 completions of 8 tokens, not 2 × 4 of 8"):
        run_ranks(one_rollout, 1, config_of(folder, "shorter", shorter, data={"validation_fraction": 0.3}))


def test_arrays_give_the_rollout_back(found: dict[str, Any], folder: Path) -> None:
    rollout = recorded(folder / "whole/rollouts", 0)
    again = Rollout.of(rollout.arrays())
    assert again.arrays().keys() == rollout.arrays().keys()
    assert again.prompt_of(5).tolist() == rollout.prompt_of_group(1).tolist()


def test_noise_of_a_recorded_rollouts_gradient_is_reported(found: dict[str, Any], folder: Path) -> None:
    """mdm report rl-variance: designs that were drawn are read again; what is wrong is said in a line."""
    first, second, *refused = found["report"]
    record = json.loads((folder / "whole/rl_variance/rl_variance.json").read_text(encoding="utf-8"))
    names = ["independent rates", "P-POTS, shared, strata", "espo"]
    assert [design["name"] for design in record["designs"]] == names
    assert [design["rows"] for design in record["designs"]] == [1, 1, 4]
    assert (folder / "whole/rl_variance/rl_variance.png").stat().st_size > 10_000
    lines = [[line for line in said.splitlines() if line.startswith(names[1])] for said in (first, second)]
    assert lines[0] == lines[1] != []
    assert [line.split(": ")[0] for line in refused[:1]] == ["--designs"]
    assert "groups have rewards that differ" in refused[1]
    assert "no such recorded rollout" in refused[2]
