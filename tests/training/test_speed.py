"""Where a step's time goes, and who is slow."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.load import dump_config
from megatron_mdm.engine.clock import PHASES, PhaseClock, covered
from megatron_mdm.models.costs import training_flops
from megatron_mdm.models.parameters import EMBEDDING, parameter_table
from megatron_mdm.parallel.cores import CoreUse, core_wait, unfit_hosts
from megatron_mdm.training.metrics import is_measured
from megatron_mdm.training.speed import RankTimes, stragglers
from tests.ranks import run_program_ranks, run_ranks
from tests.small import small_config, small_model, write_ids

# launch/train.py, in which a rank takes a nap in every step's data. Whatever else this machine does, all have cores.
SLEEPER = """
import runpy, time
from megatron_mdm.training import speed
from megatron_mdm.training.source import SupervisedSource
speed.unfit_hosts = lambda uses: {}
speed.own_seconds = lambda use: use.seconds
noised_batch = SupervisedSource.noised_batch
def slow(self, step):
    if self.context.rank == 1:
        time.sleep(0.15)
    return noised_batch(self, step)
SupervisedSource.noised_batch = slow
runpy.run_path("launch/train.py", run_name="__main__")
"""
LAYOUTS = {"dp2": {"zero": 1}, "zero3": {"zero": 3}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


def records(folder: Path, parallel: dict[str, Any], wrapper: str = "launch/train.py") -> list[dict[str, Any]]:
    write_ids(folder / "train.jsonl", 30)
    logging = {"every": 2, "profile_every": 4, "tensorboard": "tensor" in parallel}
    config = small_config(folder, parallel=parallel, schedule={"steps": 12}, logging=logging)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    result, _ = run_program_ranks(wrapper, ["--config", str(folder / "config.yaml")], 2)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.alone
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_steps_time_is_broken_down(name: str, tmp_path: Path) -> None:
    found = records(tmp_path, LAYOUTS[name])
    logged = [record for record in found if "loss" in record]
    assert [record["step"] for record in logged] == [2, 4, 6, 8, 10, 12]
    for record in logged:
        phases = {phase: record[f"time_{phase}"] for phase in PHASES}
        assert min(phases.values()) >= 0
        assert sum(phases.values()) == pytest.approx(record["time_step"], rel=1e-6)
        assert min(phases["forward"], phases["backward"], phases["optimizer"]) > 0
        assert (phases["pipeline"] > 0) == (name == "pp2")
        assert 0 < record["mfu"] < 1
    sampled = [record for record in found if "time_busy_by_rank" in record]
    assert [record["step"] for record in sampled] == [4, 8, 12]
    for record in sampled:
        assert all(value > 0 for value in record["time_communication_by_rank"] + record["time_busy_by_rank"])
        assert all(0.05 < memory < 10 for memory in record["memory_gib_by_rank"])
    measured = json.loads((tmp_path / "run/summary.json").read_text())["peak_flops_per_second"]
    assert 1e9 < measured < 1e14


@pytest.mark.alone
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    (tmp_path / "wrapper.py").write_text(SLEEPER, encoding="utf-8")
    write_ids(tmp_path / "train.jsonl", 30)
    found = records(tmp_path, {"zero": 1}, str(tmp_path / "wrapper.py"))
    for record in found:
        if "slowest_rank" in record:
            assert record["slowest_rank"] == 1
            assert record["time_busy_by_rank"][1] > 0.15
            assert record["time_communication_by_rank"][0] > 0.1  # it waits
    (straggler,) = map(json.loads, (tmp_path / "run/faults.jsonl").read_text().splitlines())
    assert (straggler["kind"], straggler["step"], straggler["rank"], straggler["phase"]) == ("straggler", 8, 1, "data")


def times(
    busy: Sequence[float],
    waited: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    hosts: str = "aaaa",
    stages: str = "0000",
    cores: Sequence[list[int]] = ([0], [1], [2], [3]),
    load: float = 0.5,
) -> list[RankTimes]:
    """Times of four ranks, each on a core of its own that it never waits for."""
    waited = waited or [0.0] * 4
    tokens = tokens or [100] * 4
    uses = [CoreUse(hosts[rank], cores[rank], True, load, busy[rank], waited[rank]) for rank in range(4)]
    return [RankTimes(int(stages[rank]), tokens[rank], uses[rank], {"data": busy[rank]}, 0.1, 1.0) for rank in range(4)]


EVEN = [1.0, 1.1, 1.0, 0.9]
SLOW = [1.0, 1.0, 2.0, 1.0]
UNKNOWN = [math.nan] * 4


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        (times(EVEN), []),
        (times(SLOW), [2]),
        (times([1.0, 1.0, 1.26, 1.0]), [2]),
        (times([1.0, 1.0, 1.24, 1.0]), []),
        (times(SLOW, tokens=[100, 100, 200, 100]), []),  # it has more to do
        (times([1.0, 1.0, 2.0, 2.0], stages="0011"), []),  # its peers are those of its stage
        (times([1.0, 1.0, 2.0, 3.0], stages="0011"), [3]),
        (times(SLOW, hosts="abcd", stages="0123"), []),  # it has no peers
        # Where a rank waited for a core, nobody of its host is compared …
        (times(SLOW, [0.0, 0.0, 0.9, 0.0]), []),
        (times(SLOW, [0.2, 0.0, 0.0, 0.0]), []),
        (times(SLOW, [0.2, 0.0, 0.0, 0.0], hosts="abbb"), [2]),
        (times([3.0, 1.0, 2.0, 1.0], [0.9, 0.0, 0.0, 0.0], hosts="abbb"), [2]),
        # … and a little waiting is taken off.
        (times([1.0, 1.0, 1.3, 1.0], [0.0, 0.0, 0.1, 0.0]), []),
        (times([1.0, 1.0, 1.3, 1.0], [0.08, 0.08, 0.08, 0.08]), [2]),
        # More ranks than cores; cores that differ from rank to rank; ranks that are bound to the same one.
        (times(SLOW, cores=[[0, 1, 2]] * 4), []),
        (times(SLOW, cores=[[0, 1, 2, 3]] * 4), [2]),
        (times(SLOW, cores=[[0], [1], [0], [1]]), []),
        (times(SLOW, cores=[[0, 1]] * 4, hosts="aabb"), [2]),
        # Where the kernel does not tell, the host's load does.
        (times(SLOW, UNKNOWN), [2]),
        (times(SLOW, UNKNOWN, load=1.5), []),
        (times(SLOW, load=1.5), [2]),
    ],
)
def test_stragglers_are_told_from_ranks_that_wait_for_a_core(ranks: list[RankTimes], named: list[int]) -> None:
    assert stragglers(ranks, 1.25) == named


def test_why_ranks_are_not_compared() -> None:
    reasons = [
        (times(SLOW, [0.0, 0.0, 0.9, 0.0]), "rank 2 on a waited for a core for 45% of its time: others use them"),
        (times(SLOW, cores=[[0]] * 4), "4 ranks on a share 1 core"),
        (times(SLOW, UNKNOWN, load=1.5), "the load of a is 1.5 processes a core"),
    ]
    for ranks, reason in reasons:
        assert unfit_hosts([rank.cores for rank in ranks]) == {"a": reason}
    gpus = [use.cores._replace(computes_on_them=False) for use in times(SLOW, cores=[[0]] * 4)]
    assert unfit_hosts(gpus) == {}


def computes_on_one_core(seconds: float) -> tuple[float, float]:
    """On a rank: (how long it waited for the core that it shares with the others, how long it took in all)."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    began = time.perf_counter()
    waited = core_wait()
    while time.perf_counter() < began + seconds:
        pass
    waited = core_wait() - waited
    return waited, time.perf_counter() - began


@pytest.mark.alone
def test_waiting_for_a_core_is_measured() -> None:
    """Two processes that compute on one core at a time: one of them waits for about half of it, at least."""
    if math.isnan(core_wait()):
        pytest.skip("this kernel does not tell")
    outcomes = run_ranks(computes_on_one_core, 2, 0.5)
    assert max(waited for waited, _ in outcomes) > 0.1
    assert all(waited <= took for waited, took in outcomes)


def test_phases_within_phases_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, of 2 and 4 seconds, in one of 10."""
    ticks = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = PhaseClock()
    with clock.measure("forward"):
        for _ in range(2):
            with clock.measure("pipeline"):
                pass
    closed = clock.close(12.0)
    assert (closed["pipeline"], closed["forward"], closed["other"]) == (6.0, 4.0, 2.0)


def test_overlapping_spans_count_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0
    assert covered([]) == 0.0


def test_flops_are_six_per_weight_and_token() -> None:
    """Without attention's own products, which grow with the length."""
    model = small_model()
    table = parameter_table(model)
    blocks = sum(row.size for name, row in table.items() if ".layers." in name and len(row.shape) == 2)
    head = table[EMBEDDING].size
    assert training_flops(model, 100, 0.0, 40) == 6 * (100 * blocks + 40 * head)
    longer = training_flops(model, 100, 10.0, 40) - training_flops(model, 100, 0.0, 40)
    assert longer == 3 * 100 * model.num_layers * 4 * 10 * model.hidden_size


def test_what_is_measured_is_told_from_what_is_computed() -> None:
    assert is_measured("time_forward")
    assert is_measured("tokens_per_second")
    assert not is_measured("loss")
